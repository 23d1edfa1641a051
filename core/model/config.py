"""Configs of models whose layers may differ in size: read from a checkpoint, asked, changed.

transformers describes such models with ``per_layer_config``.
"""

import copy
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from core.errors import CheckpointError, UnsupportedModelError
from core.model.families import family_of, under_its_family
from core.model.limits import check_complete, check_sizes
from core.model.shape import LayerShape
from core.untrusted import foreign_errors, parse_object, read_limited

_SIZES = {
    "query_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
}
_OF_EACH_LAYER = ("layer_types", "no_rope_layers")
"""Entries that are a list with an item for each layer."""


def load_config(directory: Path) -> PreTrainedConfig:
    """Read and check a checkpoint's config; MobileLLM's becomes the equivalent Llama config.

    Raises:
        CheckpointError: If there is none, or it cannot be read.
        UnsupportedModelError: If the model's family is not supported.
    """
    where = directory / "config.json"
    if not where.is_file():
        raise CheckpointError(
            f"{directory} holds no config.json. Give the folder of a Hugging Face checkpoint."
        )
    # It warns of every read of a global size, which stands beside the sizes of the layers on purpose.
    logging.getLogger("transformers.integrations.heterogeneity").setLevel(logging.ERROR)

    def unreadable(said: str) -> CheckpointError:
        return CheckpointError(f"{where} cannot be read: {said}. Fetch it again, or correct it.")

    with foreign_errors(unreadable):  # a wrong type may raise anything in transformers
        data = under_its_family(parse_object(read_limited(where)))
        data.pop("auto_map", None)  # code of a checkpoint is never run
        # Before transformers, which does not know all families, sees it.
        family_of(SimpleNamespace(**data))
        check_sizes(data)
        config = CONFIG_MAPPING[data["model_type"]].from_dict(data)
        family_of(config)
        check_complete(config)
        if sliced_width(config) is not None:
            _check_sums(config)
    return config


def layer_shapes(config: PreTrainedConfig) -> tuple[LayerShape, ...]:
    """Return the sizes of each decoder layer."""
    return tuple(
        LayerShape(**{size: getattr(view, name) for size, name in _SIZES.items()})
        for view in config.per_layer_config
    )


def sliced_width(config: PreTrainedConfig) -> int | None:
    """Return the width of the signal between the layers if it is sliced; None for the full hidden size."""
    return getattr(config, "sliced_hidden_size", None)


def config_with_width(config: PreTrainedConfig, width: int) -> PreTrainedConfig:
    """Return a copy of ``config`` with a signal of ``width`` between the layers, in a basis for each block.

    The output head keeps the full hidden size, so it is not tied to the embedding.

    Raises:
        UnsupportedModelError: If the family's layers are more than norms, blocks and plain sums.
    """
    _check_sums(config)
    data = config.to_dict() | {"head_dim": head_dim(config), "tie_word_embeddings": False}
    return type(config).from_dict(data | {"sliced_hidden_size": width})


def config_with_hidden_size(config: PreTrainedConfig, size: int) -> PreTrainedConfig:
    """Return a copy of ``config`` with ``size`` embedding channels; heads are as large as before.

    Raises:
        UnsupportedModelError: If the family's layers are more than norms, blocks and plain sums, or its own
            config refuses the size.
    """
    _check_sums(config, "lose embedding channels")
    data = config.to_dict() | {"head_dim": head_dim(config), "hidden_size": size}
    try:
        return type(config).from_dict(data)
    except StrictDataclassError as error:
        raise UnsupportedModelError(
            f"this {config.model_type} cannot have {size} embedding channels: its config says "
            f"{str(error).splitlines()[-1].strip()}. Leave prune.hidden_size out."
        ) from error


def _check_sums(config: PreTrainedConfig, what: str = "be sliced") -> None:
    family = family_of(config)
    if not family.slices_width:
        raise UnsupportedModelError(
            f"model family {family.model_type!r} cannot {what}: its layers scale or normalise what they "
            "add to the residual sum. Choose another prune.method, or another base model."
        )


def refuse_sliced(config: PreTrainedConfig) -> None:
    """Refuse a sliced model where groups are to be measured or removed.

    Raises:
        UnsupportedModelError: If the model is sliced.
    """
    if sliced_width(config) is not None:
        raise UnsupportedModelError(
            f"this checkpoint was made by prune.method=slicegpt (sliced_hidden_size={sliced_width(config)}): "
            "it can be trained and evaluated, but not pruned again. Start from the model that it came from."
        )


def head_dim(config: PreTrainedConfig) -> int:
    """Return A, the size of one attention head; it is the same in all layers."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.per_layer_config[0].num_attention_heads)


def rotary_kinds(config: PreTrainedConfig) -> set[str]:
    """Return which scalings its rotary frequencies have, in any layer."""
    return {part["rope_type"] for part in _rotary_parts(config)}


def moving_frequencies_from(config: PreTrainedConfig) -> int | None:
    """Return above which length of a sequence its rotary frequencies depend on it; None if they never do.

    In a batch they are then those of its longest document, for all of them.
    """
    moving = [part for part in _rotary_parts(config) if part["rope_type"] in ("longrope", "dynamic")]
    name, longest = "original_max_position_embeddings", config.max_position_embeddings
    return min((int(part.get(name) or longest) for part in moving), default=None)


def _rotary_parts(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the rotary parameters of all layers, or of each type of them."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else list(rope.values())


def with_output_biases(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of ``config`` whose layers all have biases in the projections that read groups.

    ``output_biases`` is our own entry, which the code beside the weights reads: no family has these biases
    alone, and most have none.
    """
    biased = copy.deepcopy(config)
    biased.output_biases = True
    return biased


def config_with_layers(
    config: PreTrainedConfig, layers: Sequence[LayerShape], stay: Sequence[int] | None = None
) -> PreTrainedConfig:
    """Return a copy of ``config`` with the given layer sizes.

    ``stay`` are the numbers that the layers have in ``config``; None if they are all there.

    Layers that are all alike make a plain config that any loader reads. Otherwise the global sizes stay and
    each layer is listed in ``per_layer_config``; ``head_dim`` is explicit, since it no longer follows from
    the hidden size, and the global sizes stay readable, since Llama's own config check reads them.
    """
    data = config.to_dict()
    data.pop("per_layer_config", None)
    data.pop("allow_global_per_layer_attribute_access", None)
    data["head_dim"] = head_dim(config)
    if stay is not None:
        data["num_hidden_layers"] = len(stay)
        for name in _OF_EACH_LAYER:
            if isinstance(data.get(name), list):
                data[name] = [data[name][index] for index in stay]
    sizes = [{name: getattr(layer, size) for size, name in _SIZES.items()} for layer in layers]
    if all(size == sizes[0] for size in sizes):
        # Some configs refuse a global head count: one that does not divide the hidden size (Llama, Gemma), or
        # one that does not suit the rotary factors, though an explicit head_dim does (Phi-3).
        with suppress(StrictDataclassError):
            return type(config).from_dict(data | sizes[0])
    data["per_layer_config"] = dict(enumerate(sizes))
    data["allow_global_per_layer_attribute_access"] = True
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns about global sizes that we wrote on purpose
    try:
        return type(config).from_dict(data)
    finally:
        transformers_logging.set_verbosity(verbosity)
