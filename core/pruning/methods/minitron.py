"""Minitron's depth (Muralidharan et al., arXiv 2407.14679): adjacent layers go, by the measured loss.

Every block of as many layers as go is left out of the model in turn; the one without which the loss on
calibration text is lowest goes. Channels take up the rest of the size, as under ShortGPT.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.errors import CheckpointError
from core.model.layerwise import frozen, replaced
from core.model.loss import final_states, loss_sum
from core.model.shape import ModelShape
from core.progress import Progress
from core.pruning.methods.opened import OpenedModel
from core.pruning.methods.shortgpt import least_params, step_without
from core.pruning.planning import DecideStep, Step, StepRequest
from core.pruning.sensitivity import recorded
from core.pruning.widths.search import measured_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from core.model.layerwise import LayerwiseModel

log = logging.getLogger(__name__)


def depth_decision(opened: OpenedModel) -> DecideStep:
    """Return what decides a step by the loss of an opened model without each of its blocks of layers."""

    def plan_step(given: StepRequest) -> Step:
        count = layers_to_go(given.current, least_params(given))
        gone = range(0)
        if count:
            losses = losses_without(
                opened.model, measured_tokens(opened.tokens), count, batch_size=opened.micro_batch
            )
            first = min(range(len(losses)), key=losses.__getitem__)
            gone = range(first, first + count)
            log.info("layers %d to %d go: a loss of %.3f without them", first, gone[-1], losses[first])
        return step_without(given, frozenset(gone))

    return plan_step


def layers_to_go(shape: ModelShape, least_params: float) -> int:
    """Return how many layers next to each other may go, wherever they are, for ``least_params`` to stay."""
    sizes, count = [shape.layer_num_params(layer) for layer in shape.layers], 0
    while count + 1 < len(sizes):
        largest = max(sum(sizes[first : first + count + 1]) for first in range(len(sizes) - count))
        if shape.num_params() - largest < least_params:
            break
        count += 1
    return count


def losses_without(
    model: "LayerwiseModel", tokens: Tensor, count: int, *, batch_size: int
) -> Sequence[float]:
    """Return a model's next-token loss without ``count`` layers, by the number of the first of them.

    Args:
        model: Held in memory as a whole; left unchanged.
        tokens: (S, T) integer token ids.
        count: At least 1, and fewer than there are.
        batch_size: Sequences per forward pass; the states of all layers are held for one batch.
    """
    whole, layers = model.model, model.layers
    batches = tokens.to(whole.device, torch.long).split(batch_size)
    totals = [0.0] * (len(layers) - count + 1)
    progress = Progress("depth", len(batches) * len(totals), "measurements")
    with progress, frozen(whole), torch.no_grad():
        for batch in batches:
            outputs: list[Any] = []
            with recorded(layers, outputs):
                final_states(whole, batch)
            for first in range(len(totals)):
                totals[first] += _loss_without(whole, layers, first, count, outputs, batch)
                progress.add()
    predictions = tokens.shape[0] * (tokens.shape[1] - 1)
    losses = [total / predictions for total in totals]
    if not all(map(torch.isfinite, torch.tensor(losses))):
        raise CheckpointError(
            "the loss without some layers is not finite. Check the checkpoint; else set "
            "calibration.precision to float32."
        )
    return losses


def _loss_without(
    model: "PreTrainedModel",
    layers: Sequence[torch.nn.Module],
    first: int,
    count: int,
    outputs: Sequence[Any],
    batch: Tensor,
) -> float:
    """Return the summed loss without a block; the layers below it have run: ``outputs`` are theirs."""

    def skip(state: Tensor, **_: Any) -> Any:
        return outputs[first - 1] if first else state

    with replaced(layers[: first + count], [skip] * (first + count)):
        return loss_sum(model, final_states(model, batch), batch)
