"""Distillation of what a cut has left, a part of prune-step."""

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import DataError
from core.runs.run import Run
from core.steps.measuring import draw
from core.storage.publication import Publication
from core.training.resume import SavedStates

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from core.model.checkpoint import Checkpoint

log = logging.getLogger(__name__)

_HELD_OUT = 32
"""Sequences that are measured on, not trained on; at most an eighth of the pool."""


def distill_cut(
    run: Run,
    phase: int,
    cut: "Checkpoint",
    dense: "Checkpoint",
    *,
    number: int,
    data: Publication,
    scratch: Path,
    target: Path,
    states_uri: str,
    belongs_to: dict[str, str],
    dtype: "torch.dtype",
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Teach a model that was cut to expect what the dense one expects, and write it in ``dtype``.

    Args:
        run: The run.
        phase: The phase.
        cut: Of float32 weights.
        dense: The base model.
        number: Number of the repair's draw within the phase. A repair takes its beginning, this its end: no
            document serves both as long as there are enough.
        data: Holds the calibration pool.
        scratch: Where the pool is fetched to.
        target: Where the result goes.
        states_uri: Holds the states of this distillation, from which one that was killed goes on.
        belongs_to: What it starts from. A state of something else is not used.
        dtype: Number format of the result.
        provenance: Of the result.

    Returns:
        Figures: seconds (``seconds``: of earlier attempts), tokens, the divergence of each update, and before
        and after on held-out sequences.

    Raises:
        OutOfMemoryError: If the two models do not fit into the memory.
        TrainingError: If a value is not finite.
    """
    import torch

    from core.model.build import dtype_of, load_model, pick_device
    from core.model.checkpoint import save_model
    from core.steps.footprint import explaining_memory
    from core.steps.prune_footprint import distill_batch, planned_distillation
    from core.steps.self_text import own_text
    from core.training.distillation import distill, mean_divergence

    prune, calibration, device = run.settings.prune, run.settings.calibration, pick_device()
    batch = distill_batch(calibration, prune)
    pool = draw(run, phase, number, data, scratch, sequences=calibration.pool_documents, or_all=True)
    pool = torch.cat([own_text(run, scratch), pool])
    tokens, held_out = _divided(pool, prune.distill_steps * batch)
    passes = prune.distill_steps * batch / len(tokens)
    if passes > 1:
        log.warning(
            "the distillation goes %.2f times over its %s tokens, and learns by heart what comes again. Give "
            "it more by a larger calibration.source, or by prune.generated_tokens",
            passes,
            f"{tokens.numel():,}",
        )
    micro_batch = planned_distillation(cut.config, dense.config, calibration, prune, device.type)
    student = load_model(cut, dtype=torch.float32, device=device)
    teacher = load_model(dense, dtype=dtype_of(calibration.precision), device=device)
    autocast = calibration.precision == "bfloat16"

    def measure() -> float:
        return mean_divergence(student, teacher, held_out, micro_batch=micro_batch, autocast=autocast)

    with explaining_memory("calibration.micro_batch=1"):
        before = measure()
        with SavedStates(states_uri, scratch / "states", every=None, belongs_to=belongs_to) as states:
            resume_from = states.newest(student, first_step=0)
            report = distill(
                student,
                teacher,
                tokens,
                steps=prune.distill_steps,
                rate=prune.distill_rate,
                batch=batch,
                micro_batch=micro_batch,
                autocast=autocast,
                seed=run.settings.seed + phase,
                resume_from=resume_from,
                save=functools.partial(states.save, student),
            )
        after = measure()
    log.info(
        "divergence from the base model on held-out texts: %.3f nats a token, before %.3f", after, before
    )
    save_model(torch.nn.Module.to(student, dtype), target, companions=cut.directory, provenance=provenance)
    return {
        "seconds": resume_from.progress.seconds if resume_from else 0.0,
        "distill_s": report.seconds,
        "distill_tokens": report.tokens,
        "divergence_cut": before,
        "divergence_distilled": after,
        "divergences": report.divergences,
    }


def _divided(pool: "Tensor", wanted: int) -> "tuple[Tensor, Tensor]":
    """Return the sequences to train on and those to measure on, from the end of a draw."""
    held_out = max(1, min(_HELD_OUT, len(pool) // 8))
    trained = pool[:-held_out][-wanted:]
    if not len(trained):
        raise DataError(
            "calibration.source gives one sequence, but prune.distill_steps needs one to train on and one to "
            "measure on. Name a larger corpus, or set prune.distill_steps to 0."
        )
    return trained, pool[-held_out:]
