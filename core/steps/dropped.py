"""Checkpoints of phases that a run which is done does not keep, until it is to be done again."""

import logging
from collections.abc import Iterable

from core.runs.run import Run
from core.storage.layout import REPORT
from core.storage.publication import MANIFEST, find_publication, open_publication
from core.storage.store import open_store
from core.storage.transfer import in_parallel

log = logging.getLogger(__name__)


def drop_checkpoints(run: Run) -> None:
    """Remove the files of the checkpoints that ``storage.keep`` does not ask for; their manifests stay."""
    for published in in_parallel(find_publication, _checkpoint_uris(run, _phases_to_drop(run))):
        if published is not None:
            # The step's report stays: a run that is measured again shows it.
            published.delete(keep_manifest=True, keep=[REPORT])


def withdraw_dropped(run: Run) -> None:
    """Let the steps compute the checkpoints again that were dropped, as those of a run that was done are.

    Someone has then removed a damaged part of the run, and computing that again may need any of them: the
    weights, or the figures beside these. The run's lease must be held. A run that is done and is measured
    again needs none of them: what it has not kept is not measured.
    """
    if Run.is_done(run.handle()):
        return
    keys = set(open_store(run.store).list(f"{run.folder}/"))
    phases = range(1, len(run.phase_params) + 1)
    uris = [uri for uri in _checkpoint_uris(run, phases) if f"{_key(run, uri)}/{MANIFEST}" in keys]
    for published in in_parallel(open_publication, uris):
        place = _key(run, published.uri)
        if not all(f"{place}/{published.manifest.key(entry)}" in keys for entry in published.manifest.files):
            log.info("%s was dropped, and is needed again", place)
            published.delete()


def _checkpoint_uris(run: Run, phases: Iterable[int]) -> list[str]:
    return [run.phase_uri(phase, step) for phase in phases for step in ("pruned", "recovered")]


def _key(run: Run, uri: str) -> str:
    return f"{run.folder}{uri.removeprefix(run.uri())}"


def _phases_to_drop(run: Run) -> list[int]:
    """Return the phases whose checkpoints ``storage.keep`` does not ask for; the final one is kept apart."""
    keep, phases = run.settings.storage.keep, range(1, len(run.phase_params) + 1)
    if keep == "all":
        return []
    if keep == "last":
        return list(phases)
    if keep == "best":
        found = in_parallel(find_publication, map(run.measured_uri, phases))
        reports = [published.read_json(REPORT) if published else {} for published in found]
        perplexities = {p: report.get("perplexity") for p, report in zip(phases, reports, strict=True)}
        measured = {p: value for p, value in perplexities.items() if value is not None}
        best = min(measured, key=lambda p: measured[p]) if measured else phases[-1]
        return [phase for phase in phases if phase != best]
    return [phase for phase in phases if phase % int(keep)]
