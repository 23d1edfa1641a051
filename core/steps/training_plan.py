"""How a phase is trained so that it fits into memory: by how many ranks, and what each of them holds."""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from core.errors import SettingsError
from core.machine.memory import available_bytes
from core.model.build import model_shape
from core.steps.footprint import MOST_TOKENS, TOLERANCE, Footprint, check_fit, gigabytes, training_footprint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from core.model.shape import ModelShape
    from core.settings.training import TrainingSettings

log = logging.getLogger(__name__)

_PASSING = 2**30
"""Moments on their way through the device, where they are kept by the host."""
_MOST_RANKS = 64


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How a phase is trained.

    Attributes:
        settings: With the ``micro_batch`` of a rank, and ``moments`` as ``device`` or ``host``.
        ranks: Number of processes.
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
    ranks hold all weights each if they fit, as that takes the least communication, else a part.

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
        free //= ranks  # they share the machine
    share = settings.global_batch // ranks
    wanted = settings.micro_batch or max(1, MOST_TOKENS.get(device, 32768) // settings.sequence_length)
    sizes = [size for size in range(min(wanted, share), 0, -1) if share % size == 0]

    shape, by_settings = (
        model_shape(config),
        functools.cache(functools.partial(training_footprint, config, dense, device=device)),
    )

    def needed(plan: TrainingPlan) -> Footprint:
        return rank_footprint(by_settings(replace(plan.settings, moments="device")), shape, plan)

    plans, chosen = _ways(settings, ranks, device), None
    for plan in plans:
        to_host = plan.settings.moments == "host" != settings.moments
        if to_host and needed(_with(plan, sizes[-1])).host_bytes > available_bytes("cpu"):
            continue
        last = plan
        if not settings.micro_batch:
            fitting = (p for size in sizes if needed(p := _with(plan, size)).device_bytes <= 0.8 * free)
            chosen = next(fitting, None)
        elif needed(plan := _with(plan, sizes[0])).device_bytes * TOLERANCE <= free:
            chosen = plan
        if chosen is not None:
            break
    chosen = chosen or _with(last, sizes[0] if settings.micro_batch else 1)
    _tell(chosen, needed(_with(plans[0], chosen.settings.micro_batch)), free)

    def alternatives() -> "Iterator[tuple[str, Footprint]]":
        size = chosen.settings.micro_batch
        smaller = [other for other in sizes if other < size]
        tried = [(other, settings.gradient_checkpointing) for other in smaller]
        if not settings.gradient_checkpointing:
            tried += [(other, True) for other in (size, *smaller)]
        for other, checkpointing in tried:
            text = f"training.micro_batch={other}"
            if checkpointing != settings.gradient_checkpointing:
                text += ", training.gradient_checkpointing=true"
            yield text, needed(_with(chosen, other, checkpointing))
        if device == "cpu" or settings.sharding == "none":
            return
        whole = replace(chosen.settings, moments="device")
        for more in range(ranks + 1, _MOST_RANKS + 1):
            if settings.global_batch % more == 0:
                sharded = replace(chosen, ranks=more, sharded=True, settings=whole)
                text = f"cluster.components.recover-train.gpus={more}, training.gradient_checkpointing=true"
                yield f"{text}, training.micro_batch=1", needed(_with(sharded, 1, True))

    check_fit("recover-train", needed(chosen), free, device, alternatives())
    return chosen


def number_of_ranks(settings: "TrainingSettings", device: str) -> int:
    """Return how many processes train.

    Raises:
        SettingsError: If there are fewer GPUs than ``training.ranks``.
    """
    if device == "cpu":
        return settings.ranks or 1
    gpus = torch.cuda.device_count()
    if settings.ranks > gpus:
        raise SettingsError(
            [
                f"training.ranks={settings.ranks}, but the task has {gpus} GPUs. Request more with "
                f"cluster.components.recover-train.gpus={settings.ranks}, or leave ranks at 0: all there are."
            ]
        )
    if settings.ranks:
        return settings.ranks
    ranks = next(number for number in range(max(gpus, 1), 0, -1) if settings.global_batch % number == 0)
    if ranks < gpus:
        log.warning(
            "%d of %d GPUs train: the others cannot have equal parts of training.global_batch=%d sequences",
            *(ranks, gpus, settings.global_batch),
        )
    return ranks


def rank_footprint(whole: Footprint, shape: "ModelShape", plan: TrainingPlan) -> Footprint:
    """Return what a rank takes.

    Args:
        whole: What a process takes that trains alone with the plan's settings.
        shape: The model's.
        plan: The plan.
    """
    parts, host_bytes, disk_bytes = dict(whole.parts), whole.host_bytes, whole.disk_bytes
    if plan.ranks > 1:
        if plan.settings.optimizer_state == "carry":
            host_bytes += parts["optimizer"]  # of the process that starts the ranks, as are the weights
        # What the ranks hand back, and the state that they resume from once it is put together.
        disk_bytes += 2 * (parts["weights"] + parts["optimizer"])
    if plan.settings.moments == "host":
        host_bytes = max(host_bytes, parts["optimizer"])
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
    return replace(whole, parts=parts, host_bytes=host_bytes, disk_bytes=disk_bytes)


def _ways(settings: "TrainingSettings", ranks: int, device: str) -> list[TrainingPlan]:
    """Return plans from the fastest one to that with the least memory."""
    on_device, in_host = (
        TrainingPlan(settings=replace(settings, moments=place), ranks=ranks) for place in ("device", "host")
    )
    if ranks > 1 and settings.lora_rank:
        return [on_device]  # what is trained is small
    if ranks > 1:
        sharded = replace(on_device, sharded=True)
        return {"none": [on_device], "full": [sharded], "auto": [on_device, sharded]}[settings.sharding]
    moments = "device" if device == "cpu" else settings.moments
    return {"device": [on_device], "host": [in_host], "auto": [on_device, in_host]}[moments]


def _with(plan: TrainingPlan, micro_batch: int, checkpointing: bool | None = None) -> TrainingPlan:
    if checkpointing is None:
        checkpointing = plan.settings.gradient_checkpointing
    changed = replace(plan.settings, micro_batch=micro_batch, gradient_checkpointing=checkpointing)
    return replace(plan, settings=changed)


def _tell(plan: TrainingPlan, simplest: Footprint, free: int) -> None:
    """Log what was chosen and why; ``simplest`` is what the fastest way would take."""
    size = plan.settings.micro_batch
    too_much = f"whole, it would take {gigabytes(simplest.device_bytes)} of {gigabytes(free)}"
    if plan.sharded:
        how = "weights, gradients and optimizer are shared out (FSDP2)"
        why = "training.sharding=full" if plan.settings.sharding == "full" else too_much
    elif plan.ranks > 1:
        how, why = "each holds all weights", "they fit, and gradients are added up once a step"
    elif plan.settings.moments == "host":
        how, why = "the optimizer's moments stay in host memory", too_much
    else:
        log.info("training: %d sequences at once", size)
        return
    log.info("training: %d ranks, %d sequences at once on each; %s: %s", plan.ranks, size, how, why)
