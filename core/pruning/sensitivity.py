"""The growth of the loss when a single layer is pruned, for each layer (Figure 1 of the paper)."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from core.errors import CheckpointError, TargetError
from core.model.build import model_shape
from core.model.config import layer_shapes
from core.model.decoder import final_states
from core.model.families import Family, family_of
from core.model.layerwise import replaced
from core.model.loss import loss_sum
from core.model.shape import LayerShape, ModelShape
from core.progress import Progress
from core.pruning.attention import attention_cuts
from core.pruning.plan import LayerPlan, select_groups
from core.pruning.scoring.statistics import Statistics
from core.pruning.sparsity import Sizing, sizes_at
from core.pruning.widths.importance import ranks
from core.settings.prune import AttentionUnit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Part = Literal["both", "mlp", "attention"]
"""What is removed from a layer: MLP channels and attention groups, or one of them."""


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """The effect of pruning a single layer.

    Attributes:
        importance: 1 - similarity of the layer's input and output; larger changes its input more (eq. 4-5).
        removed: Share of the layer's parameters that is removed, in [0, 1).
        loss: Loss of the model with this layer pruned, nats per token.
        loss_increase: The same, minus the loss of the unpruned model.
    """

    importance: float
    removed: float
    loss: float
    loss_increase: float


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """A study of all layers.

    Attributes:
        loss: Loss of the unpruned model, nats per token.
        layers: One entry per layer.
    """

    loss: float
    layers: tuple[LayerSensitivity, ...]

    def rank_correlation(self) -> float | None:
        """Return Spearman's correlation of importance with loss increase; None where either is constant."""
        importance = ranks([layer.importance for layer in self.layers])
        increase = ranks([layer.loss_increase for layer in self.layers])
        correlation = float(torch.corrcoef(torch.stack([importance, increase]))[0, 1])
        return None if math.isnan(correlation) else correlation


def layer_sensitivity(
    model: "PreTrainedModel",
    tokens: Tensor,
    statistics: Statistics,
    *,
    sparsity: float,
    part: Part,
    attention_unit: AttentionUnit,
    batch_size: int,
) -> Sensitivity:
    """Prune each layer by itself, and measure the loss.

    Args:
        model: Left unchanged.
        tokens: (S, T) integer token ids of text that the statistics were not measured on.
        statistics: Measured on ``model``: the lowest-scoring groups are removed.
        sparsity: Share of a layer's MLP channels and attention units that is removed, in (0, 1), rounded to
            whole units; one of each stays.
        part: What is removed from the layers.
        attention_unit: The unit of attention that is removed.
        batch_size: Sequences per forward pass; the states between layers are held for one batch at a time.

    Raises:
        TargetError: If no layer would lose a whole group.
        CheckpointError: If a loss is not a number.
    """
    assert 0 < sparsity < 1, sparsity
    shape = model_shape(model.config)
    plans = plans_for_layers(statistics, shape, sparsity=sparsity, part=part, attention_unit=attention_unit)
    loss, losses = losses_with_layer_pruned(model, tokens, plans, batch_size=batch_size)
    log.info("loss %.4f; with one layer pruned %.4f to %.4f", loss, min(losses), max(losses))
    return Sensitivity(
        loss=loss,
        layers=tuple(
            LayerSensitivity(
                importance=1 - similarity,
                removed=1 - shape.layer_num_params(plan.shape()) / shape.layer_num_params(now),
                loss=pruned,
                loss_increase=pruned - loss,
            )
            for similarity, plan, now, pruned in zip(
                statistics.similarities.tolist(), plans, shape.layers, losses, strict=True
            )
        ),
    )


def plans_for_layers(
    statistics: Statistics, shape: ModelShape, *, sparsity: float, part: Part, attention_unit: AttentionUnit
) -> tuple[LayerPlan, ...]:
    """Return what each layer keeps at the given sparsity.

    Raises:
        TargetError: If every layer keeps everything.
    """
    unit: AttentionUnit = "none" if part == "mlp" else attention_unit
    cuts = attention_cuts(unit, shape, shape)
    sizes = sizes_at(Sizing(dense=shape, current=shape, cuts=cuts), [sparsity] * len(shape.layers))
    if part == "attention":
        sizes = tuple(
            replace(size, mlp_width=now.mlp_width) for size, now in zip(sizes, shape.layers, strict=True)
        )
    if sizes == shape.layers:
        raise TargetError(
            f"a sparsity of {sparsity:g} removes no whole group from any layer (part: {part}, attention "
            f"unit: {unit}, of layer 0: {shape.layers[0].kv_heads} KV heads, {shape.layers[0].query_heads} "
            f"query heads, {shape.layers[0].mlp_width} MLP channels). Raise it, or choose another part."
        )
    return tuple(
        select_groups(scores, now, after)
        for scores, now, after in zip(statistics.scores, shape.layers, sizes, strict=True)
    )


def losses_with_layer_pruned(
    model: "PreTrainedModel",
    tokens: Tensor,
    plans: Sequence[LayerPlan],
    *,
    batch_size: int,
) -> tuple[float, list[float]]:
    """Return a model's loss, and its loss with each single layer cut down to its plan, in nats per token.

    No smaller model is built: outputs of removed groups are zeroed before the projection that reads them,
    which equals removal. The layers below the pruned one do not run again.

    Args:
        model: Left unchanged.
        tokens: (S, T) integer token ids.
        plans: What each layer keeps.
        batch_size: Sequences per forward pass.

    Raises:
        CheckpointError: If a loss is not a number.
    """
    family, shapes = family_of(model.config), layer_shapes(model.config)
    layers = list(model.get_submodule(family.layers).children())
    dense, pruned = 0.0, [0.0] * len(layers)
    was_training = model.training
    model.eval()
    try:
        with (
            Progress("sensitivity", len(tokens) * len(layers), "sequences") as progress,
            torch.no_grad(),
        ):
            for batch in tokens.to(model.device, torch.long).split(batch_size):
                outputs: list[Any] = []
                with recorded(layers, outputs):
                    dense += loss_sum(model, final_states(model, batch), batch)
                for index, (shape, plan) in enumerate(zip(shapes, plans, strict=True)):
                    below = outputs[index - 1] if index else None
                    skipped = [lambda *_, below=below, **__: below] * index
                    with (
                        replaced(layers[:index], skipped),
                        silenced(family, shape, layers[index], plan),
                    ):
                        pruned[index] += loss_sum(model, final_states(model, batch), batch)
                    progress.add(len(batch))
    finally:
        model.train(was_training)
    predictions = tokens.shape[0] * (tokens.shape[1] - 1)
    found = [total / predictions for total in (dense, *pruned)]
    if any(map(math.isnan, found)):
        raise CheckpointError(
            "the loss is not a number, as the model's logits are not. Check the checkpoint."
        )
    return found[0], found[1:]


@contextlib.contextmanager
def recorded(layers: Sequence[torch.nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Append what each layer returns to ``outputs``."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def silenced(family: Family, shape: LayerShape, layer: torch.nn.Module, plan: LayerPlan) -> Iterator[None]:
    """Zero the outputs of the groups that ``plan`` drops where a projection of the layer reads them."""
    kept = {"query": plan.query_heads, "kv": plan.kv_heads, "mlp": plan.mlp_channels}
    with contextlib.ExitStack() as stack:
        for name, slicing in family.slicings.items():
            if slicing.axis != 1:
                continue  # produces groups; values that are not read may be anything
            projection = layer.get_submodule(name.removesuffix(".weight"))
            weight = projection.weight
            assert isinstance(weight, Tensor), name
            gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
            for kind, unit_rows in slicing.unit_rows(shape, weight.shape[1]):
                gone[unit_rows[list(kept[kind])].flatten().to(weight.device)] = False

            def silence(_: Any, inputs: tuple[Tensor], gone: Tensor = gone) -> Tensor:
                return inputs[0].masked_fill(gone, 0)

            stack.callback(projection.register_forward_pre_hook(silence).remove)
        yield
