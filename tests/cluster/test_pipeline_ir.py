"""The compiled pipeline, checked without a cluster: strict parsing, edges, executors, size and order."""

import copy
import re

import pytest
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2 as kubernetes_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from core.settings.cluster import ClusterSettings
from core.settings.parameters import settings_of_run
from pipelines.adapt_accel import compile_pipeline
from pipelines.cluster import CONFIG_KEYS, PHASE_OF_NESTED, SECRET_KEYS
from tests.support.ir import CLUSTER, STEPS, dags, executors, gpus, parse, problems, settings, the_dag


@pytest.fixture(scope="module", params=[1, 3, pytest.param(20, marks=pytest.mark.slow)])
def phases(request):
    return request.param


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, phases):
    path = tmp_path_factory.mktemp("ir") / "pipeline.yaml"
    compile_pipeline(settings(phases), path)
    return path


@pytest.fixture(scope="module")
def ir(compiled):
    return parse(compiled)


def test_every_edge_resolves_to_a_producer_of_the_same_type(ir):
    assert list(problems(ir[0])) == []


@pytest.mark.parametrize("phases", [1], indirect=True, scope="module")
def test_broken_edges_are_found(ir):
    def broken(change):
        spec = copy.deepcopy(ir[0])
        change(spec)
        return list(problems(spec))

    def phase(spec):
        return spec.components["comp-phase"].dag

    def task(spec, name):
        return phase(spec).tasks[name]

    assert broken(lambda spec: spec.components["comp-evaluate"].__setattr__("executor_label", "exec-x"))
    assert broken(lambda spec: spec.components.pop("comp-needs-run"))
    assert broken(lambda spec: task(spec, "prune-step").dependent_tasks.append("x"))
    assert broken(lambda spec: task(spec, "score-layers").dependent_tasks.pop())
    assert broken(lambda spec: task(spec, "recover-train").inputs.parameters.pop("data_uri"))
    edge = "checkpoint_uri"
    for field in ("producer_task", "output_parameter_key"):
        assert broken(
            lambda spec, field=field: setattr(
                task(spec, "recover-train").inputs.parameters[edge].task_output_parameter, field, "x"
            )
        )
    assert broken(
        lambda spec: setattr(
            task(spec, "score-layers").inputs.artifacts["statistics"].task_output_artifact,
            "output_artifact_key",
            "x",
        )
    )
    assert broken(
        lambda spec: setattr(
            task(spec, "calibrate").inputs.parameters["phase"], "component_input_parameter", "run"
        )
    )
    assert broken(
        lambda spec: setattr(
            phase(spec).outputs.parameters["Output"].value_from_parameter, "producer_subtask", "x"
        )
    )


def test_every_executor_runs_our_code_in_the_image_of_the_settings(ir):
    for executor in executors(ir[0]).values():
        assert executor.container.image == CLUSTER.image
        source = executor.container.command[-1]
        assert "from core.steps." in source
        assert "pip install" not in " ".join(executor.container.command)


def test_a_phase_is_a_nested_pipeline_of_four_tasks_in_a_row(ir, phases):
    spec = ir[0]
    body = the_dag(spec, "needs-run").dag
    nested = [task for task in body.tasks.values() if task.component_ref.name.startswith("comp-phase")]
    assert sorted(task.task_info.name for task in nested) == [
        f"phase {phase:0{len(str(phases))}} of {phases}" for phase in range(1, phases + 1)
    ]
    for task in nested:
        inner = spec.components[task.component_ref.name].dag
        assert set(inner.tasks) == set(STEPS)
        waits = {name: set(inner.tasks[name].dependent_tasks) for name in STEPS}
        assert waits == {
            "calibrate": set(),
            "score-layers": {"calibrate"},
            "prune-step": {"score-layers"},
            "recover-train": {"prune-step"},
        }


def test_the_checkpoint_goes_from_phase_to_phase_and_evaluation_is_beside_the_path(ir, phases):
    body = the_dag(ir[0], "needs-run").dag
    by_phase = {}
    for name, task in body.tasks.items():
        if "phase" in task.inputs.parameters:
            number = int(task.inputs.parameters["phase"].runtime_value.constant.number_value)
            by_phase[task.component_ref.name.split("-")[1], number] = name, task
    source = ["resolve-base"]
    for number in range(1, phases + 1):
        name, task = by_phase["phase", number]
        edge = task.inputs.parameters["checkpoint_uri"]
        if number == 1:
            assert edge.task_output_parameter.producer_task == "resolve-base"
        else:
            assert edge.task_output_parameter.producer_task == source[-1]
        assert set(task.dependent_tasks) == {"resolve-base", "prepare", source[-1]}
        source.append(name)
    for number in range(phases + 1):
        _, task = by_phase["evaluate", number]
        assert set(task.dependent_tasks) == {"resolve-base", "prepare", source[number]}
    publish = body.tasks["publish"]
    evaluations = {by_phase["evaluate", number][0] for number in range(phases + 1)}
    assert set(publish.dependent_tasks) == {"resolve-base", source[-1], *evaluations}
    assert publish.inputs.parameters["checkpoint_uri"].task_output_parameter.producer_task == source[-1]


def test_needs_run_decides_which_way_a_run_takes_and_a_run_that_is_done_takes_none(ir):
    tasks = the_dag(ir[0], "needs-run").dag.tasks
    conditions = {
        name: task.trigger_policy.condition for name, task in tasks.items() if task.trigger_policy.condition
    }
    first = "int(inputs.parameter_values['first'])"
    assert conditions == {"prepare": f"{first} == 1", "go-on": f"{first} > 1"}
    for name in conditions:
        edge = tasks[name].inputs.parameters["first"].task_output_parameter
        assert (edge.producer_task, edge.output_parameter_key) == ("needs-run", "Output")
        assert ir[0].components[tasks[name].component_ref.name].HasField("dag"), (
            "KFP's launcher refuses others"
        )
    behind = {"prepare"}
    while more := {name for name, task in tasks.items() if behind & set(task.dependent_tasks)} - behind:
        behind |= more
    assert set(tasks) - behind == {"resolve-base", "needs-run", "go-on"}


def test_what_is_left_begins_at_whichever_phase_that_is(ir, phases):
    """The phase that each task does by its selector, and where that is beyond the last, the skipped one."""
    rest = ir[0].components["comp-go-on"].dag.tasks
    left = ir[0].components["comp-phases-left"].dag.tasks if phases > 1 else {}
    assert set(rest) == {"evaluate-done", "publish", *(["phases-left"] if phases > 1 else [])}
    assert set(rest["publish"].dependent_tasks) == set(rest) - {"publish"}
    assert len(left) == 2 * (phases - 1)

    def phase_of(task, first):
        edge = task.inputs.parameters["phase"]
        assert edge.component_input_parameter in ("first", "phase")
        if not edge.parameter_expression_selector:
            return first
        sign, number = re.fullmatch(
            r"number_value ([+-]) (\d+\.0)", edge.parameter_expression_selector
        ).groups()
        return first + int(float(sign + number))

    for first in range(2, phases + 2):
        assert phase_of(rest["evaluate-done"], first) == first - 1
        names = [f"phase-left-{i}" if i > 1 else "phase-left" for i in range(1, phases)]
        numbers = [phase_of(left[name], first) for name in names]
        assert numbers == list(range(first, first + phases - 1))
        for i, name in enumerate(names):
            assert left[name].component_ref.name == "comp-phase"
            assert left[name].trigger_policy.condition == f"int(inputs.parameter_values['phase']) <= {phases}"
            assert list(left[name].dependent_tasks) == names[:i][-1:]
            measured = left[name.replace("phase", "evaluate")]
            assert phase_of(measured, first) == numbers[i]
            assert list(measured.dependent_tasks) == [name]
            edges = [task.inputs.parameters["checkpoint_uri"] for task in (left[name], measured)]
            producers = [edge.task_output_parameter.producer_task for edge in edges]
            assert producers == [names[i - 1] if i else "", name]


def test_needs_run_learns_who_else_works_on_the_run(ir):
    edge = the_dag(ir[0], "needs-run").dag.tasks["needs-run"].inputs.parameters["being_done_by"]
    assert edge.task_output_parameter.producer_task == "resolve-base"
    assert edge.task_output_parameter.output_parameter_key == "being_done_by"


def test_finalize_runs_whatever_happens_and_learns_how_it_ended(ir):
    root = ir[0].root.dag
    task = root.tasks["finalize"]
    strategy = pipeline_spec_pb2.PipelineTaskSpec.TriggerPolicy.ALL_UPSTREAM_TASKS_COMPLETED
    assert task.trigger_policy.strategy == strategy
    assert task.inputs.parameters["status"].task_final_status.producer_task in root.tasks
    # The placeholder must stand alone: on a cluster it is not replaced inside a longer string.
    assert task.inputs.parameters["job"].runtime_value.constant.string_value == "{{$.pipeline_job_uuid}}"


def test_parameters_have_defaults_that_make_up_the_settings_again(ir, phases):
    parameters = ir[0].root.input_definitions.parameters
    assert sorted(parameters) == ["base_model", "method", "recipe", "revision", "target"]
    assert all(parameter.is_optional and parameter.description for parameter in parameters.values())
    value = {
        name: json_format.MessageToDict(parameter.default_value) for name, parameter in parameters.items()
    }
    resolved = next(
        task for _, dag in dags(ir[0]) for name, task in dag.dag.tasks.items() if name == "resolve-base"
    )
    fixed = json_format.MessageToDict(resolved.inputs.parameters["fixed"].runtime_value.constant)
    assert fixed == {
        "prune": {
            "phases": phases,
            "steps_per_phase": 1,
            "widths": "similarity",
            "hidden_size": "100%",
            "repair": "ridge",
            "distill_steps": 0,
        },
        "training": {"nodes": 1},
        "evaluation": {"speed": False},
        "equipped": {"score-layers": False},
    }
    assert "cluster" not in value["recipe"], "it is compiled in: the run form could not change it"
    assert settings_of_run(value, fixed) == settings(phases, cluster=ClusterSettings())


def labels_of_pods(ir):
    """Executor label to the labels of its pods that are ours."""
    configs = ir[1].platforms["kubernetes"].deployment_spec.executors
    found = {label: json_format.MessageToDict(config)["podMetadata"] for label, config in configs.items()}
    return {
        executor: {
            key.removeprefix("adapt-pruner/"): value
            for key, value in metadata["labels"].items()
            if key.startswith("adapt-pruner/")
        }
        for executor, metadata in found.items()
    }


def test_pods_are_labelled_with_component_phase_and_recipe(ir, phases):
    found = labels_of_pods(ir)
    nested = {f"exec-{step}" for step in STEPS}
    for executor, labels in found.items():
        component = re.sub(r"^exec-|(-left)?(-\d+)?$", "", executor)
        assert labels["component"] == component
        assert labels["recipe"] == "trial"
        # What Argo makes of this was seen on a real cluster, and its parts are checked below.
        phase = PHASE_OF_NESTED if executor in nested else labels.get("phase")  # of evaluations: below
        assert labels == {"component": component, "recipe": "trial"} | ({"phase": phase} if phase else {})
    evaluations = {executor: labels["phase"] for executor, labels in found.items() if "evaluate" in executor}
    assert sorted(evaluations.values()) == sorted([*map(str, range(phases + 1)), "left"])


def test_argo_finds_the_phase_in_the_name_of_the_nested_pipeline(ir, phases):
    """Evaluate the expression as Argo does, for each nested pipeline's task."""
    (expression,) = re.fullmatch(r"\{\{=(.*)\}\}", PHASE_OF_NESTED).groups()
    (suffix, separator, index) = re.fullmatch(
        r"split\(tasks\.name \+ '([^']*)', '([^']*)'\)\[(\d)\]", expression
    ).groups()
    dag = the_dag(ir[0], "phase").dag
    found = {
        name: (name + suffix).split(separator)[int(index)]
        for _, component in dags(ir[0])
        for name, task in component.dag.tasks.items()
        if task.component_ref.name == "comp-phase"
    }
    assert {
        found.pop(f"phase-left{end}") for end in ("", *map("-{}".format, range(2, phases)))[: phases - 1]
    } <= {"left"}
    given = {
        name: str(int(dag.tasks[name].inputs.parameters["phase"].runtime_value.constant.number_value))
        for name in found
    }
    assert found == given
    assert len(found) == phases


def test_nothing_is_cached_and_everything_is_tried_again(ir):
    for _, component in dags(ir[0]):
        for name, task in component.dag.tasks.items():
            assert not task.caching_options.enable_cache, name
            if ir[0].components[task.component_ref.name].executor_label:
                assert task.retry_policy.max_retry_count == (5 if name == "recover-train" else 2), name
                assert task.retry_policy.backoff_duration.seconds == 60, name


def test_only_tasks_that_compute_on_the_model_ask_for_gpus(ir):
    wanted = {
        label
        for label in executors(ir[0])
        if label.startswith(("exec-calibrate", "exec-prune", "exec-recover", "exec-evaluate"))
    }
    assert gpus(ir[0]) == dict.fromkeys(wanted, ("amd.com/gpu", "2"))


def test_the_ui_gets_figures_a_table_and_a_picture_of_each_phase_and_the_report_at_the_end(ir):
    def outputs(component):
        artifacts = ir[0].components[component].output_definitions.artifacts
        return {name: output.artifact_type.schema_title for name, output in artifacts.items()}

    assert outputs("comp-evaluate") == {
        "summary": "system.Markdown",
        "picture": "system.HTML",
    }
    result = {"result": "system.Metrics", "report": "system.HTML", "model": "system.Model"}
    assert outputs("comp-publish") == result, "KFP compares metrics: a column a run"


def test_every_task_has_memory_and_the_environment_of_the_cluster(ir):
    spec, platform = ir
    configs = platform.platforms["kubernetes"].deployment_spec.executors
    assert set(configs) == set(executors(spec))
    for label, executor in executors(spec).items():
        resources = executor.container.resources
        assert resources.resource_memory_limit == resources.resource_memory_request == "48Gi"
        assert resources.resource_cpu_request == ("16" if label == "exec-recover-train" else "6")
        config = json_format.ParseDict(
            json_format.MessageToDict(configs[label]), kubernetes_pb2.KubernetesExecutorConfig()
        )
        (secret,), (config_map,) = config.secret_as_env, config.config_map_as_env
        assert (secret.secret_name, config_map.config_map_name) == ("keys", "places")
        assert {pair.env_var: pair.secret_key for pair in secret.key_to_env} == {k: k for k in SECRET_KEYS}
        assert {pair.env_var: pair.config_map_key for pair in config_map.key_to_env} == {
            k: k for k in CONFIG_KEYS
        }
