"""Strict reading of compiled pipelines, and a check of everything in them that must resolve."""

import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from core.settings.calibration import CalibrationSettings
from core.settings.cluster import ClusterSettings, ComponentSettings, Toleration
from core.settings.evaluation import EvaluationSettings
from core.settings.model import ModelSettings
from core.settings.prune import PruneSettings
from core.settings.schema import Settings
from core.settings.texts import TextSource

STEPS = ("calibrate", "score-layers", "prune-step", "recover-train")
CLUSTER = ClusterSettings(
    image="registry.example/adapt-pruner-python@sha256:" + "0" * 64,
    gpu_type="amd.com/gpu",
    gpus=2,
    cpu="6",
    memory="48Gi",
    secret="keys",
    config_map="places",
    image_pull_secrets=("registry-credentials",),
    gpu_node_selector={"cloud.example.com/accelerator": "h100-80gb"},
    gpu_tolerations=(Toleration(key="amd.com/gpu", operator="Exists", effect="NoSchedule"),),
    node_selector={"topology.kubernetes.io/zone": "zone-a"},
    tolerations=(Toleration(key="dedicated", value="pruning", effect="NoExecute"),),
    shared_memory="16Gi",
    scratch="500Gi",
    scratch_storage_class="fast-local",
    timeout="48h",
    retry_wait="1min",
    queue="research",
    components={"recover-train": ComponentSettings(cpu="16", timeout="96h", retries=5)},
)


def settings(phases, *, steps_per_phase=1, cluster=CLUSTER):
    return Settings(
        name="trial",
        model=ModelSettings(base="org/model", revision="abc"),
        prune=PruneSettings(target="108M", phases=phases, steps_per_phase=steps_per_phase),
        calibration=CalibrationSettings(source=TextSource(path="calibration.txt"), sequences=7),
        evaluation=EvaluationSettings(tasks=("piqa",)),
        cluster=cluster,
    )


def parse(path):
    """Parse strictly: json_format refuses unknown fields and wrong types."""
    first, second = yaml.load_all(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    spec = json_format.ParseDict(first, pipeline_spec_pb2.PipelineSpec())
    platform = json_format.ParseDict(second, pipeline_spec_pb2.PlatformSpec())
    return spec, platform


def executors(spec):
    message = json_format.ParseDict(
        json_format.MessageToDict(spec.deployment_spec), pipeline_spec_pb2.PipelineDeploymentConfig()
    )
    return dict(message.executors)


def dags(spec):
    """Every DAG with its own component: the root, and the components that are DAGs."""
    yield "root", spec.root
    for name, component in list(spec.components.items()):
        if component.WhichOneof("implementation") == "dag":
            yield name, component


def problems(spec):
    """What does not resolve: components, executors, dependencies, each edge's producer and type."""
    labels = executors(spec)
    for name, component in spec.components.items():
        if component.executor_label and component.executor_label not in labels:
            yield f"{name}: no executor {component.executor_label}"
    for dag_name, parent in dags(spec):
        for task_name, task in parent.dag.tasks.items():
            where = f"{dag_name}.{task_name}"
            yield from (f"{where}: no task {d}" for d in task.dependent_tasks if d not in parent.dag.tasks)
            if task.component_ref.name not in spec.components:
                yield f"{where}: no component {task.component_ref.name}"
                continue
            inputs = spec.components[task.component_ref.name].input_definitions
            for key in inputs.parameters.keys() | task.inputs.parameters.keys():
                declared = inputs.parameters.get(key)
                if key not in task.inputs.parameters:
                    given = declared.parameter_type if declared.is_optional else None
                else:
                    given = _type_of(spec, parent, task, task.inputs.parameters[key], declared)
                if given is None or declared is None or given != declared.parameter_type:
                    yield f"{where}: input {key} gets type {given}"
            for key, declared in inputs.artifacts.items():
                source = task.inputs.artifacts[key].task_output_artifact
                outputs = _outputs_of(spec, parent, source.producer_task).artifacts
                given = outputs.get(source.output_artifact_key) or declared.__class__()
                waits = source.producer_task in task.dependent_tasks
                if not waits or given.artifact_type != declared.artifact_type:
                    yield f"{where}: artifact {key} does not resolve"
        for key, output in parent.dag.outputs.parameters.items():
            source = output.value_from_parameter
            given = _outputs_of(spec, parent, source.producer_subtask).parameters.get(
                source.output_parameter_key
            )
            declared = parent.output_definitions.parameters[key]
            if given is None or given.parameter_type != declared.parameter_type:
                yield f"{dag_name}: output {key} does not resolve"


def _type_of(spec, parent, task, edge, declared):
    """The type of what an edge brings, None if it brings nothing."""
    kind = edge.WhichOneof("kind")
    given = None
    if kind == "task_output_parameter" and edge.task_output_parameter.producer_task in task.dependent_tasks:
        source = edge.task_output_parameter
        outputs = _outputs_of(spec, parent, source.producer_task)
        given = outputs.parameters.get(source.output_parameter_key)
    elif kind == "component_input_parameter":
        given = parent.input_definitions.parameters.get(edge.component_input_parameter)
    elif kind == "task_final_status":
        given = declared
    elif kind == "runtime_value" and declared is not None:
        types = pipeline_spec_pb2.ParameterType
        fits = {
            "string_value": {types.STRING},
            "number_value": {types.NUMBER_INTEGER, types.NUMBER_DOUBLE},
            "bool_value": {types.BOOLEAN},
            "struct_value": {types.STRUCT},
            "list_value": {types.LIST},
        }[edge.runtime_value.constant.WhichOneof("kind")]
        given = declared if declared.parameter_type in fits else None
    return given.parameter_type if given is not None else None


def _outputs_of(spec, parent, task_name):
    # get(): an index would silently add an empty entry to the message
    task = parent.dag.tasks.get(task_name)
    component = spec.components.get(task.component_ref.name) if task else None
    return (component or pipeline_spec_pb2.ComponentSpec()).output_definitions


def the_dag(spec, task):
    """The DAG that holds a task of the given name."""
    (found,) = [component for _, component in dags(spec) if task in component.dag.tasks]
    return found


def gpus(spec):
    """Executor label to (accelerator type, count)."""
    return {
        label: (
            executor.container.resources.accelerator.resource_type,
            executor.container.resources.accelerator.resource_count,
        )
        for label, executor in executors(spec).items()
        if executor.container.resources.HasField("accelerator")
    }
