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
from core.settings.prune import decides_on_model
from core.storage.publication import open_publication

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from core.settings.cluster import ComponentName
    from core.settings.model import ModelSettings
    from core.settings.schema import Settings
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
    from core.model.build import model_shape
    from core.steps.deciding import search_footprint
    from core.steps.footprint import evaluation_footprint, scoring_footprint, training_footprint
    from core.steps.prune_footprint import distillation_footprint, masks_footprint, repair_footprint
    from core.steps.training_plan import TrainingPlan, rank_footprint

    def on(component: "ComponentName") -> tuple[str, Precision]:
        gpu = settings.cluster.gpus_of(component, gpu_task=True) > 0
        return ("cuda", "bfloat16") if gpu else ("cpu", "float32")

    def settled(precision: Precision, component: "ComponentName") -> Precision:
        return on(component)[1] if precision == "auto" else precision

    needs: dict[ComponentName, Footprint] = {}
    stored_bytes = 4 if settings.model.dtype_between_phases == "float32" else 2
    calibration, training, evaluation = settings.calibration, settings.training, settings.evaluation
    pod = parse_bytes(settings.cluster.of("calibrate").memory)
    needs["calibrate"] = scoring_footprint(
        config,
        replace(calibration, precision=settled(calibration.precision, "calibrate")),
        settings.prune.applied(),
        device=on("calibrate")[0],
        free_bytes=pod - _PROCESS_BYTES,
        stored_bytes=stored_bytes,
    )
    prune, smaller = settings.prune.applied(), _after_first_phase(config, settings)
    measured = replace(calibration, precision=settled(calibration.precision, "prune-step"))
    kind = on("prune-step")[0]
    decided = replace(calibration, precision=settled(calibration.precision, "score-layers"))
    deciding = on("score-layers")[0]
    if prune.method == "sheared-llama":
        decided = replace(decided, micro_batch=calibration.micro_batch or 1)
        needs["score-layers"] = masks_footprint(
            config, decided, prune, device=deciding, stored_bytes=stored_bytes
        )
    elif prune.method == "slicegpt":
        pod = parse_bytes(settings.cluster.of("score-layers").memory)
        needs["score-layers"] = repair_footprint(
            config, decided, prune, device=deciding, free_bytes=pod - _PROCESS_BYTES
        )
    elif decides_on_model(prune):
        needs["score-layers"] = search_footprint(
            config,
            decided,
            device=deciding,
            batch=calibration.micro_batch or 1,
            stored_bytes=stored_bytes,
        )
    if prune.repair != "none":
        pod = parse_bytes(settings.cluster.of("prune-step").memory)
        needs["prune-step"] = repair_footprint(
            config, measured, prune, device=kind, free_bytes=pod - _PROCESS_BYTES
        )
    if prune.distill_steps:
        distilled = distillation_footprint(
            smaller,
            config,
            replace(measured, micro_batch=calibration.micro_batch or 1),
            prune,
            device=kind,
        )
        needs["prune-step"] = max(
            needs.get("prune-step", distilled), distilled, key=lambda need: need.device_bytes
        )
    if training.total_steps:
        alone = replace(
            training,
            micro_batch=training.micro_batch or 1,
            precision=settled(training.precision, "recover-train"),
        )
        whole = training_footprint(
            smaller,
            config if training.teacher == "base" else None,
            alone,
            device=on("recover-train")[0],
            stored_bytes=stored_bytes,
        )
        gpus = settings.cluster.gpus_of("recover-train", gpu_task=True)
        ranks = (training.ranks or gpus) if gpus else 1
        sharded = ranks > 1 and training.sharding != "none" and not training.lora_rank
        plan = TrainingPlan(settings=alone, ranks=ranks, sharded=sharded)  # the least that a GPU needs
        needs["recover-train"] = rank_footprint(whole, model_shape(smaller), plan)
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


def shortages(needs: "Mapping[ComponentName, Footprint]", settings: "Settings") -> Iterator[str]:
    """Yield where the cluster's settings give a task less than it needs."""
    for component, footprint in needs.items():
        pod = settings.cluster.of(component)
        on_gpu = settings.cluster.gpus_of(component, gpu_task=True) > 0
        host = (
            2 * _PROCESS_BYTES + footprint.host_bytes if on_gpu else _PROCESS_BYTES + footprint.device_bytes
        )
        for name, needed in (("memory", host), ("scratch", footprint.disk_bytes)):
            given = getattr(pod, name)
            if given and needed > parse_bytes(given):
                wanted = math.ceil(1.2 * needed / 2**30)
                yield (
                    f"{component} needs about {needed / 1e9:.1f} GB of {name}, and its pods get {given}. "
                    f"Set cluster.components.{component}.{name}={wanted}Gi or more."
                )


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
