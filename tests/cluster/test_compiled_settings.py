"""What a setting changes in the compiled pipeline: which tasks get GPUs, and what is compiled in at all."""

import dataclasses
import json
import re
from typing import get_args

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler
from kfp.pipeline_spec import pipeline_spec_pb2

from core.errors import SettingsError
from core.settings.cluster import ClusterSettings, ComponentSettings
from core.settings.evaluation import EvaluationSettings
from core.settings.methods import OF_THE_MODEL, MethodName
from core.settings.parameters import (
    COMPILED,
    COMPILED_SECTION,
    compiled_for,
    parameters_of,
    reached_by,
    settings_of_run,
)
from core.settings.training import TrainingSettings
from pipelines.adapt_accel import build_pipeline, compile_pipeline
from pipelines.commands.compile import compile_
from tests.support.ir import dags, gpus, parse, settings, the_dag
from tests.support.project import ROOT


@pytest.mark.slow
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
        ("training", {"nodes": 2}),
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


def test_the_help_the_form_and_the_docs_name_all_settings_that_are_compiled(tmp_path):
    compile_pipeline(settings(1), tmp_path / "p.yaml")
    form = parse(tmp_path / "p.yaml")[0].root.input_definitions.parameters["recipe"].description
    (said,) = re.findall(
        r"Fixed in the pipeline are(.*?)\.\s", (ROOT / "docs/operating.md").read_text(), re.DOTALL
    )
    for text in (form, str(compile_.help), said):
        named = set(re.findall(r"\b(?:prune|training|evaluation)\.[a-z_]+", text)) - {"prune.method"}
        assert named == {f"{section}.{key}" for section, key in COMPILED}
        assert COMPILED_SECTION in text


def started(pipeline, **changes):
    """The settings that the first task of a run makes of what the form was filled in with."""
    parameters = parameters_of(pipeline)
    parameters["recipe"] |= changes.pop("recipe", {})
    compiled = json.loads(json.dumps(compiled_for(pipeline, phases=1)), parse_int=float)
    return settings_of_run(json.loads(json.dumps(parameters | changes)), compiled)


NO_GPUS = ClusterSettings(gpus=0)
OWN_GPUS = ClusterSettings(components={"score-layers": ComponentSettings(gpus=1)})


@pytest.mark.parametrize("method", get_args(MethodName))
@pytest.mark.parametrize("cluster", [ClusterSettings(), NO_GPUS, OWN_GPUS])
def test_a_method_that_asks_for_another_gpu_is_refused_by_a_compiled_pipeline(method, cluster):
    """The form of a pipeline that was compiled for adapt-pruner, with statistics that decide alone."""
    pipeline = settings(1, cluster=cluster)
    if method not in OF_THE_MODEL or cluster in (NO_GPUS, OWN_GPUS):
        assert started(pipeline, method=method).prune.method == method
        return
    with pytest.raises(
        SettingsError, match=f"^prune.method={method} runs .*, for which the pipeline was"
    ) as said:
        started(pipeline, method=method)
    assert len(said.value.problems) == 1
    other = dataclasses.replace(pipeline, prune=dataclasses.replace(pipeline.prune, method="sheared-llama"))
    assert started(other, method=method).prune.method == method
    assert started(other, method="flap").prune.method == "flap"


def test_the_section_of_the_pods_in_the_form_is_refused():
    pipeline = settings(1)
    with pytest.raises(SettingsError, match=r"recipe holds the section cluster, which is compiled into"):
        started(pipeline, recipe={"cluster": {"gpus": 4}})


def test_a_setting_that_the_form_says_twice_must_be_the_same_both_times():
    pipeline = settings(1)
    with pytest.raises(SettingsError) as said:
        started(
            pipeline,
            recipe={"prune": {"target": 0.3, "method": "flap"}, "model": {"base": "a/b"}},
            base_model="c/d",
        )
    target = pipeline.prune.target
    for problem, setting, name, value in zip(
        said.value.problems,
        ("model.base=a/b", "prune.target=0.3", "prune.method=flap"),
        ("base_model", "target", "method"),
        ("c/d", target, "adapt-pruner"),
        strict=True,
    ):
        assert problem == (
            f"{setting} in the parameter recipe is not what the parameter {name} says, {value}: say it there "
            "alone."
        )
    same = {"prune": {"target": target}, "model": {"base": pipeline.model.base}}
    assert started(pipeline, recipe=same).prune.target == target


@pytest.mark.parametrize("distill_steps", [0, 3])
def test_a_cut_alone_asks_for_no_gpu_and_a_distillation_for_one(distill_steps, tmp_path):
    plain = settings(1)
    prune = dataclasses.replace(plain.prune, repair="none", distill_steps=distill_steps)
    compile_pipeline(dataclasses.replace(plain, prune=prune), tmp_path / "p.yaml")
    found = any(label.startswith("exec-prune") for label in gpus(parse(tmp_path / "p.yaml")[0]))
    assert found == (distill_steps > 0)


@pytest.mark.parametrize(
    ("changes", "searches"),
    [
        ({"widths": "similarity"}, False),
        ({"widths": "search"}, True),
        ({"method": "minitron", "amplitude": 0.0, "hidden_size": "75%"}, True),
    ],
)
def test_scores_alone_ask_for_no_gpu_and_what_reads_the_model_for_one(changes, searches, tmp_path):
    plain = settings(1)
    prune = dataclasses.replace(plain.prune, steps_per_phase=1, **changes)
    compile_pipeline(dataclasses.replace(plain, prune=prune), tmp_path / "p.yaml")
    found = any(label.startswith("exec-score") for label in gpus(parse(tmp_path / "p.yaml")[0]))
    assert found == searches


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


def test_on_one_machine_each_phase_waits_for_the_evaluation_before_it_and_nothing_is_retried(tmp_path):
    on_nodes = dataclasses.replace(settings(2), training=TrainingSettings(nodes=2))
    with pytest.raises(SettingsError, match=r"^training\.nodes=2 needs a cluster .* has one machine\. Set"):
        build_pipeline(on_nodes, local=True)
    compiler.Compiler().compile(build_pipeline(settings(2), local=True), str(tmp_path / "p.yaml"))
    (document,) = yaml.safe_load_all((tmp_path / "p.yaml").read_text())  # no settings of a cluster
    spec = json_format.ParseDict(document, pipeline_spec_pb2.PipelineSpec())
    body = the_dag(spec, "publish").dag
    assert "evaluate" in body.tasks["phase"].dependent_tasks
    assert {"phase", "evaluate-2"} <= set(body.tasks["phase-2"].dependent_tasks)
    assert not any(task.HasField("retry_policy") for _, dag in dags(spec) for task in dag.dag.tasks.values())
