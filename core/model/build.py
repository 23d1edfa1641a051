"""Models whose layers differ in size, built out of transformers' own classes.

transformers describes such models with ``per_layer_config``, but does not build them yet: a model is first
built with the config's global sizes, then each layer is built anew from its own view of the config.
"""

import copy
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from core.errors import CheckpointError
from core.model.checkpoint import CheckpointReader, is_companion
from core.model.families import Kind, family_of, under_its_family
from core.model.limits import check_complete, check_sizes
from core.model.shape import LayerShape, ModelShape
from core.untrusted import MAX_TOKENIZER_BYTES, files_of, foreign_errors, parse_object, read_limited

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers' model classes take two seconds to import, which steps that read configs alone need not pay:
# the functions that build a model import them.

log = logging.getLogger(__name__)

_SIZES = {
    "query_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
}


def layer_shapes(config: PreTrainedConfig) -> tuple[LayerShape, ...]:
    """Return the sizes of each decoder layer."""
    return tuple(
        LayerShape(**{size: getattr(view, name) for size, name in _SIZES.items()})
        for view in config.per_layer_config
    )


def config_with_layers(config: PreTrainedConfig, layers: Sequence[LayerShape]) -> PreTrainedConfig:
    """Return a copy of ``config`` with the given layer sizes.

    Layers that are all alike make a plain config that any loader reads. Otherwise the global sizes stay and
    each layer that differs stands in ``per_layer_config``; ``head_dim`` is explicit, since it no longer
    follows from the hidden size, and the global sizes stay readable, since Llama's own config check reads
    them.
    """
    data = config.to_dict()
    data.pop("per_layer_config", None)
    data.pop("allow_global_per_layer_attribute_access", None)
    data["head_dim"] = head_dim(config)
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


def head_dim(config: PreTrainedConfig) -> int:
    """Return A, the size of one attention head; it is the same in all layers."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.per_layer_config[0].num_attention_heads)


def build_model(config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """Build a causal language model with fresh weights, each layer in its own size.

    Args:
        config: Config of a supported family, with or without ``per_layer_config``.
        dtype: Number format of the weights.

    Raises:
        UnsupportedModelError: If the family is not supported.
        CheckpointError: If the family's class refuses the config.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import local_torch_dtype

    from core.model.modeling_unequal_layers import build_unequal_layers

    family_of(config)
    config = copy.deepcopy(config)
    if config.is_heterogeneous:
        config.allow_global_per_layer_attribute_access = True
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with foreign_errors(_no_model):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            with local_torch_dtype(dtype, type(model).__name__):
                build_unequal_layers(model)
    finally:
        transformers_logging.set_verbosity(verbosity)
    return model.eval()


def _no_model(said: str) -> CheckpointError:
    return CheckpointError(f"config.json describes no model that can be built: {said}. Correct it.")


def build_empty(config: PreTrainedConfig) -> "PreTrainedModel":
    """Build a model without memory for its weights (on torch's meta device), to look at its parameters."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = build_model(config)
    model.tie_weights()
    return model


def model_shape(config: PreTrainedConfig) -> ModelShape:
    """Return the sizes of the model that ``config`` describes, without memory for its weights.

    Raises:
        UnsupportedModelError: If the model's family is not supported.
    """
    family = family_of(config)
    model = build_empty(config)
    layers = layer_shapes(config)
    units: dict[Kind, int] = dict(query=layers[0].query_heads, kv=layers[0].kv_heads, mlp=layers[0].mlp_width)
    costs: dict[Kind, int] = dict(query=0, kv=0, mlp=0)
    layer_params = 0
    for name, parameter in model.get_submodule(f"{family.layers}.0").named_parameters():
        slicing = family.slicings.get(name)
        if slicing is None:
            layer_params += parameter.numel()
            continue
        per_unit = parameter.numel() // sum(units[kind] for kind in slicing.kinds)
        for kind in slicing.kinds:
            costs[kind] += per_unit
    in_layers = sum(p.numel() for p in model.get_submodule(family.layers).parameters())
    return ModelShape(
        layers=layers,
        outside_params=sum(p.numel() for p in model.parameters()) - in_layers,
        layer_params=layer_params,
        query_head_params=costs["query"],
        kv_head_params=costs["kv"],
        mlp_channel_params=costs["mlp"],
    )


def load_config(directory: Path) -> PreTrainedConfig:
    """Read a checkpoint's config; a MobileLLM's comes as the Llama config that it amounts to.

    Raises:
        CheckpointError: If there is none, or it cannot be read.
        UnsupportedModelError: If the model's family is not supported.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} holds no config.json. Give the folder of a Hugging Face checkpoint."
        )
    # It warns of every read of a global size, which stands beside the sizes of the layers on purpose.
    logging.getLogger("transformers.integrations.heterogeneity").setLevel(logging.ERROR)
    where = directory / "config.json"

    def unreadable(said: str) -> CheckpointError:
        return CheckpointError(f"{where} cannot be read: {said}. Fetch it again, or correct it.")

    with foreign_errors(unreadable):  # transformers' classes raise whatever a wrong type leads to
        data = under_its_family(parse_object(read_limited(where)))
        data.pop("auto_map", None)  # code is never run from a checkpoint
        # Before transformers, which does not know all families, sees it.
        family_of(SimpleNamespace(**data))
        check_sizes(data)
        config = CONFIG_MAPPING[data["model_type"]].from_dict(data)
        family_of(config)
        check_complete(config)
    return config


def load_model(
    directory: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> "PreTrainedModel":
    """Load a checkpoint, of equal or unequal layers.

    Args:
        directory: Hugging Face directory with safetensors weights.
        dtype: Number format to load into; None keeps the stored one.
        device: Where the weights go.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: If a file is missing or corrupt, or weights and config do not fit.
        UnsupportedModelError: If the model's family is not supported.
    """
    from transformers.initialization import no_init_weights

    config = load_config(directory)
    state = {}
    with CheckpointReader(directory) as reader:
        check_fit(directory, config, reader)
        for name in reader.names():
            tensor = reader.tensor(name)
            state[name] = tensor.to(dtype) if dtype is not None else tensor
    stored = next(iter(state.values())).dtype
    with no_init_weights():
        model = build_model(config, dtype=dtype or stored)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected, "the names have been compared"
    assert set(missing) <= _tied_names(model), "the names have been compared"
    model.tie_weights()
    return torch.nn.Module.to(model, device).eval()


def check_fit(directory: Path, config: PreTrainedConfig, reader: CheckpointReader) -> None:
    """Compare the tensors of a checkpoint with its config, by name and shape; nothing is built or read.

    A wrong config could else ask for any amount of memory.

    Raises:
        CheckpointError: If they do not fit.
    """
    model = build_empty(config)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = set(reader.names())
    lost = sorted((wanted.keys() ^ found) - _tied_names(model))
    if lost:
        raise CheckpointError(
            f"{directory}: weights and config.json disagree on {', '.join(lost[:5])}. "
            "Take both from the same checkpoint."
        )
    for name in sorted(found & wanted.keys()):
        shape = reader.shape(name)
        if shape != wanted[name]:
            raise CheckpointError(
                f"{directory}: weights do not fit config.json: {name} is of shape {shape}, not "
                f"{wanted[name]}. Take both from the same checkpoint."
            )


def _tied_names(model: "PreTrainedModel") -> set[str]:
    return set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()


def load_tokenizer(directory: Path) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        CheckpointError: If the directory holds none.
    """
    config = load_config(directory)
    for path in files_of(directory, is_companion):
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(
                f"{path} is larger than {MAX_TOKENIZER_BYTES / 1e6:.0f} MB. Fetch it again."
            )

    def unreadable(said: str) -> CheckpointError:
        if (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file():
            said += ". A tokenizer.model alone is read by the package sentencepiece: install it"
        return CheckpointError(f"{directory} holds no tokenizer that can be loaded: {said}. Fetch it again.")

    with foreign_errors(unreadable):
        # Without the word on code transformers would ask on the terminal whether to run it.
        return AutoTokenizer.from_pretrained(directory, config=config, trust_remote_code=False)


def pick_device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(name: str) -> torch.dtype | None:
    """Return the torch dtype of a setting; None for ``auto``."""
    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]
