"""Recovery training of one phase: AdamW on packed sequences, float32 master weights under autocast."""

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
from core.model.loss import final_states, loss_gradient
from core.settings.training import TrainingSettings
from core.training.state import Progress, TrainingState, restore_state
from core.training.wsd import wsd_learning_rate

log = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What a phase's training has done.

    Attributes:
        losses: (global step, loss in nats a trained token, learning rate) of each optimizer step.
        tokens: Tokens that passed through the model.
        trained_tokens: Tokens among them that counted in the loss (prompts do not).
        tokens_per_s: Rate over the whole phase, all attempts together.
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
    first_step: int,
    total_steps: int,
    resume_from: TrainingState | None = None,
    save: Callable[[Optimizer, Progress], None] | None = None,
) -> TrainingReport:
    """Train a pruned model on its phase's slice, in place.

    Args:
        model: Float32 weights, on the device to train on.
        input_ids: (S, T) packed token ids; S is a multiple of ``settings.global_batch``.
        trained: (S, T), 1 where a token counts in the loss, 0 on prompts.
        settings: Batch, learning rate and precision.
        first_step: Global step at which this phase starts.
        total_steps: Steps of all phases together.
        resume_from: What an earlier attempt has left, which fits the model: training goes on as if it had
            never stopped.
        save: Called between two steps; may write the state, and decides by itself whether to.

    Returns:
        Losses and rates.

    Raises:
        TrainingError: If the loss or the norm of the gradients is not finite. That step changes nothing.
    """
    assert settings.precision != "auto", "settled before the run"
    steps = len(input_ids) // settings.global_batch
    model.train().requires_grad_(True)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    done = Progress()
    if resume_from is not None:
        done = restore_state(resume_from, model, optimizer)
        log.info("resumed at step %d of %d", first_step + len(done.losses), total_steps)
    losses, trained_tokens = list(done.losses), done.trained_tokens
    last_log = time.monotonic()
    started = last_log - done.seconds
    while len(losses) < steps:
        step = first_step + len(losses)
        rate = _set_learning_rate(optimizer, step, total_steps, settings)
        rows = slice(len(losses) * settings.global_batch, (len(losses) + 1) * settings.global_batch)
        loss, counted = _accumulate(model, input_ids[rows], trained[rows], settings)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm or math.inf)
        _check_finite(step, total_steps, loss, float(norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append((step, loss, rate))
        trained_tokens += counted
        now, left = time.monotonic(), steps - len(losses)
        if now - last_log > _LOG_EVERY_S or not left:
            last_log = now
            step_s = (now - started) / len(losses)
            _log_step(
                losses[-1], total_steps, settings.global_batch * input_ids.shape[1] / step_s, left * step_s
            )
        if save is not None and left:
            save(optimizer, Progress(losses=losses, trained_tokens=trained_tokens, seconds=now - started))
    tokens = steps * settings.global_batch * input_ids.shape[1]
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
        "or set training.precision to float32, and start a run anew. A rerun of this one goes on from the "
        "last state that was saved."
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


def _log_step(done: tuple[int, float, float], total_steps: int, tokens_per_s: float, left_s: float) -> None:
    step, loss, rate = done
    progress = "step %d of %d, loss %.3f, lr %.2g, %.0f tokens/s, %.0f s left"
    log.info(progress, step + 1, total_steps, loss, rate, tokens_per_s, left_s)


def _accumulate(
    model: PreTrainedModel, input_ids: Tensor, trained: Tensor, settings: TrainingSettings
) -> tuple[float, int]:
    """Add up the gradients of one global batch; every trained token weighs the same.

    Returns:
        The mean loss over the batch's trained tokens, and their number.
    """
    counted = int(trained[:, 1:].sum())
    total = 0.0
    for ids, mask in _micro_batches(input_ids, trained, settings.micro_batch):
        ids = ids.to(model.device).long()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            states = final_states(model, ids)
            loss, gradient = loss_gradient(
                model, states, ids, scale=1 / max(counted, 1), trained=mask.to(model.device)
            )
        states.backward(gradient)
        total += loss
    return total / max(counted, 1), counted


def _micro_batches(input_ids: Tensor, trained: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(input_ids.split(size), trained.split(size), strict=True)
