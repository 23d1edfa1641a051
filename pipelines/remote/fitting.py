"""Whether a node may and can take a pod: labels, taints and resources, as the scheduler compares them."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from core.steps.check_pod import Finding
from pipelines.remote.probe import Pod

_KEEPING_OFF = ("NoSchedule", "NoExecute")


def fitting(pods: Sequence[Pod], nodes: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Say which pods no node can take, and why, and that the others fit.

    What other pods use at the moment is left aside: they end.
    """
    fits, refused = list[str](), defaultdict[str, list[str]](list)
    for pod in pods:
        reasons = [misfit(pod, node) for node in nodes]
        if "" in reasons:
            fits.append(pod.component)
            continue
        counted = Counter(reasons).most_common(4)
        why = "; ".join(f"{number} of {len(nodes)}: {reason}" for reason, number in counted)
        refused[why or "there are none"].append(pod.component)
    found = [
        Finding(
            check="nodes",
            state="fix",
            said=f"no node can take {', '.join(components)} ({why}). Correct the selectors and tolerations "
            "of cluster, lower its requests (cluster.components has those of one component), or add nodes; "
            "where nodes are added on demand, check that they would fit.",
        )
        for why, components in refused.items()
    ]
    if fits:
        found.insert(0, Finding(check="nodes", state="ok", said=f"there are nodes for {', '.join(fits)}"))
    return found


def misfit(pod: Pod, node: Mapping[str, Any]) -> str:
    """Return why a node cannot take a pod, "" if it can."""
    labels = node["metadata"].get("labels", {})
    for key, value in pod.selector.items():
        if labels.get(key) != value:
            return f"the label {key} is not {value}"
    for taint in node.get("spec", {}).get("taints", ()):
        if taint["effect"] in _KEEPING_OFF and not any(_tolerates(t, taint) for t in pod.tolerations):
            value = f"={taint['value']}" if taint.get("value") else ""
            return f"the taint {taint['key']}{value}:{taint['effect']} is not tolerated"
    allocatable = node.get("status", {}).get("allocatable", {})
    for name, wanted in pod.requests.items():
        has = allocatable.get(name, "0")
        if parse_quantity(has) < parse_quantity(wanted):
            return f"it has {has} of the {wanted} of {name}"
    return ""


def _tolerates(toleration: Mapping[str, str], taint: Mapping[str, str]) -> bool:
    if toleration.get("effect", taint["effect"]) != taint["effect"]:
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key", taint["key"]) == taint["key"]
    return (toleration["key"], toleration.get("value", "")) == (taint["key"], taint.get("value", ""))
