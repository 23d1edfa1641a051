"""Physical removal of groups: from a layer's tensors, a model in memory, a checkpoint on disk."""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.model.build import build_model, config_with_layers, layer_shapes, load_config, load_model
from core.model.checkpoint import CheckpointReader, write_checkpoint
from core.model.families import Family, Kind, family_of
from core.model.layerwise import LayerwiseModel, open_streamed
from core.model.shape import LayerShape
from core.pruning.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def prune_layer(
    family: Family, layer: LayerShape, tensors: Mapping[str, Tensor], plan: LayerPlan
) -> dict[str, Tensor]:
    """Cut a decoder layer's tensors down to the groups that stay.

    Args:
        family: Says how groups lie in the tensors.
        layer: Present sizes of the layer.
        tensors: Name within the layer to weight, bias or anything else that an optimizer keeps in its shape.
        plan: What stays.

    Returns:
        The same names; tensors of no group are passed on as they are.
    """
    kept: dict[Kind, Tensor] = {
        "query": torch.tensor(plan.query_heads),
        "kv": torch.tensor(plan.kv_heads),
        "mlp": torch.tensor(plan.mlp_channels),
    }
    pruned = {}
    for name, tensor in tensors.items():
        slicing = family.slicings.get(name)
        if slicing is not None:
            blocks = slicing.unit_rows(layer, tensor.shape[slicing.axis])
            rows = torch.cat([unit_rows[kept[kind]].flatten() for kind, unit_rows in blocks])
            tensor = tensor.index_select(slicing.axis, rows.to(tensor.device))
        pruned[name] = tensor
    return pruned


def prune_model(model: "PreTrainedModel", layers: tuple[LayerPlan, ...]) -> "PreTrainedModel":
    """Return a smaller model that shares all uncut tensors with ``model``."""
    from transformers.initialization import no_init_weights

    family = family_of(model.config)
    shapes = layer_shapes(model.config)
    state = dict(model.state_dict())
    for index, (shape, plan) in enumerate(zip(shapes, layers, strict=True)):
        prefix = f"{family.layers}.{index}."
        tensors = {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
        state |= {prefix + name: t for name, t in prune_layer(family, shape, tensors, plan).items()}
    config = config_with_layers(model.config, [plan.shape() for plan in layers])
    with no_init_weights():
        smaller = build_model(config, dtype=model.dtype)
    smaller.load_state_dict(state, assign=True)
    smaller.tie_weights()
    return torch.nn.Module.to(smaller, model.device).eval()


def open_pruned(
    directory: Path,
    layers: tuple[LayerPlan, ...] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device,
    streamed: bool = False,
) -> LayerwiseModel:
    """Open what a plan leaves of a checkpoint, to measure it.

    Args:
        directory: Checkpoint directory.
        layers: What each layer keeps; None for all.
        dtype: Number format to load into; None keeps the stored one.
        device: Where weights go.
        streamed: Whether each layer is read and cut while it is used, instead of all of them now.
    """
    if not streamed:
        model = load_model(directory, dtype=dtype, device=device)
        return LayerwiseModel(model if layers is None else prune_model(model, layers))
    if layers is None:
        return open_streamed(directory, dtype=dtype, device=device)
    config = load_config(directory)
    family, shapes = family_of(config), layer_shapes(config)
    return open_streamed(
        directory,
        dtype=dtype,
        device=device,
        sizes=[plan.shape() for plan in layers],
        cut=lambda i, tensors: prune_layer(family, shapes[i], tensors, layers[i]),
    )


def prune_checkpoint(
    source: Path,
    target: Path,
    plan: Plan,
    *,
    digest: str,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any],
    repair: Callable[[int, LayerPlan], Mapping[str, Tensor]] | None = None,
) -> None:
    """Write the checkpoint that ``plan`` leaves of another, a layer at a time; the model is never held whole.

    Args:
        source: Checkpoint directory.
        target: Directory of the smaller checkpoint.
        plan: What stays.
        digest: Digest of the source's manifest.
        dtype: Number format to write; None keeps that of the source's weights.
        provenance: Written along with the checkpoint.
        repair: Called for each layer in turn, returns what is added to its tensors once they are cut.

    Raises:
        PlanError: If the plan was made for another checkpoint.
        CheckpointError: If the source is incomplete or corrupt.
    """
    config = load_config(source)
    family = family_of(config)
    shapes = layer_shapes(config)
    plan.check(digest, shapes)
    smaller = config_with_layers(config, plan.after)

    def parts(reader: CheckpointReader) -> Iterator[dict[str, Tensor]]:
        for index, shape in enumerate(shapes):
            prefix = f"{family.layers}.{index}"
            tensors = prune_layer(family, shape, reader.layer(prefix), plan.layers[index])
            changes = repair(index, plan.layers[index]) if repair else {}
            log.debug("layer %d of %d: %s", index + 1, len(shapes), plan.after[index])
            yield {
                f"{prefix}.{name}": (tensor + changes.get(name, 0)).to(dtype or tensor.dtype)
                for name, tensor in tensors.items()
            }
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        yield {
            name: (tensor := reader.tensor(name)).to(dtype or tensor.dtype)
            for name in reader.names()
            if not name.startswith(f"{family.layers}.") and name not in tied
        }

    with CheckpointReader(source) as reader:
        smaller.dtype = dtype or reader.dtype()
        write_checkpoint(
            target, smaller, parts(reader), len(shapes) + 1, companions=source, provenance=provenance
        )
