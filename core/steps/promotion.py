"""Whether a version takes the champion's place in MLflow's registry: a rule, and a decision to read.

The rule is one of not being worse: the version is promoted if the whole 95 % interval of how much worse it is
lies within a margin. So a measurement that is too small to tell promotes nothing. The interval is that of a
paired bootstrap where both have results for each item; else it follows from the standard errors, and where
there are none the difference alone decides. The decision says which.
"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Literal

from core.errors import AdaptPrunerError, DataError, TrackingError
from core.evaluation.items import Items, read_items
from core.evaluation.observed import can_be_averaged, observed, observed_text
from core.evaluation.significance import Observations, perplexity_ratio, score_difference
from core.runs.record import best_accuracy, perplexity_text, standard_error
from core.settings.registry import RegistrySettings
from core.storage.publication import find_publication
from core.tracking.registry import CHAMPION, EVALUATED, MEASURED, Registry, Version

Verdict = Literal[
    "is the champion", "no champion", "not worse", "worse", "not certain", "not comparable", "decided before"
]

DECISION, AGAINST = "adapt_pruner.decision", "adapt_pruner.decided_against"
"""Tags of a version: ``promoted`` or ``not promoted``, and over which version."""

_NORMAL_975 = NormalDist().inv_cdf(0.975)
_ROUNDS = 5
_METRIC = re.compile(r"(.+)/(.+?)(?:_none)?")  # older versions logged lm-eval's "acc,none" as "acc_none"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much worse a version is than the champion."""

    candidate: float
    """Its perplexity or accuracy."""
    champion: float
    """The champion's."""
    worse: float
    """Share by which its perplexity is higher, or its accuracy lower; below 0 it is better."""
    low: float | None
    """Lower end of the 95 % interval; None if there is none."""
    high: float | None
    """Upper end."""
    how: str
    """What the interval follows from."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a version was promoted, and why."""

    model: str
    version: str
    champion: str
    """The version that was the champion before; empty if there was none."""
    verdict: Verdict
    promoted: bool
    """Whether the version is the champion now; with a dry run, whether it would be."""
    rule: RegistrySettings
    sentence: str
    comparison: Comparison | None = None

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the table of the decision: measure, the version's, the champion's."""
        found = self.comparison
        if found is None:
            return []
        show = perplexity_text if self.rule.metric == "perplexity" else _percent
        return [(self.rule.metric, show(found.candidate), show(found.champion))]

    def to_markdown(self) -> str:
        """Return the decision as a page."""
        lines = [f"# {self.model} version {self.version}", "", self.sentence]
        if self.comparison is not None:
            lines += ["", f"| measure | version {self.version} | champion, version {self.champion} |"]
            lines += ["| --- | ---: | ---: |", *(f"| {' | '.join(row)} |" for row in self.rows())]
            lines += ["", f"Interval: {self.comparison.how}."]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Return the decision as data."""
        return json.dumps(asdict(self), indent=1)


def promote(
    registry: Registry, rule: RegistrySettings, which: str, *, dry_run: bool = False, again: bool = True
) -> Decision:
    """Move the alias ``champion`` to a version, if the rule says so, and write the decision down.

    It is written into the version's description and tags, and as an artifact of the run that it comes from.

    Args:
        registry: The registered model.
        rule: The rule.
        which: The version's number or alias.
        dry_run: Only decide.
        again: Whether to decide anew what was decided before.

    Raises:
        TrackingError: If there is no such version, or MLflow fails.
    """
    for _ in range(_ROUNDS):
        candidate, champion = registry.find(which), registry.find(CHAMPION)
        if candidate is None:
            raise TrackingError(
                f"{registry.name} has no version {which} in MLflow's registry. Run a recipe with "
                f"tracking.model_name={registry.name}, or name another version."
            )
        measured = candidate.tags.get(MEASURED)
        if champion is not None and measured not in (None, champion.tags.get(MEASURED)):
            champion = registry.measured_as(champion, measured)
        decided_over = candidate.tags.get(AGAINST)
        reigning = champion.number if champion else ""
        if not again and decided_over not in (None, reigning):
            return Decision(
                model=registry.name,
                version=candidate.number,
                champion=reigning,
                verdict="decided before",
                promoted=_same(candidate, champion),
                rule=rule,
                sentence=f"Version {candidate.number} was decided on before: see its description.",
            )
        decision = decide(registry.name, rule, candidate, champion)
        already = decision.verdict == "is the champion"
        if dry_run or (already and (again or decided_over is not None)):
            return decision
        moves = decision.promoted and not already
        if moves and not registry.move(CHAMPION, candidate.number, expected=reigning):
            log.info("another version became the champion meanwhile: comparing again")
            continue
        _write_down(registry, decision, candidate)  # last: it says what is, also if this is killed before
        return decision
    raise TrackingError(f"The champion of {registry.name} changes all the time. Try again later.")


def decide(model: str, rule: RegistrySettings, candidate: Version, champion: Version | None) -> Decision:
    """Apply the rule to two versions."""

    def decision(verdict: Verdict, sentence: str, found: Comparison | None = None) -> Decision:
        promoted = verdict in ("is the champion", "not worse") or (verdict == "no champion" and rule.first)
        return Decision(
            model=model,
            version=candidate.number,
            champion=champion.number if champion else "",
            verdict=verdict,
            promoted=promoted,
            rule=rule,
            sentence=f"Version {candidate.number} {sentence}",
            comparison=found,
        )

    if champion is None:
        said = "is promoted: there was no champion" if rule.first else "is not promoted: there is no champion"
        return decision("no champion", f"{said}.")
    if _same(candidate, champion):
        return decision("is the champion", "is the champion already.")
    try:
        found = compare_versions(rule.metric, candidate, champion)
    except DataError as error:
        return decision("not comparable", f"is not promoted. {error}")
    # A difference of 0.50 and 0.49 is not to fail at 0.01 for its last digit.
    margin, limit = rule.margin + 1e-9, f"the margin of {_amount(rule.metric, rule.margin)}"
    much = _how_much(rule.metric, found)
    against = f"{much} than version {champion.number}, the champion"
    if found.high is None or found.low is None:
        within = found.worse <= margin
        verdict: Verdict = "not worse" if within else "worse"
        said = "is promoted" if within else "is not promoted"
        return decision(
            verdict, f"{said}: it is {against}; {limit} {'holds' if within else 'is exceeded'}.", found
        )
    if found.high <= margin:
        return decision("not worse", f"is promoted: it is {against}, all of it within {limit}.", found)
    if found.low > margin:
        return decision("worse", f"is not promoted: it is {against}, all of it beyond {limit}.", found)
    return decision(
        "not certain",
        f"is not promoted: it is {against}, which reaches beyond {limit}. More items would tell.",
        found,
    )


def compare_versions(metric: str, candidate: Version, champion: Version) -> Comparison:
    """Compare what was measured of two versions.

    Raises:
        DataError: If they cannot be compared on it.
    """
    settings = [version.tags.get(MEASURED) for version in (candidate, champion)]
    if None not in settings and settings[0] != settings[1]:
        raise DataError(
            f"Version {champion.number}, the champion, was measured under other settings of the section "
            "evaluation: run its recipe again with these."
        )
    figures = _by_figures(metric, candidate, champion)
    try:
        kept = [_items_of(version) for version in (candidate, champion)]
    except AdaptPrunerError as error:
        log.warning("results by item are not compared: %s", error)
        return figures
    if kept[0] is None or kept[1] is None:
        return figures
    tasks = [metric]
    if metric == "accuracy":
        tasks, others = ([*headlines(version.metrics)] for version in (candidate, champion))
        if {*tasks} != {*others}:
            return figures
    return _by_items(tasks, kept[0], kept[1], figures) or figures


def _items_of(version: Version) -> Items | None:
    """Read what was measured on each item; None if the version says nothing of it."""
    place = version.tags.get(EVALUATED)
    published = find_publication(place) if place else None
    return read_items(published) if published else None


def _by_items(tasks: Sequence[str], items: Items, others: Items, figures: Comparison) -> Comparison | None:
    """Compare in pairs the perplexity, or the mean over tasks; None if one of the two has no such results.

    Raises:
        DataError: If what they have is not of the same items, or of too few.
    """
    if tasks == ["perplexity"]:
        own, other = (observed_text(each, "perplexity") for each in (items, others))
        if own is None or other is None:
            return None
        found, what = perplexity_ratio(own, other), "windows"
        worse, low, high = found.value - 1, found.low - 1, found.high - 1
    else:
        own_scores, other_scores = ({task: _scores(each, task) for task in tasks} for each in (items, others))
        if not all((*own_scores.values(), *other_scores.values())):
            return None
        if len(tasks) > 1 and not (
            can_be_averaged(items, own_scores) and can_be_averaged(others, other_scores)
        ):
            return None
        found = score_difference(_lists(own_scores), _lists(other_scores))
        worse, low, high, what = -found.value, -found.high, -found.low, "items"
    if found.verdict == "too few items":
        raise DataError(f"Both were measured on {found.items} {what} only, which is too few to tell.")
    how = f"paired bootstrap over the {found.items} {what} that both were measured on"
    return replace(figures, worse=worse, low=low, high=high, how=how)


def _scores(items: Items, task: str) -> dict[str, Observations]:
    """Return the items of a task's or a group's headline accuracy; {} if it has none."""
    metrics = items.tasks[task].metrics if task in items.tasks else items.groups.get(task, {})
    best = best_accuracy(metrics)
    return observed(items, task, best) if best else {}


def _lists(scores: Mapping[str, Mapping[str, Observations]]) -> dict[str, Observations]:
    return {name: found for lists in scores.values() for name, found in lists.items()}


def _by_figures(metric: str, candidate: Version, champion: Version) -> Comparison:
    """Compare means, by their standard errors where they are known."""
    (own, own_error), (other, other_error) = (_figure(metric, each) for each in (candidate, champion))
    if metric == "perplexity":
        how = "none, as there are no results by item that both have; the difference alone decides"
        return Comparison(candidate=own, champion=other, worse=own / other - 1, low=None, high=None, how=how)
    worse = other - own
    if own_error is None or other_error is None:
        how = "none, as there are no standard errors; the difference alone decides"
        return Comparison(candidate=own, champion=other, worse=worse, low=None, high=None, how=how)
    half = _NORMAL_975 * math.hypot(own_error, other_error)
    how = "from the standard errors of both means, as there are no results by item that both have"
    return Comparison(
        candidate=own, champion=other, worse=worse, low=worse - half, high=worse + half, how=how
    )


def _figure(metric: str, version: Version) -> tuple[float, float | None]:
    """Return a version's figure and its standard error, None if that is not known."""
    if metric == "perplexity":
        if metric not in version.metrics:
            raise DataError(f"Version {version.number} has no perplexity: set evaluation.perplexity.")
        return version.metrics[metric], None
    found = headlines(version.metrics)
    wanted = list(found) if metric == "accuracy" else [metric]
    if not wanted or any(task not in found for task in wanted):
        tasks = ", ".join(found) or "none"
        raise DataError(f"Version {version.number} has no {metric}: its tasks are {tasks}.")
    values, errors = zip(*(found[task] for task in wanted), strict=True)
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(wanted) if len(known) == len(wanted) else None
    return sum(values) / len(wanted), error


def headlines(metrics: Mapping[str, float]) -> dict[str, tuple[float, float | None]]:
    """Return each task's headline accuracy and its standard error, out of MLflow's names of metrics."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if match := _METRIC.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = value
    best = {task: best_accuracy(values) for task, values in found.items()}
    return {
        task: (found[task][name], standard_error(found[task], name)) for task, name in best.items() if name
    }


def _write_down(registry: Registry, decision: Decision, candidate: Version) -> None:
    page = decision.to_markdown()
    outcome = "promoted" if decision.promoted else "not promoted"
    registry.note(candidate.number, page, {DECISION: outcome, AGAINST: decision.champion})
    if candidate.run_id:
        against = f"against-version-{decision.champion}" if decision.champion else "first"
        place = f"promotion/version-{candidate.number}-{against}"
        registry.log_text(candidate.run_id, page, f"{place}.md")
        registry.log_text(candidate.run_id, decision.to_json(), f"{place}.json")


def _same(candidate: Version, champion: Version | None) -> bool:
    """Return whether they are one, or two measurements of one checkpoint."""
    if champion is None:
        return False
    same = candidate.checkpoint_uri == champion.checkpoint_uri != ""
    return same or candidate.number == champion.number


def _how_much(metric: str, found: Comparison) -> str:
    """Write a difference: ``2.1 % worse in perplexity (95 % interval: 0.4 % better to 4.5 % worse)``."""
    text = f"{_direction(metric, found.worse)} in {metric}"
    if found.low is None or found.high is None:
        return text
    ends = f"{_direction(metric, found.low)} to {_direction(metric, found.high)}"
    return f"{text} (95 % interval: {ends})"


def _direction(metric: str, worse: float) -> str:
    return f"{_amount(metric, abs(worse))} {'worse' if worse > 0 else 'better'}"


def _amount(metric: str, share: float) -> str:
    return f"{100 * share:.2g} %" if metric == "perplexity" else f"{100 * share:.2g} points"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
