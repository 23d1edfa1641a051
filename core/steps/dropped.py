"""Checkpoints of phases that a run does not keep: they go when nothing reads them any more.

So do the models that a method has made, beside its plans, and a teacher that was trained. What was dropped
leaves its manifest, the report of its step, and the plan.
"""

import logging
from collections.abc import Collection, Iterable

from core.pruning.phases import phase_steps
from core.runs.run import Run
from core.steps.carrying import leaves_moments
from core.storage.layout import MOMENTS, PLAN, REPORT, TEACHER
from core.storage.publication import MANIFEST, Publication, find_publication, open_publication
from core.storage.store import open_store
from core.storage.transfer import in_parallel

log = logging.getLogger(__name__)

_STAY = (REPORT, PLAN)
_STEPS = ("scored", "pruned", "recovered")
"""What publishes checkpoints; score-layers does so under some methods."""


def drop_checkpoints(run: Run) -> None:
    """Remove the checkpoints that ``storage.keep`` does not ask for and that no step will read.

    Also the optimizer's moments of phases whose next phase has trained.
    """
    keys = _keys(run)
    for phase in range(1, len(run.phase_params)):
        moments, reader = run.phase_uri(phase, MOMENTS), run.phase_uri(phase + 1, "recovered")
        if _is_published(run, moments, keys) and _is_published(run, reader, keys):
            open_publication(moments).delete()
            log.info("%s are not read any more, and removed", _key(run, moments))
    wanted = _to_compute(run, keys, dropped=())[0] | _to_measure(run, keys)
    teachers = [] if run.settings.storage.keep == "all" else [run.uri(TEACHER)]
    gone = [uri for uri in _uris(run, _phases_to_drop(run)) + teachers if uri not in wanted]
    there = [uri for uri in gone if _holds_weights(run, uri, keys)]
    for published in in_parallel(find_publication, there):
        if published is not None:
            # Report and plan stay: a run that is measured again shows them.
            published.delete(keep_manifest=True, keep=_STAY)
            log.info("%s is not read any more, and dropped", _key(run, published.uri))


def withdraw_dropped(run: Run) -> None:
    """Let the steps compute those dropped checkpoints again that a step will read.

    Someone has then removed a damaged part of the run. A run that is measured again under other settings
    needs none of them: what it has not kept is not measured. The run's lease must be held.
    """
    if Run.is_done(run.handle()):
        return
    keys = _keys(run)
    phases = range(1, len(run.phase_params) + 1)
    uris = [uri for uri in [run.uri(TEACHER), *_uris(run, phases)] if _is_published(run, uri, keys)]
    found = {published.uri: published for published in in_parallel(open_publication, uris)}
    dropped = {uri: each for uri, each in found.items() if not _is_whole(run, each, keys)}
    measured = run.settings.measured_digest()
    to_measure = {
        uri
        for uri in _to_measure(run, keys) & dropped.keys()
        if dropped[uri].manifest.metadata.get("measured", measured) == measured
    }
    wanted, trained_again = _to_compute(run, keys, dropped=dropped, again=to_measure)
    for uri in (wanted & dropped.keys()) | (trained_again & found.keys()):
        log.info("%s was dropped, and is needed again", _key(run, uri))
        found[uri].delete()


def _to_compute(
    run: Run, keys: Collection[str], *, dropped: Collection[str], again: Collection[str] = ()
) -> tuple[set[str], set[str]]:
    """Return the checkpoints that are read by what is yet to be computed, and those that are trained again.

    Phases are trained again for their moments, which the next phase starts with and which are gone.

    Args:
        run: The run.
        keys: All keys of the run in the store.
        dropped: Checkpoints of which only the manifest is left.
        again: Checkpoints that are wanted for another reason.
    """
    wanted, trained_again = set(again), set[str]()

    def is_made(uri: str) -> bool:
        is_gone = uri in trained_again or (uri in wanted and uri in dropped)
        return is_gone or not _is_published(run, uri, keys)

    result_is_read = not _is_published(run, run.uri("final"), keys)
    steps = phase_steps(run.settings.training.total_steps, len(run.phase_params))
    moments_are_read = False
    for phase in range(len(run.phase_params), 0, -1):
        scored, pruned, recovered = (run.phase_uri(phase, step) for step in _STEPS)
        if result_is_read:
            wanted.add(recovered if steps[phase - 1] else pruned)
        moments = run.phase_uri(phase, MOMENTS)
        if moments_are_read and leaves_moments(run, phase) and not _is_published(run, moments, keys):
            trained_again.add(recovered)
        moments_are_read = bool(steps[phase - 1]) and is_made(recovered)
        if moments_are_read:
            wanted |= {pruned, run.uri(TEACHER)}
        if is_made(pruned):
            wanted.add(scored)
        result_is_read = any(map(is_made, [run.phase_uri(phase, "calibrated"), scored, pruned]))
    return wanted, trained_again


def _to_measure(run: Run, keys: Collection[str]) -> set[str]:
    """Return the checkpoints that are read by evaluations yet to be made."""
    phases = range(1, len(run.phase_params) + 1)
    left = [phase for phase in phases if not _is_published(run, run.measured_uri(phase), keys)]
    return set(_uris(run, left, ("pruned", "recovered")))


def _keys(run: Run) -> set[str]:
    return set(open_store(run.store).list(f"{run.folder}/"))


def _is_published(run: Run, uri: str, keys: Collection[str]) -> bool:
    return f"{_key(run, uri)}/{MANIFEST}" in keys


def _holds_weights(run: Run, uri: str, keys: Collection[str]) -> bool:
    """Return whether a publication is there that has not been dropped before."""
    place = f"{_key(run, uri)}/"
    names = {key.rpartition("/")[2] for key in keys if key.startswith(place)}
    return _is_published(run, uri, keys) and bool(names - {MANIFEST, *_STAY})


def _is_whole(run: Run, published: Publication, keys: Collection[str]) -> bool:
    place, manifest = _key(run, published.uri), published.manifest
    return all(f"{place}/{manifest.key(entry)}" in keys for entry in manifest.files)


def _uris(run: Run, phases: Iterable[int], steps: Iterable[str] = _STEPS) -> list[str]:
    return [run.phase_uri(phase, step) for phase in phases for step in steps]


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
