"""Export to the DeciLM format (nemotron-nas), which runtimes read with their own kernels.

vLLM, SGLang, TensorRT-LLM and MLX load a Llama whose layers differ in MLP width under this model type. Widths
are multiples of 256, and all layers have the same number of query heads.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import ExportError
from core.export.exported import Exported, put_when_complete, refuse_sliced_export
from core.model.build import model_shape
from core.model.checkpoint import Checkpoint
from core.model.config import head_dim, layer_shapes, sliced_width
from core.model.shape import LayerShape
from core.settings.prune import PORTABLE_WIDTH

_CODE = "configuration_decilm.py"
_ROPE_TYPES = ("default", "linear", "llama3")
"""Kinds of rotary scaling that all runtimes compute alike."""


def export_decilm(checkpoint: Path, output: Path) -> Exported:
    """Write a checkpoint of the portable profile as a DeciLM, a layer at a time."""
    opened = Checkpoint(checkpoint)
    config = opened.config
    refuse_sliced_export(config, "a DeciLM (nemotron-nas)")
    if (problem := decilm_obstacle(config)) is not None:
        sizes_alone = next(_obstacles(config), None) is None
        portable = "Prune with prune.profile=portable, or export" if sizes_alone else "Export"
        raise ExportError(
            f"{checkpoint} cannot become a DeciLM (nemotron-nas): {problem}. {portable} another format."
        )
    with put_when_complete(output) as partial:
        opened.rewrite(
            partial, decilm_config(config), provenance=opened.provenance, config_writer=_write_config
        )
    notes = [
        f"Runtimes that read configs through transformers run {_CODE}, beside the weights: start vLLM, "
        "SGLang and TensorRT-LLM with --trust-remote-code. MLX needs no flag."
    ]
    if len({layer.kv_heads for layer in opened.layers}) > 1:
        notes.append("SGLang refuses layers that differ in KV heads, as these do.")
    return Exported(path=output, params=model_shape(config).num_params(), notes=tuple(notes))


def decilm_obstacle(config: Any) -> str | None:
    """Return the first reason why the format does not fit a model, without a full stop; None if it fits."""
    return next(_obstacles(config), None) or next(_size_obstacles(config), None)


def _obstacles(config: Any) -> Iterator[str]:
    """Yield reasons that pruning does not change."""
    if sliced_width(config) is not None:
        yield "the signal between its layers is sliced"
        return
    if config.model_type != "llama":
        yield f"its family is {config.model_type}, the format's is llama"
        return
    for name in ("attention_bias", "mlp_bias", "output_biases"):
        if getattr(config, name, False):
            yield f"its projections have biases ({name}), which not all runtimes read"
    if config.hidden_act != "silu":
        yield f"its activation is {config.hidden_act}, the format's is silu"
    rope = config.rope_parameters["rope_type"]
    if rope not in _ROPE_TYPES:
        yield f"its rotary scaling is {rope}, but all runtimes compute only {', '.join(_ROPE_TYPES)} alike"


def _size_obstacles(config: Any) -> Iterator[str]:
    """Yield the sizes that do not fit the format."""
    shapes, size = layer_shapes(config), head_dim(config)
    heads = sorted({layer.query_heads for layer in shapes})
    if len(heads) > 1:
        yield f"its layers have {', '.join(map(str, heads))} query heads, but must all have the same number"
    elif heads[0] * size != config.hidden_size:
        yield (
            f"its {heads[0]} query heads of {size} dimensions make {heads[0] * size}, but the runtimes "
            f"expect the hidden size, {config.hidden_size}"
        )
    for index, layer in enumerate(shapes):
        if layer.mlp_width % PORTABLE_WIDTH:
            yield f"layer {index} has an MLP width of {layer.mlp_width:,}, not a multiple of {PORTABLE_WIDTH}"


def ffn_mult(mlp_width: int, hidden_size: int) -> float:
    """Return F as the format stores it.

    Runtimes compute F = 2/3 * ffn_mult * D, rounded down and then up to a multiple of 256. MLX rounds
    ``ffn_mult`` to six decimals first, which moves F by less than 1 at any hidden size below 10^6.
    """
    return 1.5 * mlp_width / hidden_size


def decilm_config(config: Any) -> dict[str, Any]:
    """Return the config.json of a model that fits the format.

    It has the rotary frequencies twice: runtimes of 2024 and MLX read ``rope_theta`` and ``rope_scaling``,
    newer ones ``rope_parameters``.
    """
    shapes = layer_shapes(config)
    data = config.to_diff_dict()  # without what is the default of every config
    for name in ("per_layer_config", "allow_global_per_layer_attribute_access", "transformers_version"):
        data.pop(name, None)
    rope = config.rope_parameters
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return data | {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{Path(_CODE).stem}.DeciLMConfig"},
        "block_configs": [_block(layer, config.hidden_size) for layer in shapes],
        "intermediate_size": max(layer.mlp_width for layer in shapes),
        "num_attention_heads": shapes[0].query_heads,
        "num_key_value_heads": max(layer.kv_heads for layer in shapes),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "torch_dtype": data.get("dtype"),
    }


def _block(layer: LayerShape, hidden_size: int) -> dict[str, Any]:
    whole = {"no_op": False, "replace_with_linear": False}
    return {
        "attention": {"n_heads_in_group": layer.heads_per_group, **whole},
        "ffn": {"ffn_mult": ffn_mult(layer.mlp_width, hidden_size), **whole},
    }


def _write_config(entries: dict[str, Any], directory: Path) -> None:
    """Write a config.json, and the code that reads it."""
    (directory / "config.json").write_text(json.dumps(entries, indent=2, sort_keys=True))
    shutil.copyfile(Path(__file__).with_name(_CODE), directory / _CODE)
