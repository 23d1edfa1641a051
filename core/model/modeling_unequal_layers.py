"""A causal language model whose decoder layers differ in size, built out of transformers' own classes.

``config.json`` describes such a model with ``per_layer_config``: attention heads, KV heads and MLP width of
each layer that differs from the global sizes. transformers reads and writes that, but builds all layers
alike. The classes below let transformers build its own model first, and then build each layer of another size
anew, by the same class. With ``output_biases`` they also give each projection back to the hidden size a bias.
Nothing else changes: the arithmetic, caches and generation are transformers'.

A model sliced by SliceGPT also has ``sliced_hidden_size``, the width of the signal between its layers, each
of which has its own basis: its residual sums go through matrices (``attn_shortcut``, ``mlp_shortcut``). The
last layer widens the signal to ``hidden_size``, which the final norm and the output head have.

This file lies in each checkpoint of unequal layers, with the names of its model family in the three imports,
and is what ``AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`` runs.
"""

import copy
import functools
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
    per_layer = getattr(config, "per_layer_config", None) or {}
    if isinstance(per_layer, Mapping):  # transformers before 5.11 keeps what stands in config.json
        view = copy.copy(config)
        for key, sizes in per_layer.items():
            if int(key) == index:
                for name, value in sizes.items():
                    setattr(view, name, value)
    else:
        view = copy.copy(per_layer[index])
    view.hidden_size = getattr(config, "sliced_hidden_size", None) or config.hidden_size
    return view


class _SlicedLayer:
    """Goes before a decoder layer's class: residual sums that change the basis."""

    def __init__(self, config: Any, layer_idx: int, hidden_size: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        width, mlp = config.hidden_size, self.mlp  # type: ignore[attr-defined]
        end = hidden_size if layer_idx + 1 == config.num_hidden_layers else width
        self.attn_shortcut = torch.nn.Linear(width, width, bias=False)
        self.mlp_shortcut = torch.nn.Linear(width, end, bias=False)
        down = mlp.down_proj
        mlp.down_proj = torch.nn.Linear(down.in_features, end, bias=down.bias is not None)
        # What was sliced off counts as 0 in the mean: the weights that read a norm hold the rest of that.
        for norm in (self.input_layernorm, self.post_attention_layernorm):  # type: ignore[attr-defined]
            norm.variance_epsilon *= hidden_size / width

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Run the layer; the arguments are those of the family's attention."""
        read = self.input_layernorm(hidden_states)  # type: ignore[attr-defined]
        attended = self.self_attn(hidden_states=read, **kwargs)[0]  # type: ignore[attr-defined]
        between = self.attn_shortcut(hidden_states) + attended
        read = self.post_attention_layernorm(between)  # type: ignore[attr-defined]
        return self.mlp_shortcut(between) + self.mlp(read)  # type: ignore[attr-defined]


def _sliced(layer_class: Any) -> Any:
    # By the same name, by which transformers knows what must stay on one device.
    return type(layer_class.__name__, (_SlicedLayer, layer_class), {"__module__": __name__})


def build_unequal_layers(model: Any) -> bool:
    """Replace each layer of ``model`` whose config asks for another size than it was built in.

    A layer that has its size already stays: all of them, once transformers builds such models itself.

    Args:
        model: A model as the family's own class builds it; the default dtype and device are those wanted.

    Returns:
        Whether a layer was changed.
    """
    config, decoder = model.config, getattr(model, model.base_model_prefix, model)
    width, layers = getattr(config, "sliced_hidden_size", None), decoder.layers
    layer_class: Any = type(layers[0])
    if width is not None:
        whole = decoder.embed_tokens
        decoder.embed_tokens = type(whole)(whole.num_embeddings, width, whole.padding_idx)
        layer_class = functools.partial(_sliced(layer_class), hidden_size=config.hidden_size)
    biased = bool(getattr(config, "output_biases", False))
    own_sizes = width is not None or getattr(config, "per_layer_config", None) is not None
    replaced = biased
    for index, built in enumerate(layers if own_sizes else ()):
        view = layer_config(config, index)
        with torch.device("meta"):  # shapes alone
            wanted = layer_class(view, index)
        if _shapes(wanted) == _shapes(built):
            continue
        layer = layer_class(view, index).train(built.training)
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
