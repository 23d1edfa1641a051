"""Export to ONNX with a KV cache, for ONNX Runtime GenAI and other ONNX runtimes.

The graph takes the cache as inputs and returns it with the new tokens. Keys and values have each layer's own
number of heads, so layers may differ in all sizes. A sliced model's graph holds its matrices like all others.
"""

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.errors import ExportError
from core.export.exported import Exported, put_when_complete
from core.export.onnx_genai import genai_config
from core.model.build import load_model, model_shape
from core.model.checkpoint import Checkpoint, is_companion
from core.model.config import head_dim, layer_shapes, rotary_kinds
from core.model.shape import LayerShape
from core.untrusted import files_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

GRAPH = "model.onnx"
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary scaling whose frequencies do not change with the length of the text."""


def export_onnx(checkpoint: Path, output: Path) -> Exported:
    """Write a checkpoint as a folder with an ONNX graph of one step of generation, in float32.

    Inputs are ``input_ids`` and ``position_ids`` (B, T), ``attention_mask`` (B, P+T), 0 at padding, and
    ``past_key_values.<layer>.key`` and ``.value`` (B, K, P, A), where K is the layer's own and P, the tokens
    seen before, may be 0. Outputs are ``logits`` (B, T, V) and ``present.<layer>.key`` and ``.value``
    (B, K, P+T, A). B, T and P are free in each call. Weights are beside the graph in ``model.onnx_data``.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"an ONNX export needs the Python package {' and '.join(missing)}. Run "
            "pip install 'adapt-pruner[onnx]', or export another format."
        )
    opened = Checkpoint(checkpoint)
    config = opened.config
    _refuse_moving_frequencies(config)
    with put_when_complete(output) as partial:
        partial.mkdir()
        _write_graph(load_model(opened, dtype=torch.float32), partial / GRAPH)
        for path in files_of(checkpoint, is_companion):
            shutil.copyfile(path, partial / path.name)
        vars(config).pop("auto_map", None)
        config.save_pretrained(partial)
        (partial / "genai_config.json").write_text(json.dumps(genai_config(opened, GRAPH), indent=1))
    params = model_shape(config).num_params()
    log.info("wrote %s: ONNX, %d parameters", output, params)
    notes = _notes(opened.layers)
    return Exported(path=output, params=params, notes=notes)


def _refuse_moving_frequencies(config: Any) -> None:
    for kind in sorted(rotary_kinds(config) - set(_ROPE_TYPES)):
        raise ExportError(
            f"its rotary scaling is {kind}, whose frequencies may change with the length of the text, but "
            f"those of a traced graph are constant (fits {', '.join(_ROPE_TYPES)}). Export another format."
        )


class _Step(torch.nn.Module):
    """A model as a function of tensors alone: the cache comes and goes as keys and values."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        from transformers import DynamicCache

        # Without the config it keeps all tokens for sliding windows too, where the mask hides them: a cache
        # that drops tokens counts them in Python, which a trace does not see.
        cache = DynamicCache(past)
        # By position: transformers has renamed the last.
        logits = self.model(input_ids, attention_mask, position_ids, cache).logits
        layers: Any = cache.layers
        return logits, [(layer.keys, layer.values) for layer in layers]


def _write_graph(model: "PreTrainedModel", path: Path) -> None:
    """Trace one step and write the graph, with the weights in a file beside it."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    layers, size = layer_shapes(model.config), head_dim(model.config)
    # Sizes to trace with: distinct, and not 0 or 1, which a trace may take for constants.
    batch, new, seen = 2, 3, 5
    keys = [torch.zeros(batch, layer.kv_heads, seen, size) for layer in layers]
    example = (
        torch.zeros(batch, new, dtype=torch.long),
        torch.ones(batch, seen + new, dtype=torch.long),
        torch.arange(seen, seen + new).repeat(batch, 1),
        [(key, key.clone()) for key in keys],
    )
    tokens = {0: "batch_size", 1: "sequence_length"}
    cache = {0: "batch_size", 2: "past_sequence_length"}
    with _without_warnings():
        program = torch.onnx.export(
            _Step(model).eval(),
            example,
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask", "position_ids", *_names("past_key_values", layers)],
            output_names=["logits", *_names("present", layers)],
            dynamic_shapes={
                "input_ids": tokens,
                "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
                "position_ids": tokens,
                "past": [(cache, cache) for _ in layers],
            },
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # stack traces, with paths of this machine
    onnx_ir.save(program.model, path, external_data=f"{path.name}_data")


def _names(prefix: str, layers: Sequence[LayerShape]) -> list[str]:
    return [f"{prefix}.{index}.{kind}" for index in range(len(layers)) for kind in ("key", "value")]


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence PyTorch on missing operators and on names that several inputs share on purpose."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _notes(layers: Sequence[LayerShape]) -> tuple[str, ...]:
    if len({layer.kv_heads for layer in layers}) == 1:
        return ()
    return (
        "Layers differ in KV heads, which ONNX Runtime GenAI reads from the graph. Runtimes that shape the "
        "first, empty cache by one number in config.json (Optimum, Transformers.js) cannot run it.",
    )
