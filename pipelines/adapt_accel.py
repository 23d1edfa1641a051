"""The DAG: prune a little, train a little, N_P times.

The number of phases is fixed when the pipeline is built, as is what else ``core.settings.parameters`` names.
Each phase is a nested pipeline of four tasks. Its evaluation is beside it: a consumer of a nested pipeline's
output waits for all of its tasks, and the next phase need not wait for an evaluation.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import compiler, dsl
from kfp.dsl.base_component import BaseComponent

from components.calibrate import calibrate
from components.evaluate import evaluate
from components.finalize import finalize
from components.needs_run import needs_run
from components.prepare_data import prepare_data
from components.prune_step import prune_step
from components.publish import publish
from components.recover_train import recover_train
from components.resolve_base import resolve_base
from components.score_layers import score_layers
from core.errors import SettingsError
from core.scratch import scratch_folder
from core.settings.cluster import ComponentName
from core.settings.parameters import compiled_for, parameters_of, scores_on_accelerator
from core.settings.schema import Settings
from pipelines.cluster import PHASE_OF_NESTED, configure
from pipelines.ir import (
    LARGEST_WORKFLOW_BYTES,
    Document,
    heading_of,
    read_ir,
    share_components,
    workflow_bytes,
    write_ir,
)
from pipelines.resuming import skip_done_phases

_MEASURED_PHASES = (1, 9)

Place = Callable[..., dsl.PipelineTask]
"""Configures a task for the cluster: ``place(task, gpu=True, phase=1)``."""


def compile_pipeline(settings: Settings, output: Path) -> None:
    """Write the pipeline as KFP IR (YAML), to be uploaded to a cluster; equal settings give equal bytes.

    Raises:
        SettingsError: If ``prune.phases`` is more than a cluster can hold.
    """
    phases = settings.prune.phases
    if phases > _MEASURED_PHASES[-1] and phases > (most := largest_phases(settings)):
        raise SettingsError(
            [
                f"prune.phases={phases} exceeds {most}: with more phases the workflow and its status outgrow "
                "the 1 MiB that Argo can store. Lower prune.phases and raise prune.steps_per_phase, or use "
                "`adapt-pruner run`, which has no such limit."
            ]
        )
    pipeline, platform, heading = _compiled(settings, phases)
    write_ir(pipeline, platform, heading, output)


def largest_phases(settings: Settings) -> int:
    """Return the most phases whose workflow Argo can store, estimated from two pipelines of few phases.

    Each phase adds the same tasks, and gzip compresses more of them better: the line through the two
    overestimates all larger pipelines.
    """
    few, more = _MEASURED_PHASES
    least, larger = (workflow_bytes(*_compiled(settings, phases)[:2]) for phases in _MEASURED_PHASES)
    return few + (LARGEST_WORKFLOW_BYTES - least) * (more - few) // (larger - least)


def _compiled(settings: Settings, phases: int) -> tuple[Document, Document, str]:
    """Return the PipelineSpec and the PlatformSpec of a number of phases, and the comments above them."""
    with scratch_folder() as folder:
        path = folder / "pipeline.yaml"
        compiler.Compiler().compile(build_pipeline(settings, phases=phases), str(path))
        pipeline, platform = read_ir(path)
        heading = heading_of(path)
    skip_done_phases(pipeline, platform, phases)
    share_components(pipeline, platform)
    return pipeline, platform, heading


def build_pipeline(settings: Settings, *, local: bool = False, phases: int | None = None) -> BaseComponent:
    """Build the pipeline; the settings become its parameters' defaults.

    Args:
        settings: The run's settings.
        local: Build for one machine, which does one task at a time anyway: no retries, and each phase waits
            for the evaluation before it, so that errors show early.
        phases: Number of phases to build instead of ``settings.prune.phases``.

    Returns:
        What ``dsl.pipeline`` returns: kfp compiles it, and ``kfp.local`` runs it when it is called.

    Raises:
        SettingsError: If one machine cannot do what they ask for.
    """
    if local and settings.training.nodes > 1:
        raise SettingsError(
            [
                f"training.nodes={settings.training.nodes} needs a cluster with Kubeflow Trainer "
                "(`adapt-pruner submit`), and this run has one machine. Set training.nodes=1."
            ]
        )
    phases = phases or settings.prune.phases
    on_cluster = functools.partial(configure, settings=settings.cluster, recipe=settings.name)
    place = _place_here if local else on_cluster
    prune = settings.prune
    phase_pipeline = _build_phase(
        place,
        gpu_scoring=scores_on_accelerator(prune),
        gpu_pruning=prune.repair != "none" or prune.distill_steps > 0,
        nodes=settings.training.nodes,
    )
    prepare = _build_preparation(place)

    defaults = parameters_of(settings)

    @dsl.pipeline(name="adapt-pruner", display_name=f"Adapt-Pruner ({phases} phases)")
    def adapt_pruner(
        base_model: str = defaults["base_model"],
        revision: str = defaults["revision"],
        target: str = defaults["target"],
        method: str = defaults["method"],
        recipe: dict = defaults["recipe"],
    ):
        """Prune a language model to the size asked for, a little at a time, with training in between.

        Args:
            base_model: The model to prune: a Hugging Face id, or s3://bucket/prefix.
            revision: Branch, tag or commit of a Hugging Face model; empty takes its default branch.
            target: Parameters that stay: a count such as 3.87B, or a share such as 80%.
            method: The pruning method: adapt-pruner, or one that it is compared with. One that runs the model
                to decide is refused where the pipeline was compiled without accelerators for that.
            recipe: All other settings, in the sections of a recipe file, but for those that are fixed in the
                compiled pipeline: prune.phases, prune.steps_per_phase, prune.widths, prune.hidden_size,
                prune.repair, prune.distill_steps, training.nodes, evaluation.speed, the section cluster.
        """
        job = dsl.PIPELINE_JOB_ID_PLACEHOLDER
        last = place(finalize(recipe=recipe, job=job), gpu=False)
        with dsl.ExitHandler(last, name="run"):
            resolved = resolve_base(
                base_model=base_model,
                revision=revision,
                target=target,
                method=method,
                recipe=recipe,
                fixed=compiled_for(settings, phases=phases),
                job=job,
                accelerated=[] if local else accelerated_sections(settings),
            )
            place(resolved, gpu=False)
            opened = {name: resolved.outputs[name] for name in ("run", "being_done_by")}
            run, base_uri = resolved.outputs["run"], resolved.outputs["base_uri"]
            needed = place(needs_run(**opened), gpu=False)
            first, gpu_publish = needed.outputs["Output"], settings.evaluation.speed
            all_phases = functools.partial(
                _prune_and_train, run, base_uri, phases, phase_pipeline, place, gpu_publish=gpu_publish
            )
            if local:
                with dsl.If(first > 0, name="not done yet"):
                    all_phases(
                        place(prepare_data(run=run, base_uri=base_uri), gpu=False).output, in_order=True
                    )
                return
            # pipelines/resuming.py adds the condition.
            prepared = prepare(run=run, base_uri=base_uri, first=first)
            all_phases(prepared.set_caching_options(False).output, in_order=False)

    return adapt_pruner


def _place_here(
    task: dsl.PipelineTask, *, gpu: bool, phase: int | str = "", nodes: int = 1
) -> dsl.PipelineTask:
    """Leave a task as it is, but for caching: this machine is all it gets."""
    return task.set_caching_options(False)


def accelerated_sections(settings: Settings) -> list[str]:
    """Return the sections of a recipe whose tasks get accelerators on the cluster."""
    components: dict[str, ComponentName] = {
        "calibration": "calibrate",
        "training": "recover-train",
        "evaluation": "evaluate",
    }
    return [
        section
        for section, component in components.items()
        if settings.cluster.gpus_of(component, gpu_task=True)
    ]


def _prune_and_train(
    run: Any,
    checkpoint_uri: Any,
    phases: int,
    phase_pipeline: BaseComponent,
    place: Place,
    data_uri: Any,
    *,
    in_order: bool,
    gpu_publish: bool,
) -> None:
    """Unroll the phases, each with its evaluation beside it, and publish the last checkpoint."""
    digits = len(str(phases))

    def measure(phase: int) -> dsl.PipelineTask:
        task = evaluate(run=run, phase=phase, checkpoint_uri=checkpoint_uri, data_uri=data_uri)
        name = f"evaluate phase {phase:0{digits}}" if phase else "evaluate dense model"
        return place(task, gpu=True, phase=phase).set_display_name(name)

    evaluations = [measure(0)]
    for phase in range(1, phases + 1):
        task = phase_pipeline(run=run, phase=phase, checkpoint_uri=checkpoint_uri, data_uri=data_uri)
        task.set_caching_options(False).set_display_name(f"phase {phase:0{digits}} of {phases}")
        if in_order:
            task.after(evaluations[-1])
        checkpoint_uri = task.output
        evaluations.append(measure(phase))
    place(publish(run=run, checkpoint_uri=checkpoint_uri), gpu=gpu_publish).after(*evaluations)


def _build_preparation(place: Place) -> BaseComponent:
    """Build the nested pipeline of what comes before all phases: KFP has conditions on those alone."""

    @dsl.pipeline(name="prepare")
    def prepare(run: dict, base_uri: str, first: int) -> str:
        """Prepare the data."""
        return place(prepare_data(run=run, base_uri=base_uri), gpu=False).output

    return prepare


def _build_phase(place: Place, *, gpu_scoring: bool, gpu_pruning: bool, nodes: int) -> BaseComponent:
    """Build the nested pipeline of one phase: a checkpoint's URI in, the pruned and recovered one's out."""

    @dsl.pipeline(name="phase")
    def phase_pipeline(run: dict, phase: int, checkpoint_uri: str, data_uri: str) -> str:
        """Prune a little, then train a little."""
        common = {"run": run, "phase": phase}
        measured = calibrate(checkpoint_uri=checkpoint_uri, data_uri=data_uri, **common)
        place(measured, gpu=True, phase=PHASE_OF_NESTED)
        statistics = measured.outputs["statistics"]
        planned = score_layers(
            checkpoint_uri=checkpoint_uri, data_uri=data_uri, statistics=statistics, **common
        )
        place(planned, gpu=gpu_scoring, phase=PHASE_OF_NESTED)
        pruned = prune_step(
            checkpoint_uri=checkpoint_uri, data_uri=data_uri, plan=planned.outputs["plan"], **common
        )
        place(pruned, gpu=gpu_pruning, phase=PHASE_OF_NESTED)
        recovered = recover_train(checkpoint_uri=pruned.outputs["Output"], data_uri=data_uri, **common)
        place(recovered, gpu=True, phase=PHASE_OF_NESTED, nodes=nodes)
        return recovered.outputs["Output"]

    return phase_pipeline
