"""Physical removal of groups from a layer's tensors, a model in memory, or a checkpoint on disk."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.model.build import build_model, load_model
from core.model.checkpoint import Checkpoint
from core.model.config import config_with_layers, layer_shapes, with_output_biases
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
        family: Defines how groups lie in the tensors.
        layer: Present sizes of the layer.
        tensors: Name within the layer to weight or bias.
        plan: What stays.

    Returns:
        The same names; tensors outside all groups are unchanged.
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


def output_biases(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros for the biases that a decoder layer's projections back to the hidden size lack."""
    weights = [name for name, slicing in family.slicings.items() if slicing.axis == 1]
    biases = {name.removesuffix("weight") + "bias": tensors[name] for name in weights}
    return {name: weight.new_zeros(len(weight)) for name, weight in biases.items() if name not in tensors}


def prune_tensors(
    family: Family,
    shapes: Sequence[LayerShape],
    layers: Sequence[LayerPlan],
    names: Collection[str],
    take: Callable[[str], Tensor],
    *,
    biased: bool = False,
) -> Iterator[tuple[str, str, Tensor]]:
    """Cut tensors that lie as a model's parameters do, one decoder layer at a time.

    Args:
        family: Of the model.
        shapes: Present sizes of each layer.
        layers: What stays.
        names: Of parameters, in any order; those that are missing stay missing.
        take: Returns the tensor of a name; called once for each that stays.
        biased: As in ``prune_model``.

    Yields:
        Name afterwards, name before ("" for a new bias), and what is left of the tensor.
    """
    inside = set()
    place = 0
    for index, (shape, plan) in enumerate(zip(shapes, layers, strict=True)):
        prefix, after = f"{family.layers}.{index}.", f"{family.layers}.{place}."
        own = [name for name in names if name.startswith(prefix)]
        inside.update(own)
        if not plan.stays:
            continue
        tensors = {name.removeprefix(prefix): take(name) for name in own}
        added = output_biases(family, tensors) if biased else {}
        for name, tensor in prune_layer(family, shape, tensors | added, plan).items():
            yield after + name, "" if name in added else prefix + name, tensor
        place += 1
    yield from ((name, name, take(name)) for name in names if name not in inside)


def prune_model(
    model: "PreTrainedModel", layers: tuple[LayerPlan, ...], *, biased: bool = False
) -> "PreTrainedModel":
    """Return a smaller model that shares all uncut tensors with ``model``.

    ``biased`` gives each projection back to the hidden size a bias, which is 0 where it had none.
    """
    from transformers.initialization import no_init_weights

    family = family_of(model.config)
    shapes = layer_shapes(model.config)
    whole = model.state_dict()
    left = prune_tensors(family, shapes, layers, whole, whole.__getitem__, biased=biased)
    state = {name: tensor for name, _, tensor in left}
    config = config_after(model.config, layers)
    if biased:
        config = with_output_biases(config)
    with no_init_weights():
        smaller = build_model(config, dtype=model.dtype)
    smaller.load_state_dict(state, assign=True)
    smaller.tie_weights()
    return torch.nn.Module.to(smaller, model.device).eval()


def open_pruned(
    checkpoint: Checkpoint,
    layers: tuple[LayerPlan, ...] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device,
    streamed: bool = False,
) -> LayerwiseModel:
    """Open what ``layers`` leave of a checkpoint (None: all of it), to measure it.

    ``streamed`` reads and cuts each layer while it is used, instead of all of them now. ``dtype`` None keeps
    the stored number format.
    """
    if not streamed:
        model = load_model(checkpoint, dtype=dtype, device=device)
        return LayerwiseModel(model if layers is None else prune_model(model, layers))
    if layers is None:
        return open_streamed(checkpoint, dtype=dtype, device=device)
    assert all(plan.stays for plan in layers), "what removes layers takes one step: nothing is measured after"
    return open_streamed(
        checkpoint,
        dtype=dtype,
        device=device,
        sizes=[plan.shape() for plan in layers],
        cut=lambda i, tensors: prune_layer(checkpoint.family, checkpoint.layers[i], tensors, layers[i]),
    )


def config_after(config: Any, layers: Sequence[LayerPlan]) -> Any:
    """Return the config of what ``layers`` leave of the model that ``config`` describes."""
    stay = [index for index, plan in enumerate(layers) if plan.stays]
    return config_with_layers(config, [layers[index].shape() for index in stay], stay)


def prune_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    plan: Plan,
    *,
    digest: str,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any],
    repair: Callable[[int, LayerPlan], Mapping[str, Tensor]] | None = None,
    biased: bool = False,
) -> None:
    """Write the checkpoint that ``plan`` leaves of another, a layer at a time; the model is never held whole.

    ``digest`` is that of the checkpoint's manifest; ``dtype`` None keeps the stored number format. ``repair``
    is called for each layer in turn and returns what is added to its tensors once they are cut. ``biased`` is
    as in ``prune_model``.

    Raises:
        PlanError: If the plan was made for another checkpoint.
        CheckpointError: If the checkpoint is incomplete or corrupt.
    """
    shapes = checkpoint.layers
    plan.check(digest, shapes)
    smaller = config_after(checkpoint.config, plan.layers)
    if biased:
        smaller = with_output_biases(smaller)
    smaller.dtype = dtype or checkpoint.dtype

    def cut(index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        log.debug("layer %d of %d: %s", index + 1, len(shapes), plan.layers[index].shape())
        if biased:
            tensors = tensors | output_biases(checkpoint.family, tensors)
        left = prune_layer(checkpoint.family, shapes[index], tensors, plan.layers[index])
        changes = repair(index, plan.layers[index]) if repair else {}
        # Rounded once, to the format that is written.
        return left | {name: (left[name] + t).to(dtype or left[name].dtype) for name, t in changes.items()}

    checkpoint.rewrite(
        target,
        smaller,
        change=cut,
        layers=[index for index, layer in enumerate(plan.layers) if layer.stays],
        dtype=dtype,
        provenance=provenance,
    )
