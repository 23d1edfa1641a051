"""The memory that the tasks of a run will take in their pods, estimated before it is submitted."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from core.data.locations import locate
from core.quantities import parse_bytes
from core.scratch import scratch_folder
from core.settings.addresses import hub_address, is_head, registry_address
from core.settings.calibration import Precision
from core.settings.prune import decides_on_model, slices_or_ranks
from core.storage.publication import open_publication

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from core.settings.cluster import ComponentName
    from core.settings.model import ModelSettings
    from core.settings.schema import Settings
    from core.settings.training import TrainingSettings
    from core.steps.footprint import Footprint

log = logging.getLogger(__name__)

_PROCESS_BYTES = 1_500_000_000
"""Python with its libraries; with an accelerator's, about twice that."""
_TIMEOUT_S = 5.0


def base_config(model: "ModelSettings") -> "PreTrainedConfig | None":
    """Return the base model's config without its weights; None if it cannot be read here."""
    from core.model.checkpoint import Checkpoint

    hub = hub_address(model.base)
    try:
        if registry_address(model.base) or is_head(model.base):
            return None
        if hub is None and "://" in model.base:
            with scratch_folder() as scratch:
                folder = open_publication(model.base).fetch(scratch, only=["config.json"])
                return Checkpoint(folder).config
        location = None if hub else locate(model.base)
        if location is None:
            from huggingface_hub import HfApi

            name, revision = hub or (model.base, "")
            # This asks once, where a download would ask five times and wait in between.
            wanted = revision or model.revision or None
            commit = HfApi().model_info(name, revision=wanted, timeout=_TIMEOUT_S).sha
            location = Path(HfApi().hf_hub_download(name, "config.json", revision=commit)).parent
        return Checkpoint(location).config if location.is_dir() else None
    except Exception as error:  # whatever the hub's client raises: this is a service beside
        log.debug("the config of %s cannot be read here: %s", model.base, error)
        return None


def needs_of_tasks(config: "PreTrainedConfig", settings: "Settings") -> "dict[ComponentName, Footprint]":
    """Estimate the tasks that hold a model: the largest of all phases each.

    Args:
        config: Of the base model.
        settings: Of the run. ``auto`` precision counts as bfloat16 on accelerators, else as float32; a
            micro-batch or batch of 0 as 1.
    """
    from core.steps.deciding import search_footprint
    from core.steps.footprint import evaluation_footprint, scoring_footprint
    from core.steps.prune_footprint import (
        cut_footprint,
        distillation_footprint,
        masks_footprint,
        most_at_once,
        repair_footprint,
        writing_footprint,
    )

    def on(component: "ComponentName") -> tuple[str, Precision]:
        gpu = settings.cluster.gpus_of(component, gpu_task=True) > 0
        return ("cuda", "bfloat16") if gpu else ("cpu", "float32")

    def free(component: "ComponentName") -> int:
        return max(0, parse_bytes(settings.cluster.of(component).memory) - _PROCESS_BYTES)

    def settled(precision: Precision, component: "ComponentName") -> Precision:
        return on(component)[1] if precision == "auto" else precision

    needs: dict[ComponentName, Footprint] = {}
    stored_bytes = 4 if settings.model.dtype_between_phases == "float32" else 2
    calibration, training, evaluation = settings.calibration, settings.training, settings.evaluation
    prune, smaller = settings.prune.applied(), _after_first_phase(config, settings)

    def measuring(component: "ComponentName") -> "Footprint":
        return scoring_footprint(
            config,
            replace(calibration, precision=settled(calibration.precision, component)),
            prune,
            device=on(component)[0],
            free_bytes=free(component),
            stored_bytes=stored_bytes,
        )

    needs["calibrate"] = measuring("calibrate")
    measured = replace(calibration, precision=settled(calibration.precision, "prune-step"))
    kind = on("prune-step")[0]
    decided = replace(calibration, precision=settled(calibration.precision, "score-layers"))
    deciding = on("score-layers")[0]
    if prune.method == "sheared-llama":
        decided = replace(decided, micro_batch=calibration.micro_batch or 1)
        needs["score-layers"] = masks_footprint(
            config, decided, prune, device=deciding, stored_bytes=stored_bytes
        )
    elif slices_or_ranks(prune):
        needs["score-layers"] = repair_footprint(
            config,
            decided,
            prune,
            device=deciding,
            free_bytes=free("score-layers"),
            stored_bytes=stored_bytes,
        )
    elif decides_on_model(prune):
        needs["score-layers"] = search_footprint(
            config,
            decided,
            device=deciding,
            batch=calibration.micro_batch or 1,
            stored_bytes=stored_bytes,
        )
    elif prune.steps_per_phase != 1:  # it measures again before each step after the first
        needs["score-layers"] = measuring("score-layers")
    needs["prune-step"] = cut_footprint(config, prune, device=kind, stored_bytes=stored_bytes)
    if prune.repair != "none":
        repair = repair_footprint(
            config,
            measured,
            prune,
            device=kind,
            free_bytes=free("prune-step"),
            stored_bytes=stored_bytes,
        )
        needs["prune-step"] = needs["prune-step"].or_else(repair)
    if prune.generates:
        component: ComponentName = "score-layers" if slices_or_ranks(prune) else "prune-step"
        device, precision = on(component)[0], settled(calibration.precision, component)
        written = replace(calibration, precision=precision)
        writing = writing_footprint(config, written, most_at_once(calibration, prune) or 1, device=device)
        needs[component] = needs.get(component, writing).or_else(writing)
    if prune.distill_steps:
        distilled = distillation_footprint(
            smaller,
            config,
            replace(measured, micro_batch=calibration.micro_batch or 1),
            prune,
            device=kind,
            stored_bytes=stored_bytes,
        )
        needs["prune-step"] = needs["prune-step"].or_else(distilled)
    if training.total_steps:
        device, precision = on("recover-train")[0], settled(training.precision, "recover-train")
        needs["recover-train"] = _training_need(config, smaller, settings, device, precision, stored_bytes)
    needs["evaluate"] = evaluation_footprint(
        config,
        replace(
            evaluation,
            batch_size=evaluation.batch_size or 1,
            precision=settled(evaluation.precision, "evaluate"),
        ),
        device=on("evaluate")[0],
        stored_bytes=stored_bytes,
    )
    return needs


def _training_need(
    config: "PreTrainedConfig",
    smaller: "PreTrainedConfig",
    settings: "Settings",
    device: str,
    precision: Precision,
    stored_bytes: int,
) -> "Footprint":
    """Return what recover-train takes: of the model, and of what teaches it, one after the other."""
    from core.model.build import model_shape
    from core.steps.data_needs import ROW_BYTES
    from core.steps.footprint import training_footprint
    from core.steps.lessons import lessons_footprint
    from core.steps.training_plan import TrainingPlan, rank_footprint

    training = settings.training
    gpus = settings.cluster.gpus_of("recover-train", gpu_task=True)
    ranks = ((training.ranks or gpus) if gpus else 1) * training.nodes
    sharded = ranks > 1 and training.sharding != "none" and not training.lora_rank

    def need(
        trained: "PreTrainedConfig", dense: "PreTrainedConfig | None", own: "TrainingSettings"
    ) -> "Footprint":
        alone = replace(own, micro_batch=own.micro_batch or 1, precision=precision)
        whole = training_footprint(trained, dense, alone, device=device, stored_bytes=stored_bytes)
        plan = TrainingPlan(settings=alone, ranks=ranks, sharded=sharded)  # the least that a GPU needs
        return rank_footprint(whole, model_shape(trained), plan)

    found = need(
        smaller,
        config if (training.teacher, training.teacher_logits) == ("base", "live") else None,
        training,
    )
    if training.teacher_logits == "stored":
        reading = lessons_footprint(config, replace(training, precision=precision), 1, device=device)
        disk_bytes = found.disk_bytes + _lessons_bytes(config, settings)
        disk_bytes += stored_bytes * model_shape(config).num_params()
        found = replace(found.or_else(reading), disk_bytes=disk_bytes)
    if (of_teacher := training.of_teacher) is not None:
        taught = need(config, None, of_teacher)
        rows = ROW_BYTES * of_teacher.total_steps * training.global_batch * training.sequence_length
        found = found.or_else(replace(taught, disk_bytes=taught.disk_bytes + rows))
    return found


def shortages(needs: "Mapping[ComponentName, Footprint]", settings: "Settings") -> Iterator[str]:
    """Yield where the cluster's settings give a task less than it needs."""
    for component, footprint in needs.items():
        pod, host = settings.cluster.of(component), host_bytes(component, footprint, settings)
        for name, needed in (("memory", host), ("scratch", footprint.disk_bytes)):
            given = getattr(pod, name)
            if given and needed > parse_bytes(given):
                wanted = math.ceil(1.2 * needed / 2**30)
                yield (
                    f"{component} needs about {needed / 1e9:.1f} GB of {name}, and its pods get {given}. "
                    f"Set cluster.components.{component}.{name}={wanted}Gi or more."
                )


def host_bytes(component: "ComponentName", footprint: "Footprint", settings: "Settings") -> int:
    """Return what a task takes of its pod's memory, whether it has accelerators or not."""
    gpus = settings.cluster.gpus_of(component, gpu_task=True)
    if not gpus:
        asked = {"recover-train": settings.training.ranks, "evaluate": settings.evaluation.ranks}
        if (ranks := asked.get(component, 0)) > 1:  # and the process that starts them
            return (1 + ranks) * _PROCESS_BYTES + ranks * footprint.device_bytes + footprint.host_bytes
        return _PROCESS_BYTES + footprint.device_bytes
    processes = 1 + gpus if gpus > 1 and component in ("recover-train", "evaluate") else 1
    return 2 * _PROCESS_BYTES * processes + footprint.host_bytes


def summary_line(needs: "Mapping[ComponentName, Footprint]", settings: "Settings") -> str:
    """Return one line that says what each task takes, and where."""
    parts = [
        f"{component} {footprint.device_bytes / 1e9:.1f} GB" + _where(component, settings)
        for component, footprint in needs.items()
    ]
    return "estimated memory: " + ", ".join(parts)


def _where(component: "ComponentName", settings: "Settings") -> str:
    gpus = settings.cluster.gpus_of(component, gpu_task=True)
    if component == "recover-train" and gpus > 1:
        return f" on each of its {gpus} GPUs"
    return " on its GPU" if gpus else ""


def _lessons_bytes(config: "PreTrainedConfig", settings: "Settings") -> int:
    """Return what stored lessons take, at most: all tokens of the largest phase are trained."""
    from core.pruning.phases import phase_steps
    from core.training.lessons import bytes_a_position

    training = settings.training
    steps = max(phase_steps(training.total_steps, settings.prune.phases))
    tokens = steps * training.global_batch * training.sequence_length
    return tokens * bytes_a_position(config.vocab_size, training.teacher_top_k)


def _after_first_phase(config: "PreTrainedConfig", settings: "Settings") -> "PreTrainedConfig":
    """Return the config of a model of the size after phase 1, the largest that is trained: narrower MLPs."""
    from core.model.build import model_shape
    from core.model.config import config_with_layers
    from core.pruning.phases import phase_sizes

    shape, prune = model_shape(config), settings.prune
    target = prune.target_params(shape.num_params())
    size = phase_sizes(shape.num_params(), target, prune.phases, prune.phase_sizes)[0]
    narrower = (shape.num_params() - size) / len(shape.layers) / shape.mlp_channel_params
    layers = [replace(layer, mlp_width=max(1, layer.mlp_width - round(narrower))) for layer in shape.layers]
    return config_with_layers(config, layers)
