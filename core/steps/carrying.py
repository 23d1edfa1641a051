"""The optimizer's state on its way from one phase to the next: ``training.optimizer_state: carry``."""

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import StorageError
from core.pruning.phases import phase_steps
from core.runs.run import Run
from core.storage.layout import MOMENTS, PLAN
from core.storage.publication import Publication, find_publication, open_publication, publish

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def leaves_moments(run: Run, phase: int) -> bool:
    """Return whether the phase after this one starts with its moments."""
    steps = phase_steps(run.settings.training.total_steps, len(run.phase_params))
    return (
        run.settings.training.optimizer_state == "carry"
        and phase < len(run.phase_params)
        and steps[phase - 1] > 0
    )


def moments_before(run: Run, phase: int) -> Publication | None:
    """Return the moments that a phase starts with; None if it starts with none.

    Raises:
        StorageError: If they are gone.
    """
    if phase == 1 or not leaves_moments(run, phase - 1):
        return None
    uri = run.phase_uri(phase - 1, MOMENTS)
    published = find_publication(uri)
    if published is None:
        raise StorageError(
            f"{uri} is gone, and phase {phase} trains with it. Start the run again: it trains phase "
            f"{phase - 1} again."
        )
    return published


def take_moments(
    run: Run,
    phase: int,
    published: Publication,
    scratch: Path,
    model: "PreTrainedModel",
    optimizer: "Optimizer",
) -> None:
    """Give a phase's optimizer the moments of the phase before, cut by the phase's plan."""
    from core.model.families import family_of
    from core.pruning.plan import Plan
    from core.pruning.surgery import prune_tensors
    from core.training.moments import StoredMoments, load_moments

    scored = open_publication(run.phase_uri(phase, "scored"))
    plan = Plan.load(scored.fetch(scratch / "plan", only=[PLAN]) / PLAN)
    biased = run.settings.prune.applied().repair == "bias"
    cut = functools.partial(prune_tensors, family_of(model.config), plan.before, plan.layers, biased=biased)
    load_moments(StoredMoments(published.fetch(scratch / "moments")), cut, model, optimizer)
    log.info("the optimizer goes on with the moments of phase %d", phase - 1)


def leave_moments(
    run: Run, phase: int, scratch: Path, model: "PreTrainedModel", optimizer: "Optimizer"
) -> None:
    """Publish the moments of a phase that has trained, before its checkpoint is: the next one needs both."""
    from core.training.moments import write_moments

    uri, folder = run.phase_uri(phase, MOMENTS), scratch / "left"
    if (stale := find_publication(uri)) is not None:
        stale.delete()  # of an attempt that has not published its checkpoint
    write_moments(folder, model, optimizer)
    publish(folder, uri, metadata={"run": run.key, "phase": phase})
