"""Distillation right after a cut: in a few steps, a model learns to expect what the dense one expects."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from core.errors import TrainingError
from core.model.decoder import final_states
from core.model.loss import divergence_gradient, divergence_sum
from core.progress import Progress
from core.training.state import TrainingProgress, TrainingState, restore_state
from core.training.wsd import wsd_learning_rate

log = logging.getLogger(__name__)

_WARMUP_SHARE = 0.05
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class DistillationReport:
    """The outcome of a distillation.

    Attributes:
        divergences: Of each step, before its update: nats a token, mean over its batch.
        tokens: Tokens that passed through both models, repetitions counted.
        seconds: Time of all steps.
    """

    divergences: tuple[float, ...]
    tokens: int
    seconds: float


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: Tensor,
    *,
    steps: int,
    rate: float,
    batch: int,
    micro_batch: int,
    autocast: bool,
    seed: int,
    resume_from: TrainingState | None = None,
    save: Callable[[Optimizer, TrainingProgress], None] | None = None,
) -> DistillationReport:
    """Train a model, in place, on its divergence from another at every position (temperature 1).

    AdamW without weight decay; the learning rate warms up, then falls to 0 in a straight line.

    Args:
        student: Float32 weights; those that require a gradient are trained.
        teacher: A model of the same vocabulary on the same device.
        tokens: (S, T) token ids, S at least 1; each sequence comes once before any comes again.
        steps: Updates.
        rate: The largest learning rate.
        batch: Sequences an update.
        micro_batch: Sequences that pass through the models at once.
        autocast: Whether products are bfloat16.
        seed: Of the order of the sequences.
        resume_from: State of an earlier attempt, which fits the student; its losses are the divergences.
        save: Called between steps; decides by itself whether to write the state.

    Raises:
        TrainingError: If the divergence or the gradient norm is not finite.
    """
    trained = list(student.parameters())
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    done = TrainingProgress()
    if resume_from is not None:
        done = restore_state(resume_from, student, optimizer)
        log.info("the distillation resumed at step %d of %d", len(done.losses), steps)
    losses = list(done.losses)
    a_step, started = batch * tokens.shape[1], time.monotonic() - done.seconds
    batches = itertools.islice(enumerate(_batches(len(tokens), steps, batch, seed)), len(losses), None)
    with Progress("distillation", steps * a_step, "tokens", done=len(losses) * a_step) as progress:
        for step, rows in batches:
            for group in optimizer.param_groups:
                # The step after the last would be the first at 0.
                group["lr"] = wsd_learning_rate(
                    step,
                    steps + 1,
                    peak=rate,
                    floor=0.0,
                    warmup_share=_WARMUP_SHARE,
                    decay_share=1 - _WARMUP_SHARE,
                )
            found = 0.0
            for ids in tokens[rows].split(micro_batch):
                with torch.autocast(student.device.type, torch.bfloat16, enabled=autocast):
                    states, aims = _states(student, teacher, ids)
                    of_part, gradient = divergence_gradient(student, states, teacher, aims, scale=1 / a_step)
                states.backward(gradient)
                found += of_part / a_step
            norm = float(torch.nn.utils.clip_grad_norm_(trained, _MAX_GRAD_NORM))
            if not (math.isfinite(found) and math.isfinite(norm)):
                raise TrainingError(
                    f"distillation has stopped at step {step + 1} of {steps}: the divergence is {found}, the "
                    f"norm of its gradient {norm}. Lower prune.distill_rate (it is {rate:g}), or set "
                    "calibration.precision to float32; either makes it another run."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append((step, found, group["lr"]))
            progress.add(a_step, f"step {step + 1} of {steps}, divergence {found:.3f}")
            if save is not None and step + 1 < steps:
                save(optimizer, TrainingProgress(losses=losses, seconds=time.monotonic() - started))
    return DistillationReport(
        divergences=tuple(divergence for _, divergence, _ in losses),
        tokens=steps * a_step,
        seconds=time.monotonic() - started,
    )


@torch.no_grad()
def mean_divergence(
    student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, *, micro_batch: int, autocast: bool
) -> float:
    """Return how far a model is from another on (S, T) token ids, in nats a token."""
    total = 0.0
    for ids in tokens.split(micro_batch):
        with torch.autocast(student.device.type, torch.bfloat16, enabled=autocast):
            states, aims = _states(student, teacher, ids)
            total += divergence_sum(student, states, teacher, aims)
    return total / tokens.numel()


def _states(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (B, T, D) hidden states of both models; the teacher's without a graph."""
    ids = ids.to(student.device).long()
    with torch.no_grad():
        aims = final_states(teacher, ids)  # first: the student's activations stay
    return final_states(student, ids), aims


def _batches(sequences: int, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield the numbers of the sequences of each step: epochs, each in another order, one after another."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch / sequences)
    order = torch.cat([torch.randperm(sequences, generator=generator) for _ in range(epochs)])
    yield from order[: steps * batch].split(batch)
