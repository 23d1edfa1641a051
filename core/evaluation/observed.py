"""What was measured on each item, as a comparison in pairs takes it."""

from collections.abc import Mapping

from core.evaluation.items import Items
from core.evaluation.significance import Observations


def observed_text(items: Items, name: str) -> Observations | None:
    """Return the windows of a text, by the metric of its name; None if it was not measured."""
    found = items.texts.get(name)
    if found is None:
        return None
    metric = found.metrics[name]
    return Observations(ids=found.items, values=metric.values, weights=metric.weights or ())


def observed(items: Items, task: str, metric: str) -> dict[str, Observations]:
    """Return the items of a task's or a group's metric, by task; {} if it is no mean over items."""
    if (results := items.tasks.get(task)) is not None:
        found = results.metrics.get(metric)
        if found is None or found.kind != "mean":
            return {}
        return {task: Observations(ids=results.items, values=found.values)}
    group = items.groups.get(task, {}).get(metric)
    if group is None:
        return {}
    members = {name: observed(items, name, of) for name, of in group.members}
    if not all(len(each) == 1 for each in members.values()):
        return {}
    lists = {name: found for each in members.values() for name, found in each.items()}
    if not group.by_size:
        return lists
    ids = [f"{name}/{item}" for name, found in lists.items() for item in found.ids]
    return {task: Observations(ids=ids, values=[x for found in lists.values() for x in found.values])}


def can_be_averaged(items: Items, scores: Mapping[str, Mapping[str, Observations]]) -> bool:
    """Return whether the mean over tasks can be compared in pairs, as the mean of their lists of items.

    Not so where a task has several lists, or is a member of another: its items would be drawn twice.

    Args:
        items: All of an evaluation.
        scores: Task to what ``observed`` says of it.
    """
    members = {
        name for task in scores for of in items.groups.get(task, {}).values() for name, _ in of.members
    }
    return not members & scores.keys() and all(found.keys() == {task} for task, found in scores.items())
