"""A causal language model whose decoder layers differ in size, built out of transformers' own classes.

``config.json`` describes such a model with ``per_layer_config``: attention heads, KV heads and MLP width of
each layer that differs from the global sizes. transformers reads and writes that, but builds all layers
alike. The classes below let transformers build its own model first, and then build each layer of another size
anew, by the same class. With ``output_biases`` they also give each projection back to the hidden size a bias.
Nothing else changes: the arithmetic, caches and generation are transformers'.

This file lies in each checkpoint of unequal layers, with the names of its model family in the three imports,
and is what ``AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`` runs.
"""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import LlamaConfig as Config
from transformers import LlamaForCausalLM as ForCausalLM
from transformers import LlamaModel as Model

SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""What a layer may have of its own."""

# It warns of each read of a global size, which stands beside the sizes of the layers on purpose.
logging.getLogger("transformers.integrations.heterogeneity").setLevel(logging.ERROR)


def layer_config(config: Any, index: int) -> Any:
    """Return the config that one layer is built from: a copy of the model's with the layer's own sizes."""
    per_layer = config.per_layer_config
    if not isinstance(per_layer, Mapping):
        return per_layer[index]
    # transformers before 5.11 keeps what stands in config.json.
    view = copy.copy(config)
    for key, sizes in per_layer.items():
        if int(key) == index:
            for name, value in sizes.items():
                setattr(view, name, value)
    return view


def build_unequal_layers(model: Any) -> bool:
    """Replace each layer of ``model`` whose config asks for another size than it was built in.

    A layer that has its size already stays: all of them, once transformers builds such models itself.

    Args:
        model: A model as the family's own class builds it; the default dtype and device are those wanted.

    Returns:
        Whether a layer was changed.
    """
    config = model.config
    layers = getattr(model, model.base_model_prefix, model).layers
    biased = bool(getattr(config, "output_biases", False))
    replaced = biased
    for index, built in enumerate(layers if getattr(config, "per_layer_config", None) is not None else ()):
        view = layer_config(config, index)
        with torch.device("meta"):  # shapes alone
            wanted = type(built)(view, index)
        if _shapes(wanted) == _shapes(built):
            continue
        layer = type(built)(view, index).train(built.training)
        # A view does not follow the model's attention implementation, and where it has none attention runs
        # without its causal mask. Phi-3 reads the layer's sizes in each forward pass.
        own = LayerConfig(config, {name: getattr(view, name) for name in SIZES})
        for module in layer.modules():
            if getattr(module, "config", None) is view:
                module.config = own
        layers[index] = layer
        replaced = True
    for layer in layers if biased else ():
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            if projection.bias is None:
                projection.bias = torch.nn.Parameter(projection.weight.new_zeros(projection.out_features))
    return replaced


def _shapes(layer: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in layer.named_parameters()}


class LayerConfig:
    """What a layer reads once it is built: its own sizes, and all else as the model's config has it now."""

    def __init__(self, shared: Any, sizes: Mapping[str, int]) -> None:
        """Remember the model's config and the layer's sizes."""
        self.__dict__.update(sizes, _shared=shared)

    def __getattr__(self, name: str) -> Any:
        """Look up what is not a size."""
        if name.startswith("__") or "_shared" not in self.__dict__:  # being copied, and still empty
            raise AttributeError(name)
        return getattr(self._shared, name)


class UnequalLayersConfig(Config):
    """The family's config; ``per_layer_config`` is part of it."""


class _UnequalLayers:
    """Goes before a model class of transformers: gives each layer its size once the model is built."""

    config_class = UnequalLayersConfig

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.tie_word_embeddings and transformers.__version__.startswith("5.3."):
            raise ImportError(
                "transformers 5.3 loads no tied weights with trust_remote_code: install 5.4 or newer."
            )
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if build_unequal_layers(self):
            self.post_init()  # type: ignore[attr-defined]  # new layers get their initial weights as well


class UnequalLayersModel(_UnequalLayers, Model):  # type: ignore[misc]
    """The model without its output head."""


class UnequalLayersForCausalLM(_UnequalLayers, ForCausalLM):  # type: ignore[misc]
    """The model with its output head."""
