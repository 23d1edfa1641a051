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
    found = []
    labels = executors(spec)
    for name, component in spec.components.items():
        if component.executor_label and component.executor_label not in labels:
            found.append(f"{name}: no executor {component.executor_label}")
    for dag_name, component in dags(spec):
        for task_name, task in component.dag.tasks.items():
            if task.component_ref.name not in spec.components:
                found.append(f"{dag_name}.{task_name}: no component {task.component_ref.name}")
                continue
            found += task_problems(spec, component, f"{dag_name}.{task_name}", task)
        for key, output in component.dag.outputs.parameters.items():
            source = output.value_from_parameter
            declared = component.output_definitions.parameters[key].parameter_type
            if output_type(spec, component, source.producer_subtask, source.output_parameter_key) != declared:
                found.append(f"{dag_name}: output {key} does not resolve")
    return found


def task_problems(spec, parent, where, task):
    wanted = spec.components[task.component_ref.name].input_definitions
    for dependency in task.dependent_tasks:
        if dependency not in parent.dag.tasks:
            yield f"{where}: no task {dependency}"
    for key, declared in wanted.parameters.items():
        if key not in task.inputs.parameters:
            if not declared.is_optional:
                yield f"{where}: input {key} is missing"
            continue
        edge = task.inputs.parameters[key]
        kind = edge.WhichOneof("kind")
        if kind == "task_output_parameter":
            source = edge.task_output_parameter
            if source.producer_task not in task.dependent_tasks:
                yield f"{where}: does not wait for {source.producer_task}"
            given = output_type(spec, parent, source.producer_task, source.output_parameter_key)
        elif kind == "component_input_parameter":
            inputs = parent.input_definitions.parameters
            name = edge.component_input_parameter
            given = inputs[name].parameter_type if name in inputs else None
        elif kind == "runtime_value":
            given = constant_type(edge.runtime_value.constant, declared.parameter_type)
        else:
            given = declared.parameter_type if kind == "task_final_status" else None
        if given != declared.parameter_type:
            yield f"{where}: input {key} gets type {given}, wants {declared.parameter_type}"
    for key in task.inputs.parameters:
        if key not in wanted.parameters:
            yield f"{where}: unknown input {key}"
    yield from artifact_problems(spec, parent, where, task, wanted)


def artifact_problems(spec, parent, where, task, wanted):
    for key, declared in wanted.artifacts.items():
        source = task.inputs.artifacts[key].task_output_artifact
        if source.producer_task not in task.dependent_tasks:
            yield f"{where}: does not wait for {source.producer_task}"
        given = outputs_of(spec, parent, source.producer_task).artifacts.get(source.output_artifact_key)
        if given is None or given.artifact_type != declared.artifact_type:
            yield f"{where}: artifact {key} does not resolve"


def outputs_of(spec, parent, task_name):
    # get(): an index would silently add an empty entry to the message
    task = parent.dag.tasks.get(task_name)
    component = spec.components.get(task.component_ref.name) if task else None
    return (component or pipeline_spec_pb2.ComponentSpec()).output_definitions


def output_type(spec, parent, task_name, key):
    output = outputs_of(spec, parent, task_name).parameters.get(key)
    return output.parameter_type if output else None


def constant_type(value, declared):
    types = pipeline_spec_pb2.ParameterType
    fits = {
        "string_value": {types.STRING},
        "number_value": {types.NUMBER_INTEGER, types.NUMBER_DOUBLE},
        "bool_value": {types.BOOLEAN},
        "struct_value": {types.STRUCT},
        "list_value": {types.LIST},
    }[value.WhichOneof("kind")]
    return declared if declared in fits else None


def the_dag(spec, task):
    """The DAG that holds a task of the given name."""
    (found,) = [component for _, component in dags(spec) if task in component.dag.tasks]
    return found
