"""Where each model family keeps what pruning removes: one table drives scores, sizes and surgery."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from core.errors import UnsupportedModelError
from core.model.shape import LayerShape

Kind = Literal["query", "kv", "mlp"]
"""What one slice of a weight belongs to: a query head, a KV head, or an MLP channel."""


@dataclass(frozen=True)
class Slicing:
    """How the groups of a layer lie in one of its weights.

    Attributes:
        axis: The dimension along which groups lie (0 for a projection that makes them, 1 for one that reads
            them).
        kinds: Kinds of the blocks along the axis; more than one where projections are fused.
    """

    axis: int
    kinds: tuple[Kind, ...]

    def unit_rows(self, layer: LayerShape, length: int) -> list[tuple[Kind, Tensor]]:
        """Return which rows along ``axis`` each unit takes.

        Args:
            layer: Sizes of the layer.
            length: Size of the weight along ``axis``: A rows a head, one row a channel.

        Returns:
            For each block its kind and a (units, rows a unit) int64 tensor of row numbers.
        """
        units = {"query": layer.query_heads, "kv": layer.kv_heads, "mlp": layer.mlp_width}
        rows = length // sum(units[kind] for kind in self.kinds)
        blocks = torch.arange(length).split([units[kind] * rows for kind in self.kinds])
        return [(kind, block.view(-1, rows)) for kind, block in zip(self.kinds, blocks, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Family:
    """The layout of one model family.

    Attributes:
        model_type: ``model_type`` of its config.
        layers: Name of the list of decoder layers in the state dict.
        slicings: Weight or bias name within a layer to how groups lie in it; all other parameters stay whole.
    """

    model_type: str
    layers: str
    slicings: dict[str, Slicing]


def _projections(**kinds: tuple[int, Kind]) -> dict[str, Slicing]:
    """Expand ``block__projection=(axis, kind)`` to its weight and, where outputs are cut, its bias."""
    slicings = {}
    for name, (axis, kind) in kinds.items():
        path = name.replace("__", ".")
        slicings[f"{path}.weight"] = Slicing(axis, (kind,))
        if axis == 0:
            slicings[f"{path}.bias"] = Slicing(axis, (kind,))
    return slicings


_LLAMA = _projections(
    self_attn__q_proj=(0, "query"),
    self_attn__k_proj=(0, "kv"),
    self_attn__v_proj=(0, "kv"),
    self_attn__o_proj=(1, "query"),
    mlp__gate_proj=(0, "mlp"),
    mlp__up_proj=(0, "mlp"),
    mlp__down_proj=(1, "mlp"),
)

FAMILIES = {
    model_type: Family(model_type=model_type, layers="model.layers", slicings=_LLAMA)
    for model_type in ("llama", "qwen2")
}


def family_of(config: Any) -> Family:
    """Return the family of a transformers config.

    Raises:
        UnsupportedModelError: If the family is not supported, with the list of those that are.
    """
    model_type = getattr(config, "model_type", "unknown")
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model family {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}. "
            "Choose a base model of one of these."
        )
    return FAMILIES[model_type]
