"""Masks of a model's groups, layers and embedding channels: while it is trained, and put into its weights."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from core.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Masks = Mapping[tuple[int, str], Tensor]
"""A value for each group, by the number of the layer and the projection that reads its outputs."""
HIDDEN = (-1, "hidden")
"""The key of the values of embedding channels."""
LAYERS = (-1, "layers")
"""The key of the values of layers."""


@torch.no_grad()
def put_into_weights(model: "PreTrainedModel", masks: Masks) -> None:
    """Multiply a model's weights by masks; norms' means stay over all embedding channels."""
    for key, columns in _columns(model, masks).items():
        _projection(model, *key).weight.mul_(columns)
    if (layers := masks.get(LAYERS)) is not None:
        # Gemma's norms multiply by 1 more than their weight.
        more = float(model.config.model_type.startswith("gemma"))
        for mask, ends in zip(layers, _ends(model), strict=True):
            for parameter in (parameter for end in ends for parameter in end.parameters()):
                parameter.add_(more).mul_(mask).sub_(more)
    if (channels := masks.get(HIDDEN)) is None:
        return
    embedding = model.get_input_embeddings().get_parameter("weight")
    embedding.mul_(channels)
    if model.get_output_embeddings().get_parameter("weight") is embedding:
        # The head has been multiplied, too; what is 0 before the norm stays 0.
        _norms(model)[-1].get_parameter("weight").div_(torch.where(channels > 0, channels, 1.0))
    for index in range(model.config.num_hidden_layers):
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            projection = _projection(model, index, path)
            projection.weight.mul_(channels[:, None])
            if projection.bias is not None:
                projection.bias.mul_(channels)


@contextlib.contextmanager
def masked(model: "PreTrainedModel", masks: Masks, *, hidden_size: int = 0) -> Iterator[None]:
    """Multiply what groups, layers and embedding channels give by their masks within the block.

    The means of norms are over ``hidden_size`` channels; 0 stands for those whose masks are not 0.
    """

    def multiply(columns: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda _, given: (given[0] * columns.to(given[0].dtype),)

    hooks = [
        _projection(model, *key).register_forward_pre_hook(multiply(columns))
        for key, columns in _columns(model, masks).items()
    ]
    if (layers := masks.get(LAYERS)) is not None:
        for mask, ends in zip(layers.unbind(), _ends(model), strict=True):
            hooks += [
                end.register_forward_hook(lambda _, __, output, mask=mask: output * mask.to(output.dtype))
                for end in ends
            ]
    if (channels := masks.get(HIDDEN)) is not None:
        left = hidden_size or max(1, int((channels > 0).sum()))
        scale = math.sqrt(len(channels) / left)
        for norm in _norms(model):
            hooks.append(norm.register_forward_pre_hook(multiply(channels * scale)))
            hooks.append(norm.register_forward_hook(lambda _, __, output: output / scale))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _columns(model: "PreTrainedModel", masks: Masks) -> dict[tuple[int, str], Tensor]:
    """Return the mask of each input of the projections."""
    return {
        key: mask.repeat_interleave(_projection(model, *key).in_features // len(mask))
        for key, mask in masks.items()
        if key not in (HIDDEN, LAYERS)
    }


def _ends(model: "PreTrainedModel") -> list[list[nn.Module]]:
    """Return for each layer the modules whose outputs go into the residual sum: its projections, or norms."""
    family = family_of(model.config)
    paths = ("post_attention_layernorm", "post_feedforward_layernorm")
    if family.ends_in_sum:
        paths = ("self_attn.o_proj", "mlp.down_proj")
    layers = model.get_submodule(family.layers).children()
    return [[layer.get_submodule(path) for path in paths] for layer in layers]


def _norms(model: "PreTrainedModel") -> list[nn.Module]:
    """Return the norms that read the signal; that before the head comes last."""
    layers = model.get_submodule(family_of(model.config).layers).children()
    names = ("input_layernorm", "post_attention_layernorm")
    return [
        *(layer.get_submodule(name) for layer in layers for name in names),
        model.get_decoder().get_submodule("norm"),
    ]


def _projection(model: "PreTrainedModel", index: int, path: str) -> nn.Linear:
    linear = model.get_submodule(f"{family_of(model.config).layers}.{index}.{path}")
    assert isinstance(linear, nn.Linear), "what reads groups is a linear map"
    return linear
