"""Memory and scratch of the pods of a run, from the plan of what its tasks take."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from core.quantities import parse_bytes
from core.settings.cluster import AUTO, ComponentSettings
from core.steps.needs import host_bytes

if TYPE_CHECKING:
    from core.settings.cluster import ComponentName
    from core.settings.schema import Settings
    from core.steps.footprint import Footprint

_HEADROOM = 1.25
_SMALLEST_GIB = 4
_ADAPTING: tuple["ComponentName", ...] = ("calibrate", "score-layers", "prune-step")
"""Tasks that keep layers' inputs in half of the memory that they find free, and the rest on the disk."""
_BOOKKEEPING: tuple["ComponentName", ...] = ("needs-run", "finalize")
"""Tasks that read and write small files alone."""
_CARDS = {"H200": 141, "B200": 180, "H100": 80, "A100": 40, "L40": 48, "A10": 24, "L4": 24}
_CARDS |= {"V100": 16, "T4": 16}
"""Gigabytes of a card whose name does not say them; of several kinds, the smallest."""


def with_pod_sizes(
    settings: "Settings", needs: "Mapping[ComponentName, Footprint]", *, data_bytes: int = 0
) -> "Settings":
    """Return settings in which ``auto`` is a size, of all tasks that there is a plan of.

    Args:
        settings: Of the run.
        needs: What tasks take; empty if that is not known.
        data_bytes: Scratch space of prepare-data; 0 if that is not known.
    """
    cluster = settings.cluster
    own = dict(cluster.components)
    disk_bytes = {component: footprint.disk_bytes for component, footprint in needs.items()}
    if data_bytes:
        disk_bytes["prepare-data"] = data_bytes
    in_memory = (*needs, *(_BOOKKEEPING if needs else ()))
    for component in dict.fromkeys((*in_memory, *disk_bytes)):
        given = own.get(component, ComponentSettings())
        if component in in_memory and (given.memory or cluster.memory) == AUTO:
            given = replace(given, memory=_memory(component, needs.get(component), settings))
        if component in disk_bytes and asked_scratch(settings, component) == AUTO:
            given = replace(given, scratch=_size(_HEADROOM * disk_bytes[component]))
        if given != ComponentSettings():
            own[component] = given
    return replace(settings, cluster=replace(cluster, components=own))


def asked_scratch(settings: "Settings", component: "ComponentName") -> str:
    """Return the scratch volume that a component's settings ask for: a size, ``auto``, or empty."""
    own = settings.cluster.components.get(component, ComponentSettings()).scratch
    return settings.cluster.scratch if own is None else own


def too_large_for_cards(settings: "Settings", needs: "Mapping[ComponentName, Footprint]") -> Iterator[str]:
    """Yield which tasks do not fit on the card that the node selector names; training can do with less."""
    for component, footprint in needs.items():
        card = card_bytes(settings, component)
        if card and footprint.device_bytes > card and component != "recover-train":
            yield (
                f"{component} needs about {footprint.device_bytes / 1e9:.1f} GB on its GPU, and the card "
                f"that cluster.gpu_node_selector names has {card / 1e9:.0f} GB. Name another card."
            )


def pods_line(settings: "Settings", needs: "Mapping[ComponentName, Footprint]") -> str:
    """Return one line that says what memory the pods get."""
    rest = settings.cluster.of("publish").memory
    parts = [f"{component} {settings.cluster.of(component).memory}" for component in needs]
    return f"memory of the pods: {', '.join(parts)}, the larger ones of the others {rest}"


def card_bytes(settings: "Settings", component: "ComponentName") -> int:
    """Return the memory of the accelerator that a task's nodes are selected by; 0 if that is not known."""
    cluster = settings.cluster.of(component)
    if not settings.cluster.gpus_of(component, gpu_task=True):
        return 0
    names = [cluster.gpu_type, *(cluster.node_selector | cluster.gpu_node_selector).values()]
    for name in names:  # nvidia.com/mig-1g.10gb, NVIDIA-H100-80GB-HBM3, nvidia-a100-80gb
        if match := re.search(r"(\d+)gb(?![a-z])", name.lower()):
            return int(match[1]) * 10**9
    words = {word.upper() for name in names for word in re.split("[^A-Za-z0-9]+", name)}
    found = [size for card, size in _CARDS.items() if any(word.startswith(card) for word in words)]
    return found[0] * 10**9 if found else 0


def _memory(component: "ComponentName", footprint: "Footprint | None", settings: "Settings") -> str:
    if footprint is None:
        return f"{_SMALLEST_GIB}Gi"
    needed = host_bytes(component, footprint, settings)
    if component in _ADAPTING:
        needed *= 2
    card = card_bytes(settings, component)
    if component == "recover-train" and card:
        # Moments and layers' inputs that have no room on the card wait here.
        gpus = settings.cluster.gpus_of(component, gpu_task=True)
        needed += gpus * max(0, footprint.device_bytes - card)
    shared = settings.cluster.of(component).shared_memory
    return _size(_HEADROOM * needed + (parse_bytes(shared) if shared else 0))


def _size(size: float) -> str:
    return f"{max(_SMALLEST_GIB, math.ceil(size / 2**30))}Gi"
