"""The compiled pipeline, checked without a cluster: strict parsing, edges, executors, size and order."""

import copy
import dataclasses
import re

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler
from kfp.kubernetes import kubernetes_executor_config_pb2 as kubernetes_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from core.settings.cluster import ClusterSettings, ComponentSettings
from core.settings.evaluation import EvaluationSettings
from core.settings.parameters import parameters_of, reached_by, settings_of_run
from pipelines.adapt_accel import build_pipeline, compile_pipeline
from pipelines.cluster import CONFIG_KEYS, PHASE_OF_NESTED, SECRET_KEYS
from tests.support.ir import CLUSTER, STEPS, dags, executors, parse, problems, settings, the_dag


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
    body = the_dag(spec, "publish").dag
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
    body = the_dag(ir[0], "publish").dag
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
            assert edge.component_input_parameter == "pipelinechannel--resolve-base-base_uri"
        else:
            assert edge.task_output_parameter.producer_task == source[-1]
        assert set(task.dependent_tasks) == {"prepare-data", *source[1:][-1:]}
        source.append(name)
    for number in range(phases + 1):
        _, task = by_phase["evaluate", number]
        assert set(task.dependent_tasks) == {"prepare-data", *([source[number]] if number else [])}
    publish = body.tasks["publish"]
    evaluations = {by_phase["evaluate", number][0] for number in range(phases + 1)}
    assert set(publish.dependent_tasks) == {source[-1], *evaluations}
    assert publish.inputs.parameters["checkpoint_uri"].task_output_parameter.producer_task == source[-1]


def test_a_run_that_is_done_ends_after_needs_run(ir):
    outer = the_dag(ir[0], "needs-run").dag
    (condition,) = [task for task in outer.tasks.values() if task.trigger_policy.condition]
    assert condition.trigger_policy.condition.endswith("['pipelinechannel--needs-run-Output'] == true")
    assert set(outer.tasks) - {"resolve-base", "needs-run"} == {"condition-2"}


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
            "repair": "ridge",
            "distill_steps": 0,
        },
        "evaluation": {"speed": False},
    }
    assert "cluster" not in value["recipe"], "it is compiled in: the run form could not change it"
    assert settings_of_run(value, fixed) == settings(phases, cluster=ClusterSettings())


def test_the_table_of_parameters_is_true_of_the_pipeline(tmp_path):
    """Only what the table calls compiled changes anything beyond the defaults of parameters."""

    def without_defaults(**changes):
        changed = {
            name: dataclasses.replace(getattr(plain, name), **change) if isinstance(change, dict) else change
            for name, change in changes.items()
        }
        path = tmp_path / "pipeline.yaml"
        compile_pipeline(dataclasses.replace(plain, **changed), path)
        spec, platform = parse(path)
        spec.root.ClearField("input_definitions")
        return spec.SerializeToString(deterministic=True), platform.SerializeToString(deterministic=True)

    plain = settings(2)
    same = without_defaults()
    recipe = {"prune": {"amplitude": 0.1, "criterion": "random"}, "training": {"learning_rate": 1.0}}
    recipe |= {"calibration": {"sequences": 9}, "evaluation": {"tasks": (), "batch_size": 3}, "seed": 5}
    recipe |= {
        "storage": {"store": "s3://a/b"},
        "tracking": {"uri": "http://c"},
        "model": {"dtype": "float32"},
    }
    assert without_defaults(**recipe) == same
    own = {"model": {"base": "a/b", "revision": "c"}, "prune": {"target": "80%"}}
    assert without_defaults(**own) == same
    for section, change in [
        ("prune", {"phases": 3}),
        ("prune", {"steps_per_phase": 2}),
        ("prune", {"repair": "none"}),
        ("evaluation", {"speed": True}),
        ("cluster", {"memory": "9Gi"}),
    ]:
        assert without_defaults(**{section: change}) != same
        assert [reached_by(section, key) for key in change] == ["compiled"]
    for changes, kind in ((recipe, {"recipe"}), (own, {"base_model", "revision", "target"})):
        named = [(part, key) for part, keys in changes.items() if part != "seed" for key in keys]
        assert {reached_by(section, key) for section, key in named} == kind
    assert reached_by("", "seed") == "recipe"


def test_the_recipe_parameter_leaves_out_what_has_its_own_parameter_or_no_value():
    recipe = parameters_of(settings(2))["recipe"]
    assert "base" not in recipe["model"]
    assert not {"target", "method", "phases", "steps_per_phase"} & recipe["prune"].keys()
    assert "speed" not in recipe["evaluation"], "whether publish gets a GPU is compiled in"
    assert "perplexity" not in recipe["evaluation"]
    assert recipe["calibration"]["sequences"] == 7


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
        component = re.sub(r"^exec-|-\d+$", "", executor)
        assert labels["component"] == component
        assert labels["recipe"] == "trial"
        # What Argo makes of this was seen on a real cluster, and its parts are checked below.
        phase = PHASE_OF_NESTED if executor in nested else labels.get("phase")
        assert labels == {"component": component, "recipe": "trial"} | ({"phase": phase} if phase else {})
    evaluations = {executor: labels["phase"] for executor, labels in found.items() if "evaluate" in executor}
    expected = {"exec-evaluate": "0"} | {
        f"exec-evaluate-{phase + 1}": str(phase) for phase in range(1, phases + 1)
    }
    assert evaluations == expected


def test_argo_finds_the_phase_in_the_name_of_the_nested_pipeline(ir, phases):
    """Evaluate the expression as Argo does, for each nested pipeline's task."""
    (expression,) = re.fullmatch(r"\{\{=(.*)\}\}", PHASE_OF_NESTED).groups()
    (suffix, separator, index) = re.fullmatch(
        r"split\(tasks\.name \+ '([^']*)', '([^']*)'\)\[(\d)\]", expression
    ).groups()
    dag = the_dag(ir[0], "phase").dag
    found = {
        name: (name + suffix).split(separator)[int(index)]
        for name, task in dag.tasks.items()
        if ir[0].components[task.component_ref.name].HasField("dag")
    }
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


def test_only_tasks_that_compute_on_the_model_ask_for_gpus(ir):
    wanted = {
        label
        for label in executors(ir[0])
        if label.startswith(("exec-calibrate", "exec-prune", "exec-recover", "exec-evaluate"))
    }
    assert gpus(ir[0]) == dict.fromkeys(wanted, ("amd.com/gpu", "2"))


@pytest.mark.parametrize("distill_steps", [0, 3])
def test_a_cut_alone_asks_for_no_gpu_and_a_distillation_for_one(distill_steps, tmp_path):
    plain = settings(1)
    prune = dataclasses.replace(plain.prune, repair="none", distill_steps=distill_steps)
    compile_pipeline(dataclasses.replace(plain, prune=prune), tmp_path / "p.yaml")
    found = any(label.startswith("exec-prune") for label in gpus(parse(tmp_path / "p.yaml")[0]))
    assert found == (distill_steps > 0)


@pytest.mark.parametrize("widths", ["similarity", "search"])
def test_scores_alone_ask_for_no_gpu_and_a_search_for_widths_for_one(widths, tmp_path):
    plain = settings(1)
    prune = dataclasses.replace(plain.prune, steps_per_phase=1, widths=widths)
    compile_pipeline(dataclasses.replace(plain, prune=prune), tmp_path / "p.yaml")
    found = any(label.startswith("exec-score") for label in gpus(parse(tmp_path / "p.yaml")[0]))
    assert found == (widths == "search")


def accelerated(path):
    spec = parse(path)[0]
    (task,) = [
        dag.tasks["resolve-base"]
        for dag in (spec.root.dag, *(component.dag for component in spec.components.values()))
        if "resolve-base" in dag.tasks
    ]
    values = task.inputs.parameters["accelerated"].runtime_value.constant.list_value
    return list(values)


@pytest.mark.parametrize(
    ("cluster", "sections"),
    [
        ({}, ["calibration", "training", "evaluation"]),
        ({"gpus": 0}, []),
        ({"components": {"evaluate": ComponentSettings(gpus=0)}}, ["calibration", "training"]),
        ({"gpus": 0, "components": {"recover-train": ComponentSettings(gpus=1)}}, ["training"]),
    ],
)
def test_resolve_base_is_told_whose_tasks_get_gpus(tmp_path, cluster, sections):
    compile_pipeline(settings(1, cluster=ClusterSettings(**cluster)), tmp_path / "p.yaml")
    assert accelerated(tmp_path / "p.yaml") == sections


def test_scoring_asks_for_gpus_if_it_measures_again(tmp_path):
    compile_pipeline(settings(1, steps_per_phase=3), tmp_path / "p.yaml")
    assert "exec-score-layers" in gpus(parse(tmp_path / "p.yaml")[0])


def test_publish_asks_for_gpus_if_it_measures_the_speed(tmp_path):
    measured = dataclasses.replace(settings(1), evaluation=EvaluationSettings(speed=True))
    compile_pipeline(measured, tmp_path / "p.yaml")
    assert "exec-publish" in gpus(parse(tmp_path / "p.yaml")[0])


def test_no_gpus_no_secret_and_no_config_map_leave_no_trace(tmp_path):
    compile_pipeline(
        settings(1, cluster=ClusterSettings(gpus=0, secret="", config_map="")), tmp_path / "p.yaml"
    )
    spec, platform = parse(tmp_path / "p.yaml")
    assert gpus(spec) == {}
    for config in platform.platforms["kubernetes"].deployment_spec.executors.values():
        assert not {"secretAsEnv", "configMapAsEnv"} & json_format.MessageToDict(config).keys()


def test_the_ui_gets_figures_a_table_and_a_picture_of_each_phase_and_the_report_at_the_end(ir):
    def outputs(component):
        artifacts = ir[0].components[component].output_definitions.artifacts
        return {name: output.artifact_type.schema_title for name, output in artifacts.items()}

    assert outputs("comp-evaluate") == {
        "metrics": "system.Metrics",
        "summary": "system.Markdown",
        "picture": "system.HTML",
    }
    assert outputs("comp-publish") == {"report": "system.HTML", "model": "system.Model"}


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


def test_on_one_machine_each_phase_waits_for_the_evaluation_before_it_and_nothing_is_retried(tmp_path):
    compiler.Compiler().compile(build_pipeline(settings(2), local=True), str(tmp_path / "p.yaml"))
    (document,) = yaml.safe_load_all((tmp_path / "p.yaml").read_text())  # no settings of a cluster
    spec = json_format.ParseDict(document, pipeline_spec_pb2.PipelineSpec())
    body = the_dag(spec, "publish").dag
    assert "evaluate" in body.tasks["phase"].dependent_tasks
    assert {"phase", "evaluate-2"} <= set(body.tasks["phase-2"].dependent_tasks)
    assert not any(task.HasField("retry_policy") for _, dag in dags(spec) for task in dag.dag.tasks.values())
