"""Recovery training of one phase: AdamW on packed sequences, float32 master weights under autocast."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from core.errors import TrainingError
from core.model.decoder import final_states
from core.model.loss import loss_gradient, loss_sum
from core.progress import Progress
from core.settings.training import TrainingSettings
from core.training.compilation import compiled_layers
from core.training.measures import DivergenceWatch, Measures
from core.training.objective import Teacher
from core.training.optimizer import adamw
from core.training.parallel.ranks import ALONE, Ranks
from core.training.rows import Rows
from core.training.state import TrainingProgress, TrainingState, restore_state, trained_parameters
from core.training.wsd import wsd_learning_rate

log = logging.getLogger(__name__)

Live = Callable[[Callable[[], Mapping[str, Sequence[tuple[int, float]]]]], AbstractContextManager[None]]
"""Takes what returns the curves so far; until the block ends, it may be called from another thread."""


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """The outcome of a phase's training.

    Attributes:
        losses: (global step, loss in nats per trained token, learning rate) of each optimizer step; the loss
            is what is minimized, with a teacher's share in it.
        series: Name of each other curve to its (global step, value).
        tokens: Tokens that passed through the model.
        trained_tokens: Those that counted in the loss (prompts do not).
        tokens_per_s: Rate over the whole phase, all attempts included.
        compilations: Graphs that this attempt has compiled; None without ``torch.compile``.
    """

    losses: tuple[tuple[int, float, float], ...]
    series: Mapping[str, Sequence[tuple[int, float]]]
    tokens: int
    trained_tokens: int
    tokens_per_s: float
    compilations: int | None


def recover(
    model: PreTrainedModel,
    rows: Rows,
    settings: TrainingSettings,
    *,
    held_out: Rows | None = None,
    teacher: Teacher | None = None,
    first_step: int,
    total_steps: int,
    carry: Callable[[Optimizer], None] | None = None,
    resume_from: TrainingState | None = None,
    save: Callable[[Optimizer, TrainingProgress], None] | None = None,
    hand_on: Callable[[Optimizer], None] | None = None,
    live: Live | None = None,
    ranks: Ranks = ALONE,
) -> TrainingReport:
    """Train a pruned model on the phase's slice, in place.

    Args:
        model: Float32 weights, on the device to train on. Those that require a gradient are trained.
        rows: S packed sequences; S is a multiple of ``settings.global_batch``.
        settings: Batch, learning rate and precision.
        held_out: Rows to measure the loss on, not to train on: before the first step, after the last one, and
            in between as the settings say.
        teacher: What the model also learns from.
        first_step: Global step at which this phase starts.
        total_steps: Steps of all phases together.
        carry: Gives the optimizer what it starts with; None for moments of zero. Not called if an earlier
            attempt is resumed.
        resume_from: State of an earlier attempt, which fits the model: training continues as if it had never
            stopped.
        save: Called between steps; decides by itself whether to write the state.
        hand_on: Called when all steps are done.
        live: Shows the curves while they grow.
        ranks: Who trains together. All are given the same, and report the same losses.

    Returns:
        Curves and rates.

    Raises:
        TrainingError: If the loss or the gradient norm is not finite: that step changes nothing. If the loss
            has stayed above the settings' limit: no state is saved of such steps.
    """
    assert settings.precision != "auto", "settled before the run"
    steps = len(rows.input_ids) // settings.global_batch
    model.train()
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable(offload=settings.layer_inputs == "host")
    optimizer = adamw(trained_parameters(model).values(), settings)
    done = TrainingProgress()
    if resume_from is not None:
        done = restore_state(resume_from, model, optimizer)
        if done.losses:
            log.info("resumed at step %d of %d", first_step + len(done.losses), total_steps)
    elif carry is not None:
        carry(optimizer)
    measures = Measures(model, done, precision=settings.precision, ranks=ranks.size)
    watch = DivergenceWatch(settings.max_loss_rise, done.losses)
    batch_tokens = settings.global_batch * rows.input_ids.shape[1]
    tokens, resumed = steps * batch_tokens, time.monotonic()
    started = resumed - done.seconds
    if held_out is not None and not done.losses:
        measures.add(first_step, {"held_out_loss": held_out_loss(model, held_out, settings, ranks)})
    with (
        compiled_layers(model) if settings.compile else nullcontext() as graphs,
        nullcontext() if live is None else live(measures.curves),
        Progress("training", tokens, "tokens", done=len(done.losses) * batch_tokens) as progress,
    ):
        while (finished := len(measures.losses)) < steps:
            began, step = time.monotonic(), first_step + finished
            batch = rows.part(finished * settings.global_batch, settings.global_batch)
            rate = _set_learning_rate(optimizer, step, total_steps, settings)
            place = f"step {step + 1} of {total_steps}"
            values = _train_step(model, teacher, optimizer, batch, settings, ranks, place)
            finished, now = finished + 1, time.monotonic()
            left_s = (now - resumed) / (finished - len(done.losses)) * (steps - finished)
            measures.add_step(step, values, batch=batch, rate=rate, seconds=now - began, left_s=left_s)
            if held_out is not None and (finished % settings.eval_every == 0 or finished == steps):
                measures.add(step + 1, {"held_out_loss": held_out_loss(model, held_out, settings, ranks)})
            watch.see(step, values["loss"])
            progress.add(batch_tokens, f"{place}, loss {values['loss']:.3f}, lr {rate:.2g}")
            # What is saved is from before the loss began to rise.
            if save is not None and finished < steps and not watch.steps_above:
                save(optimizer, measures.progress(time.monotonic() - started))
    seconds = time.monotonic() - started
    if hand_on is not None:
        hand_on(optimizer)
    model.eval()
    return TrainingReport(
        losses=tuple(measures.losses),
        series=measures.series,
        tokens=tokens,
        trained_tokens=measures.trained_tokens,
        tokens_per_s=tokens / max(seconds, 1e-9),
        compilations=None if graphs is None else graphs(),
    )


def _train_step(
    model: PreTrainedModel,
    teacher: Teacher | None,
    optimizer: Optimizer,
    batch: Rows,
    settings: TrainingSettings,
    ranks: Ranks,
    place: str,
) -> dict[str, float]:
    """Take one optimizer step and return what it has measured; ``place`` says which step, for an error."""
    measured = _accumulate(model, teacher, batch, settings, ranks)
    limit = settings.max_grad_norm or math.inf
    measured["gradient_norm"] = ranks.clip_gradients(model.parameters(), limit)
    # Here alone the step waits for the device.
    numbers = torch.stack([value.double() for value in measured.values()]).tolist()
    values = dict(zip(measured, numbers, strict=True))
    _check_finite(place, values["loss"], values["gradient_norm"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return values


def _check_finite(place: str, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    found = f"the loss is {loss}" if not math.isfinite(loss) else f"the l2 norm of the gradients is {norm}"
    raise TrainingError(
        f"training has stopped at {place}: {found}. Lower training.learning_rate, or set training.precision "
        "to float32, which makes it another run. Rerunning this one resumes from the last saved state."
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


def _accumulate(
    model: PreTrainedModel, teacher: Teacher | None, batch: Rows, settings: TrainingSettings, ranks: Ranks
) -> dict[str, Tensor]:
    """Accumulate the gradients of this rank's part of a global batch.

    Every trained token of the global batch has the same weight.

    Returns:
        Name of each curve to its value, on the device, a mean over the trained tokens: ``loss``, and where
        the teacher's layers teach, ``hidden_distance``.
    """
    counted = max(batch.trained_tokens, 1)
    total, apart = torch.zeros(2, dtype=torch.float64, device=model.device)
    for part in ranks.share(batch).micro_batches(settings.micro_batch, model.device):
        with _autocast(model, settings):
            # The teacher goes first, as the activations of the model stay.
            lesson, hidden = (None, None) if teacher is None else teacher.lesson(part)
            with nullcontext() if hidden is None else hidden.taught(model, scale=1 / counted) as distance:
                states = final_states(model, part.ids, part.documents)
            loss, gradient = loss_gradient(
                model, states, part.ids, scale=1 / counted, trained=part.trained, lesson=lesson
            )
        states.backward(gradient)
        total += loss
        if hidden is not None and distance is not None:
            total += hidden.weight * distance
            apart += distance
    found = {"loss": total} | ({"hidden_distance": apart} if teacher and teacher.hidden_weight else {})
    return {name: ranks.total(value) / counted for name, value in found.items()}


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, rows: Rows, settings: TrainingSettings, ranks: Ranks = ALONE
) -> float:
    """Return the mean loss over the trained tokens of rows; the model goes on training afterwards.

    Each rank takes a part of the rows.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for part in ranks.share(rows.filled(ranks.size)).micro_batches(settings.micro_batch, model.device):
        with _autocast(model, settings):
            states = final_states(model, part.ids, part.documents)
            total += loss_sum(model, states, part.ids, trained=part.trained)
    model.train()
    return ranks.total(total).item() / max(rows.trained_tokens, 1)


def _autocast(model: PreTrainedModel, settings: TrainingSettings) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")
