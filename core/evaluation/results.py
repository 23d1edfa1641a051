"""From lm-eval's results to figures, their averages, and what was measured on each item."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.evaluation.items import GroupMetric, ItemResults, Items, Kind, MetricItems, numbered
from core.runs.record import AVERAGE, CHANCE, standard_error
from core.settings.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class TaskAnswers:
    """What lm-eval says of one task; plain data."""

    metrics: dict[str, Any]
    """lm-eval's own, such as ``{"acc,none": 0.49, "acc_stderr,none": 0.02, "sample_len": 500, ...}``."""
    items: ItemResults
    """Each item of it."""
    chance: float | None = None
    """The accuracy of guessing, the mean over the items; None for a task without choices."""


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """What the benchmarks have said of a model."""

    figures: dict[str, dict[str, float]]
    """Task name to metric name to value, such as ``{"arc_easy": {"acc": 0.49, "acc_stderr": 0.02, ...}}``. A
    group (``mmlu``) gives its average; a tag, or a group without an average, gives its members; a preset
    gives its members and their average."""
    items: Items
    """What they follow from, of each task below them."""


def answers_of(task: Any, metrics: Mapping[str, Any], samples: Sequence[dict[str, Any]]) -> TaskAnswers:
    """Keep what is wanted of lm-eval's results of a task.

    Args:
        task: lm-eval's task.
        metrics: Its metrics, as lm-eval names them.
        samples: What lm-eval has logged of each item and filter.
    """
    chances = []
    if task.OUTPUT_TYPE == "multiple_choice":
        chances = [1 / len(sample["arguments"]) for sample in samples]
    return TaskAnswers(
        metrics={name: value for name, value in metrics.items() if isinstance(value, int | float | str)},
        items=_items_of(task, samples),
        chance=statistics.fmean(chances) if chances else None,
    )


def collect_results(
    loaded: Mapping[str, Mapping[str, Any]], answers: Mapping[str, TaskAnswers], presets: Sequence[str]
) -> TaskResults:
    """Put the results of tasks together.

    Args:
        loaded: What ``load_tasks`` has returned.
        answers: Those of each task in it.
        presets: Which of ``PRESETS`` were asked for.
    """
    metrics = {name: found.metrics for name, found in answers.items()}
    figures: dict[str, dict[str, float]] = {}
    groups: dict[str, dict[str, GroupMetric]] = {}
    tasks = {name: found.items for name, found in answers.items()}
    wanted = {each.task: each.metric for preset in presets for each in PRESETS[preset]}
    for name, part in loaded.items():
        for group_name, group in part["groups"].items():
            if group.has_aggregation:
                groups[group_name] = _group_metrics(group, tasks, wanted.get(group_name))
        averaged = name in part["groups"] and part["groups"][name].has_aggregation
        for member in [] if averaged else part["tasks"]:
            figures[member] = _figures_of(metrics[member])
            if (chance := answers[member].chance) is not None:
                figures[member][CHANCE] = chance
        if averaged:
            group = part["groups"][name]
            figures[name] = _figures_of(group.aggregate(metrics))
            for metric, rule in groups[name].items():
                if metric not in figures[name]:  # the paper's, where lm-eval's group averages another
                    figures[name] |= _mean_of_members(metric, rule, metrics)
            chances = [(answers[t].chance, len(tasks[t].items)) for t in part["tasks"]]
            if all(chance is not None for chance, _ in chances):
                total = sum(size for _, size in chances)
                figures[name][CHANCE] = sum((chance or 0.0) * size for chance, size in chances) / total
    for preset in presets:
        members = tuple((each.task, each.metric) for each in PRESETS[preset] if each.averaged)
        groups[preset] = {AVERAGE: GroupMetric(members=members, by_size=False)}
        figures[preset] = _average([(figures[task], metric) for task, metric in members])
    return TaskResults(figures=figures, items=Items(tasks=tasks, groups=groups))


def _figures_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Drop the filter ``none`` from the names of metrics, and what is no metric."""
    return {
        _metric_name(metric, kind): float(value)
        for key, value in metrics.items()
        for metric, comma, kind in [key.partition(",")]
        if comma and isinstance(value, int | float)
    }


def _metric_name(metric: str, filter_: str) -> str:
    return metric if filter_ == "none" else f"{metric}_{filter_}"


def _average(members: Sequence[tuple[Mapping[str, float], str]]) -> dict[str, float]:
    """Average metrics of tasks, each counting once; the standard error takes the tasks for independent."""
    count = len(members)
    found = {AVERAGE: sum(figures[metric] for figures, metric in members) / count}
    errors = [standard_error(figures, metric) for figures, metric in members]
    if None not in errors:
        found[f"{AVERAGE}_stderr"] = math.sqrt(sum((error or 0.0) ** 2 for error in errors)) / count
    chances = [figures.get(CHANCE) for figures, _ in members]
    if None not in chances:
        found[CHANCE] = sum(chance or 0.0 for chance in chances) / count
    return found


def _mean_of_members(
    metric: str, rule: GroupMetric, metrics: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Average a metric of a group's tasks as lm-eval averages those that it does."""
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr

    values = [metrics[task][f"{metric},none"] for task, _ in rule.members]
    errors = [metrics[task].get(f"{metric}_stderr,none") for task, _ in rule.members]
    sizes = [metrics[task]["sample_len"] for task, _ in rule.members]
    found = {metric: float(aggregate_subtask_metrics(values, sizes, rule.by_size))}
    if all(isinstance(error, float) for error in errors):
        error = pooled_sample_stderr(errors, sizes) if rule.by_size else unweighted_mean_stderr(errors)
        found[f"{metric}_stderr"] = float(error)
    return found


def _items_of(task: Any, samples: Sequence[dict[str, Any]]) -> ItemResults:
    """Return what lm-eval has measured on each item, of metrics that are means of some kind."""
    from lm_eval.api.metrics import bits_per_byte, mean, perplexity, weighted_perplexity

    kinds: dict[Any, Kind] = {
        mean: "mean",
        perplexity: "perplexity",
        weighted_perplexity: "perplexity",
        bits_per_byte: "bits",
    }
    filters: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        filters.setdefault(sample["filter"], []).append(sample)
    metrics = {}
    for filter_, answered in filters.items():
        for metric in answered[0]["metrics"]:
            kind = kinds.get(task.aggregation().get(metric, mean))
            if kind is None or not all(metric in sample for sample in answered):
                continue
            found = [sample[metric] for sample in answered]
            # A log-likelihood comes with its number of words or bytes, unless each counts once.
            pairs = [value if isinstance(value, tuple) else (value, None) for value in found]
            sign = 1 if kind == "mean" else -1
            metrics[_metric_name(metric, filter_)] = MetricItems(
                kind=kind,
                values=tuple(sign * float(value) for value, _ in pairs),
                weights=None if pairs[0][1] is None else tuple(float(weight) for _, weight in pairs),
            )
    hashes = [sample["doc_hash"][:16] for sample in next(iter(filters.values()))]
    return ItemResults(items=numbered(hashes), metrics=metrics)


def _group_metrics(group: Any, tasks: Mapping[str, ItemResults], also: str | None) -> dict[str, GroupMetric]:
    """Return how the metrics of a group follow from its tasks', also where groups are between them.

    ``also`` is a metric that the group's file does not average; it is, as the first one that it does.
    """
    members = [task.task_name for task in group.get_all_tasks()]
    every = {metric for task in members for metric in tasks[task].metrics}
    rules: list[tuple[str, bool]] = []
    for rule in group.aggregate_metric_list:
        wanted = {_metric_name(rule.metric, filter_) for filter_ in rule.filter_list or ["none"]}
        rules += [(metric, rule.weight_by_size) for metric in sorted(every & wanted)]
    if also in every and also not in dict(rules):
        rules.append((also, group.aggregate_metric_list[0].weight_by_size))
    return {
        metric: GroupMetric(
            members=tuple((task, metric) for task in members if metric in tasks[task].metrics),
            by_size=by_size,
        )
        for metric, by_size in rules
    }
