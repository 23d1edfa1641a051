"""Zero-padding of unequal layers to a plain checkpoint of the family, which any tool loads."""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import ExportError
from core.export.exported import Exported, put_when_complete, refuse_sliced_export
from core.model.build import model_shape
from core.model.checkpoint import Checkpoint
from core.model.config import config_with_layers, layer_shapes
from core.model.families import Family, Kind, family_of
from core.model.shape import LayerShape, ModelShape

log = logging.getLogger(__name__)

_NOWHERE = -1
"""Source of a slot of zeros."""


def export_padded(checkpoint: Path, output: Path) -> Exported:
    """Write a checkpoint of unequal layers as one of equal layers, each padded with zeros.

    All layers get the largest MLP width, and head counts that hold those of every layer. Padding is zero on
    both sides: channels without activation, query heads that no column of o_proj reads. In exact arithmetic
    the logits are the same; in floating point a kernel may add the terms of a longer sum in another order, so
    logits agree to the rounding of the number format. Weights are copied bit by bit. Where the checkpoint has
    output biases, all projections get a bias, the others of zeros.
    """
    opened = Checkpoint(checkpoint)
    shapes, sizes = opened.layers, model_shape(opened.config)
    plain = _plain_config(_with_biases(opened.config), sizes)
    uniform = layer_shapes(plain)[0]

    def pad(index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        log.debug("layer %d of %d: %s", index + 1, len(shapes), shapes[index])
        if getattr(opened.config, "output_biases", False):
            tensors = _biases(opened.family, tensors) | tensors
        return pad_layer(opened.family, shapes[index], tensors, uniform)

    padded_from = {"padded_from": [shape.to_dict() for shape in shapes]}
    with put_when_complete(output) as partial:
        opened.rewrite(partial, plain, change=pad, provenance=opened.provenance | padded_from)
    params = model_shape(plain).num_params()
    return Exported(path=output, params=params, notes=_notes(sizes, uniform, params))


def pad_layer(
    family: Family, layer: LayerShape, tensors: Mapping[str, Tensor], uniform: LayerShape
) -> dict[str, Tensor]:
    """Pad a decoder layer's tensors, by their names within it, with zeros to the sizes of a larger layer.

    A query head reads the KV head of its group, so heads move to the place of their group in the larger
    layer. If a group is larger than those of the larger layer, its KV head is copied.
    """
    sources = _sources(layer, uniform)
    padded = {}
    for name, tensor in tensors.items():
        slicing = family.slicings.get(name)
        if slicing is not None:
            axis, length = slicing.axis, tensor.shape[slicing.axis]
            # A row of zeros behind the last one serves slots without a source.
            rows = [
                torch.cat([unit_rows, torch.full_like(unit_rows[:1], length)])[sources[kind]].flatten()
                for kind, unit_rows in slicing.unit_rows(layer, length)
            ]
            zero = torch.zeros_like(tensor.narrow(axis, 0, 1))
            tensor = torch.cat([tensor, zero], axis).index_select(axis, torch.cat(rows))
        padded[name] = tensor
    return padded


def _sources(layer: LayerShape, uniform: LayerShape) -> dict[Kind, Tensor]:
    """Return the group of ``layer`` for each slot of ``uniform``, (units,) int64."""
    query = torch.full((uniform.query_heads,), _NOWHERE)
    kv = torch.full((uniform.kv_heads,), _NOWHERE)
    mlp = torch.full((uniform.mlp_width,), _NOWHERE)
    mlp[: layer.mlp_width] = torch.arange(layer.mlp_width)
    per_slot, copies = uniform.heads_per_group, _copies(layer, uniform.heads_per_group)
    for head in range(layer.query_heads):
        group, place = divmod(head, layer.heads_per_group)
        slot = group * copies + place // per_slot
        kv[slot] = group
        query[slot * per_slot + place % per_slot] = head
    return {"query": query, "kv": kv, "mlp": mlp}


def _copies(layer: LayerShape, per_slot: int) -> int:
    """Return how many copies of a KV head there must be if at most ``per_slot`` query heads read each."""
    return -(-layer.heads_per_group // per_slot)


def pads_biases(config: Any) -> bool:
    """Return whether a plain config of the family describes the biases that a checkpoint has."""
    return not getattr(config, "output_biases", False) or hasattr(config, "mlp_bias")


def _with_biases(config: Any) -> Any:
    """Return the config with the family's own entries instead of ours for output biases."""
    if not getattr(config, "output_biases", False):
        return config
    if not pads_biases(config):
        raise ExportError(
            f"{config.model_type} has no biases in o_proj and down_proj, but this checkpoint has "
            "(output_biases): no plain checkpoint holds them. Export another format."
        )
    config = copy.deepcopy(config)
    del config.output_biases
    config.attention_bias = config.mlp_bias = True
    return config


def _biases(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a bias of zeros for each projection of a layer."""
    weights = [name for name in family.slicings if name.endswith("_proj.weight")]
    return {
        name.removesuffix("weight") + "bias": tensors[name].new_zeros(len(tensors[name])) for name in weights
    }


def _plain_config(config: Any, sizes: ModelShape) -> Any:
    """Return the config of equal layers, of the smallest sizes that hold every layer and that are valid."""
    refuse_sliced_export(config, "a padded checkpoint")
    family = family_of(config)
    heads = {(layer.query_heads, layer.kv_heads) for layer in sizes.layers}
    if len(heads) > 1 and not family.prunes_heads:
        raise ExportError(
            f"layers of {family.model_type} with different head counts cannot be padded: it normalises "
            "queries and keys over all heads at once, and zeros would change the mean. Export another format."
        )
    for uniform in _candidates(sizes, config.hidden_size):
        plain = config_with_layers(config, (uniform,) * len(sizes.layers))
        if not plain.is_heterogeneous:
            return plain
    raise ExportError(
        f"no head counts hold those of all layers ({sorted(heads)}) and suit {family.model_type} at hidden "
        f"size {config.hidden_size}. Export another format."
    )


def _candidates(sizes: ModelShape, hidden_size: int) -> list[LayerShape]:
    """Return sizes that hold every layer, by parameters, then by KV heads.

    Layers may differ in how many query heads share a KV head. For each such number n the KV heads follow: a
    group of more than n query heads takes several copies of its KV head.
    """
    width = max(layer.mlp_width for layer in sizes.layers)
    most = max(hidden_size, *(layer.query_heads for layer in sizes.layers))
    found = []
    for per_slot in range(1, most + 1):
        least = max(layer.kv_heads * _copies(layer, per_slot) for layer in sizes.layers)
        found += [
            LayerShape(query_heads=kv_heads * per_slot, kv_heads=kv_heads, mlp_width=width)
            for kv_heads in range(least, most // per_slot + 1)
        ]
    return sorted(found, key=lambda layer: (sizes.attention_params(layer), layer.kv_heads))


def _notes(sizes: ModelShape, uniform: LayerShape, params: int) -> tuple[str, ...]:
    before = sizes.num_params()
    if all(layer == uniform for layer in sizes.layers):
        return ("All layers are of the same size: nothing was added.",)
    cost = (
        f"Padded with zeros from {before:,} to {params:,} parameters ({params / before:.2f}x). Each layer "
        f"is as large and slow as the widest: {uniform.query_heads} query heads, {uniform.kv_heads} KV "
        f"heads, MLP width {uniform.mlp_width:,}."
    )
    if all(layer.kv_heads == uniform.kv_heads for layer in sizes.layers):
        return (cost,)
    kv_heads = sum(layer.kv_heads for layer in sizes.layers)
    ratio = uniform.kv_heads * len(sizes.layers) / kv_heads
    return (cost, f"The KV cache grows with the KV heads, {ratio:.2f}x.")
