"""Models whose layers differ in size, built out of transformers' own classes.

transformers describes such models with ``per_layer_config``, but does not build them yet: a model is first
built with the config's global sizes, then each layer is rebuilt from its own view of the config.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from core.errors import CheckpointError
from core.model.checkpoint import Checkpoint, is_companion
from core.model.config import layer_shapes
from core.model.families import Kind, family_of
from core.model.shape import ModelShape
from core.untrusted import MAX_TOKENIZER_BYTES, files_of, foreign_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers' model classes take two seconds to import, which steps that only read configs do not need:
# the functions that build a model import them.


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
    return CheckpointError(f"config.json does not describe a model that can be built: {said}. Correct it.")


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
    shape = ModelShape(
        layers=layers,
        outside_params=0,
        layer_params=layer_params,
        query_head_params=costs["query"],
        kv_head_params=costs["kv"],
        mlp_channel_params=costs["mlp"],
    )
    # The last layer of a sliced model is wider: what it has more counts as outside.
    return replace(shape, outside_params=sum(p.numel() for p in model.parameters()) - shape.num_params())


def load_model(
    source: Checkpoint | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> "PreTrainedModel":
    """Load a checkpoint, of equal or unequal layers.

    Args:
        source: A checkpoint, or its folder.
        dtype: Number format to load into; None keeps the stored one.
        device: Where the weights go.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: If a file is missing or corrupt, or weights and config do not fit.
        UnsupportedModelError: If the model's family is not supported.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    check_fit(checkpoint)
    with checkpoint.weights() as reader:
        state = {name: (tensor := reader.tensor(name)).to(dtype or tensor.dtype) for name in reader.names()}
    return model_of(checkpoint.config, state, dtype=dtype or checkpoint.dtype, device=device)


def model_of(
    config: PreTrainedConfig, state: Mapping[str, Tensor], *, dtype: torch.dtype, device: str | torch.device
) -> "PreTrainedModel":
    """Return the model, for evaluation, of a config and of tensors by name; tied ones may be left out."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = build_model(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected, "the names have been compared"
    assert set(missing) <= _tied_names(model), "the names have been compared"
    model.tie_weights()
    return torch.nn.Module.to(model, device).eval()


def check_fit(checkpoint: Checkpoint) -> None:
    """Compare a checkpoint's tensors with its config, by name and shape; nothing is built or read.

    Otherwise a wrong config could ask for any amount of memory.

    Raises:
        CheckpointError: If they do not fit.
    """
    model, directory = build_empty(checkpoint.config), checkpoint.directory
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    with checkpoint.weights() as reader:
        found = {name: reader.shape(name) for name in reader.names()}
    lost = sorted((wanted.keys() ^ found.keys()) - _tied_names(model))
    if lost:
        raise CheckpointError(
            f"{directory}: weights and config.json disagree on {', '.join(lost[:5])}. "
            "Take both from the same checkpoint."
        )
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != wanted[name]:
            raise CheckpointError(
                f"{directory}: weights do not fit config.json: {name} has the shape {found[name]}, not "
                f"{wanted[name]}. Take both from the same checkpoint."
            )


def check_tied(checkpoint: Checkpoint) -> None:
    """Compare tensors that ``config.json`` ties with each other, where both are stored.

    Raises:
        CheckpointError: If they differ: by its config the model would be another one.
    """
    if not checkpoint.config.tie_word_embeddings:
        return
    with checkpoint.weights() as reader:
        there = set(reader.names())
        for name, other in build_empty(checkpoint.config).all_tied_weights_keys.items():
            if {name, other} <= there and not torch.equal(reader.tensor(name), reader.tensor(other)):
                raise CheckpointError(
                    f"{checkpoint.directory}: config.json ties {name} to {other}, but both are stored, and "
                    "differ. Set tie_word_embeddings to false there, or take the weights that belong to it."
                )


def _tied_names(model: "PreTrainedModel") -> set[str]:
    return set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()


def load_tokenizer(source: Checkpoint | Path) -> Any:
    """Load a checkpoint's tokenizer.

    Args:
        source: A checkpoint, or its folder.

    Raises:
        CheckpointError: If there is none.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    directory = checkpoint.directory
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
        # Without trust_remote_code=False transformers would ask on the terminal whether to run code.
        return AutoTokenizer.from_pretrained(directory, config=checkpoint.config, trust_remote_code=False)


def pick_device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(name: str) -> torch.dtype | None:
    """Return the torch dtype of a setting; None for ``auto``."""
    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]
