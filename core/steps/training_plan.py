"""How a phase is trained so that it fits into memory: by how many ranks, and what each of them holds."""

import functools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from core.errors import SettingsError, TrainingError
from core.machine.memory import available_bytes
from core.model.build import model_shape
from core.steps.footprint import MOST_TOKENS, Footprint, check_fit, gigabytes, training_footprint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from core.model.shape import ModelShape
    from core.settings.training import TrainingSettings
    from core.training.parallel.nodes import Meeting

log = logging.getLogger(__name__)

_PASSING = 2**30
"""Moments on their way through the device, where they are kept by the host."""
_MOST_RANKS = 64


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How a phase is trained.

    Attributes:
        settings: With the ``micro_batch`` of a rank; ``moments`` and ``layer_inputs`` are ``device`` or
            ``host``.
        ranks: Number of processes, on all nodes together.
        sharded: Whether they share out weights, gradients and moments.
    """

    settings: "TrainingSettings"
    ranks: int = 1
    sharded: bool = False


def planned_training(
    config: "PreTrainedConfig", dense: "PreTrainedConfig | None", settings: "TrainingSettings", device: str
) -> TrainingPlan:
    """Choose how to train with the memory that is free; logs what will be taken.

    A single rank keeps the optimizer's moments on the device if they fit there, else in host memory. Several
    ranks hold all weights each if they fit, as that takes the least communication, else a part. If that is
    not enough, what gradient checkpointing keeps goes to host memory, too.

    Args:
        config: Of the model that is trained.
        dense: Of its teacher, if it has one.
        settings: ``micro_batch`` 0 takes the largest divisor of a rank's share of the batch that fits, with a
            fifth of the memory to spare, and that still makes training faster.
        device: Type of the device.

    Raises:
        SettingsError: If there are fewer GPUs than ranks.
        OutOfMemoryError: If it cannot fit.
    """
    free, ranks = available_bytes(device), number_of_ranks(settings, device)
    if device == "cpu":
        free //= ranks // settings.nodes  # they share the machine
    share = settings.global_batch // ranks
    wanted = settings.micro_batch or max(1, MOST_TOKENS.get(device, 32768) // settings.sequence_length)
    sizes = [size for size in range(min(wanted, share), 0, -1) if share % size == 0]

    shape = model_shape(config)

    @functools.cache
    def by_settings(settings: "TrainingSettings", taught: bool) -> Footprint:
        return training_footprint(config, dense if taught else None, settings, device=device)

    def needed(plan: TrainingPlan, *, taught: bool = True) -> Footprint:
        return rank_footprint(by_settings(replace(plan.settings, moments="device"), taught), shape, plan)

    def candidates(settings: "TrainingSettings", sizes: list[int]) -> Iterator[TrainingPlan]:
        """Leave out what would move to a host without room for it, unless that is asked for."""
        for way in _ways(settings, ranks, device):
            moved = way.settings.moments == "host" != settings.moments
            moved |= way.settings.layer_inputs == "host" != settings.layer_inputs
            for size in sizes:
                plan = _with(way, size)
                if not moved or needed(plan).host_bytes <= available_bytes("cpu"):
                    yield plan

    limit = free if settings.micro_batch else 0.8 * free
    for chosen in candidates(settings, sizes[:1] if settings.micro_batch else sizes):
        if needed(chosen).device_bytes <= limit:
            break
    size = chosen.settings.micro_batch
    _tell(chosen, needed(_with(_ways(settings, ranks, device)[0], size)), free)

    def alternatives() -> "Iterator[tuple[str, Footprint]]":
        smaller = [other for other in sizes if other < size]
        tried = [_with(chosen, other) for other in smaller]
        if not settings.gradient_checkpointing:
            tried += candidates(replace(settings, gradient_checkpointing=True), [size, *smaller])
        for plan in tried:
            text = f"training.micro_batch={plan.settings.micro_batch}"
            if plan.settings.gradient_checkpointing != settings.gradient_checkpointing:
                text += ", training.gradient_checkpointing=true"
            yield text, needed(plan)
        if device == "cpu" or settings.sharding == "none":
            return
        whole = replace(chosen.settings, moments="device", layer_inputs="device", gradient_checkpointing=True)
        for more in range(ranks + settings.nodes, _MOST_RANKS + 1, settings.nodes):
            if settings.global_batch % more == 0:
                sharded = replace(chosen, ranks=more, sharded=True, settings=whole)
                gpus = f"cluster.components.recover-train.gpus={more // settings.nodes}"
                text = f"{gpus}, training.gradient_checkpointing=true"
                yield f"{text}, training.micro_batch=1", needed(_with(sharded, 1))

    def without_teacher() -> "Iterator[tuple[str, Footprint]]":
        if dense is None:
            return
        for text, other in (
            ("training.teacher_logits=stored", replace(settings, teacher_logits="stored", hidden_weight=0.0)),
            ("training.teacher=none", replace(settings, teacher="none", hidden_weight=0.0)),
        ):
            yield text, needed(_with(_ways(other, ranks, device)[-1], 1), taught=False)

    check_fit("recover-train", needed(chosen), free, device, alternatives(), without_teacher())
    for setting in _without_effect(settings, chosen, device):
        log.warning("%s", setting)
    return chosen


def _without_effect(settings: "TrainingSettings", plan: TrainingPlan, device: str) -> Iterator[str]:
    """Yield what is set and changes nothing here: a recipe may be for other machines, too."""
    if settings.sharding == "full" and not plan.sharded:
        why = "a single rank trains" if plan.ranks == 1 else "adapters are trained"
        yield f"training.sharding=full has no effect: {why}, and each rank holds all weights"
    if device == "cpu":
        named = {"moments": settings.moments, "layer_inputs": settings.layer_inputs}
        for name in (name for name, place in named.items() if place == "host"):
            yield f"training.{name}=host has no effect on a CPU, whose memory is the host's"
    elif settings.moments == "host" and plan.settings.moments != "host":
        advice = "" if plan.sharded or settings.lora_rank else ". training.sharding=full shares them out"
        yield (
            f"training.moments=host has no effect: {plan.ranks} ranks train, and each keeps its moments on "
            f"its GPU{advice}"
        )


def number_of_ranks(settings: "TrainingSettings", device: str) -> int:
    """Return how many processes train, on all nodes together.

    Raises:
        SettingsError: If there are fewer GPUs than ``training.ranks``.
    """
    if device == "cpu":
        return (settings.ranks or 1) * settings.nodes
    gpus = torch.cuda.device_count()
    if settings.ranks > gpus:
        raise SettingsError(
            [
                f"training.ranks={settings.ranks}, but the task has {gpus} GPUs. Request more with "
                f"cluster.components.recover-train.gpus={settings.ranks}, or leave ranks at 0: all there are."
            ]
        )
    if settings.ranks:
        return settings.ranks * settings.nodes
    share = settings.global_batch // settings.nodes
    ranks = next(number for number in range(max(gpus, 1), 0, -1) if share % number == 0)
    if ranks < gpus:
        log.warning(
            "%d of %d GPUs train: the others cannot have equal parts of training.global_batch=%d sequences",
            *(ranks, gpus, settings.global_batch),
        )
    return ranks * settings.nodes


def agreed_plan(plan: TrainingPlan, meeting: "Meeting") -> TrainingPlan:
    """Return the plan that all nodes follow: with as little memory as the one with the least needs.

    Raises:
        TrainingError: If they have different numbers of GPUs.
    """
    mine = [plan.ranks, plan.sharded, plan.settings.micro_batch]
    ranks, sharded, sizes = zip(*map(json.loads, meeting.share("plan", json.dumps(mine))), strict=True)
    if len(set(ranks)) > 1:
        found = ", ".join(str(number // meeting.place.nodes) for number in ranks)
        raise TrainingError(f"the nodes have {found} GPUs: they must have the same number each.")
    return replace(_with(plan, min(sizes)), sharded=any(sharded))


def rank_footprint(whole: Footprint, shape: "ModelShape", plan: TrainingPlan) -> Footprint:
    """Return what a rank takes.

    Args:
        whole: What a process takes that trains alone with the plan's settings.
        shape: The model's.
        plan: The plan.
    """
    parts, host_bytes, disk_bytes = dict(whole.parts), whole.host_bytes, whole.disk_bytes
    waiting = whole.waiting_bytes * plan.ranks // plan.settings.nodes
    if plan.ranks > 1:
        if plan.settings.optimizer_state == "carry":
            host_bytes += parts["optimizer"]  # of the process that starts the ranks, as are the weights
        # What the ranks hand back, and the state that they resume from once it is put together.
        disk_bytes += 2 * (parts["weights"] + parts["optimizer"])
    if plan.settings.moments == "host":
        waiting += whole.moments_bytes
        parts["optimizer"] = min(parts["optimizer"], _PASSING)
    if plan.sharded:
        bfloat16 = plan.settings.precision == "bfloat16"
        largest = max(map(shape.layer_num_params, shape.layers))
        for name in ("weights", "optimizer", "gradients"):
            parts[name] = -(-parts[name] // plan.ranks)
        # Whole while they are used: what is outside the layers, with its gradients; two layers, as the next
        # one arrives early; the gradients of one, and what is sent of them.
        parts["gathered"] = 8 * shape.outside_params + (10 if bfloat16 else 16) * largest
        if bfloat16:  # copies for autocast, which are let go with each layer
            kept = 2 * (shape.num_params() - shape.outside_params)
            parts["activations and logits"] = max(0, parts["activations and logits"] - kept)
    # A process that trains alone has let go of the weights by then; that which starts ranks has not.
    host_bytes = host_bytes + waiting if plan.ranks > 1 else max(host_bytes, waiting)
    return replace(whole, parts=parts, host_bytes=host_bytes, disk_bytes=disk_bytes)


def _ways(settings: "TrainingSettings", ranks: int, device: str) -> list[TrainingPlan]:
    """Return plans from the fastest one to that with the least memory."""
    places: dict[str, list[Literal["device", "host"]]]
    places = {"auto": ["device", "host"], "device": ["device"], "host": ["host"]}
    here = places["device"]
    inputs = places[settings.layer_inputs] if settings.gradient_checkpointing and device != "cpu" else here
    moments = places[settings.moments] if ranks == 1 and device != "cpu" else here
    sharding = {"none": [False], "full": [True], "auto": [False, True]}[settings.sharding]
    if ranks == 1 or settings.lora_rank:  # what is trained with it is small
        sharding = [False]
    return [
        TrainingPlan(settings=replace(settings, layer_inputs=at, moments=kept), ranks=ranks, sharded=sharded)
        for at in inputs
        for kept in moments
        for sharded in sharding
    ]


def _with(plan: TrainingPlan, micro_batch: int) -> TrainingPlan:
    return replace(plan, settings=replace(plan.settings, micro_batch=micro_batch))


def _tell(plan: TrainingPlan, simplest: Footprint, free: int) -> None:
    """Log what was chosen and why; ``simplest`` is what the fastest way would take."""
    size = plan.settings.micro_batch
    too_much = f"it would take {gigabytes(simplest.device_bytes)} of {gigabytes(free)}"
    how = []
    if plan.sharded:
        why = "training.sharding=full" if plan.settings.sharding == "full" else f"whole, {too_much}"
        how.append(f"weights, gradients and optimizer are shared out (FSDP2): {why}")
    elif plan.ranks > 1:
        how.append("each holds all weights: they fit, and gradients are added up once a step")
    in_host = [
        name
        for name, place in (
            ("the optimizer's moments", plan.settings.moments),
            ("the inputs of layers", plan.settings.layer_inputs),
        )
        if place == "host"
    ]
    if in_host:
        how.append(f"{' and '.join(in_host)} stay in host memory: {too_much} otherwise")
    if not how:
        log.info("training: %d sequences at once", size)
        return
    ranks = f"{plan.ranks} ranks" + (f" on {plan.settings.nodes} nodes" if plan.settings.nodes > 1 else "")
    log.info("training: %s, %d sequences at once on each; %s", ranks, size, "; ".join(how))
