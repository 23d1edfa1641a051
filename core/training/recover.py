"""Recovery training of one phase: AdamW on packed sequences, float32 master weights under autocast."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from core.errors import TrainingError
from core.progress import Progress
from core.settings.training import TrainingSettings
from core.training.objective import Teacher, accumulate_gradients
from core.training.state import TrainingProgress, TrainingState, restore_state
from core.training.wsd import wsd_learning_rate

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """The outcome of a phase's training.

    Attributes:
        losses: (global step, loss in nats per trained token, learning rate) of each optimizer step; the loss
            is what is minimized, with a teacher's share in it.
        tokens: Tokens that passed through the model.
        trained_tokens: Those that counted in the loss (prompts do not).
        tokens_per_s: Rate over the whole phase, all attempts included.
    """

    losses: tuple[tuple[int, float, float], ...]
    tokens: int
    trained_tokens: int
    tokens_per_s: float


def recover(
    model: PreTrainedModel,
    input_ids: Tensor,
    trained: Tensor,
    settings: TrainingSettings,
    *,
    starts: Tensor | None = None,
    teacher: Teacher | None = None,
    first_step: int,
    total_steps: int,
    resume_from: TrainingState | None = None,
    save: Callable[[Optimizer, TrainingProgress], None] | None = None,
) -> TrainingReport:
    """Train a pruned model on the phase's slice, in place.

    Args:
        model: Float32 weights, on the device to train on.
        input_ids: (S, T) packed token ids; S is a multiple of ``settings.global_batch``.
        trained: (S, T), 1 where a token counts in the loss, 0 on prompts.
        settings: Batch, learning rate and precision.
        starts: (S, T), nonzero where a document begins, which sees nothing before it. None for one document
            a row.
        teacher: What the model also learns from.
        first_step: Global step at which this phase starts.
        total_steps: Steps of all phases together.
        resume_from: State of an earlier attempt, which fits the model: training continues as if it had never
            stopped.
        save: Called between steps; decides by itself whether to write the state.

    Returns:
        Losses and rates.

    Raises:
        TrainingError: If the loss or the gradient norm is not finite. That step changes nothing.
    """
    assert settings.precision != "auto", "settled before the run"
    steps = len(input_ids) // settings.global_batch
    model.train().requires_grad_(True)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    done = TrainingProgress()
    if resume_from is not None:
        done = restore_state(resume_from, model, optimizer)
        log.info("resumed at step %d of %d", first_step + len(done.losses), total_steps)
    losses, trained_tokens = list(done.losses), done.trained_tokens
    batch_tokens = settings.global_batch * input_ids.shape[1]
    tokens, started = steps * batch_tokens, time.monotonic() - done.seconds
    with Progress("training", tokens, "tokens", done=len(losses) * batch_tokens) as progress:
        while len(losses) < steps:
            step = first_step + len(losses)
            rate = _set_learning_rate(optimizer, step, total_steps, settings)
            rows = slice(len(losses) * settings.global_batch, (len(losses) + 1) * settings.global_batch)
            positions = None if starts is None else _positions(starts[rows])
            loss, counted = _accumulate(model, input_ids[rows], trained[rows], positions, settings, teacher)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm or math.inf)
            _check_finite(step, total_steps, loss, float(norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append((step, loss, rate))
            trained_tokens += counted
            progress.add(batch_tokens, f"step {step + 1} of {total_steps}, loss {loss:.3f}, lr {rate:.2g}")
            if save is not None and len(losses) < steps:
                seconds = time.monotonic() - started
                save(
                    optimizer,
                    TrainingProgress(losses=losses, trained_tokens=trained_tokens, seconds=seconds),
                )
    model.eval()
    return TrainingReport(
        losses=tuple(losses),
        tokens=tokens,
        trained_tokens=trained_tokens,
        tokens_per_s=tokens / max(time.monotonic() - started, 1e-9),
    )


def _check_finite(step: int, total_steps: int, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    found = f"the loss is {loss}" if not math.isfinite(loss) else f"the l2 norm of the gradients is {norm}"
    raise TrainingError(
        f"training has stopped at step {step + 1} of {total_steps}: {found}. Lower training.learning_rate, "
        "or set training.precision to float32, which makes it another run. Rerunning this one resumes from "
        "the last saved state."
    )


def _set_learning_rate(
    optimizer: Optimizer, step: int, total_steps: int, settings: TrainingSettings
) -> float:
    rate = wsd_learning_rate(
        step,
        total_steps,
        peak=settings.learning_rate,
        floor=settings.min_learning_rate,
        warmup_share=settings.warmup_share,
        decay_share=settings.decay_share,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _positions(starts: Tensor) -> Tensor:
    """Return (B, T) int64 positions that start again from 0 where ``starts`` is not 0."""
    index = torch.arange(starts.shape[1]).expand(starts.shape)
    return index - torch.where(starts != 0, index, 0).cummax(dim=1).values


def _accumulate(
    model: PreTrainedModel,
    input_ids: Tensor,
    trained: Tensor,
    positions: Tensor | None,
    settings: TrainingSettings,
    teacher: Teacher | None,
) -> tuple[float, int]:
    """Accumulate the gradients of one global batch; every trained token has the same weight.

    Returns:
        The mean loss over the batch's trained tokens, and their number.
    """
    counted = int(trained[:, 1:].sum())
    total = 0.0
    for first in range(0, len(input_ids), settings.micro_batch):
        rows = slice(first, first + settings.micro_batch)
        ids = input_ids[rows].to(model.device).long()
        places = None if positions is None else positions[rows].to(model.device)
        total += accumulate_gradients(
            model,
            ids,
            places,
            trained[rows].to(model.device),
            scale=1 / max(counted, 1),
            autocast=settings.precision == "bfloat16",
            teacher=teacher,
        )
    return total / max(counted, 1), counted
