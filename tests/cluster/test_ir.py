"""Equal components share one definition, and what Argo could not store is refused."""

import copy
import json

import pytest
from google.protobuf import json_format
from kfp import compiler

from core.errors import SettingsError
from core.settings.cluster import ClusterSettings
from pipelines.adapt_accel import build_pipeline, compile_pipeline, largest_phases
from pipelines.ir import LARGEST_WORKFLOW_BYTES, read_ir, share_components, workflow_bytes, write_ir
from pipelines.resuming import skip_done_phases
from tests.support.ir import CLUSTER, STEPS, executors, parse, settings


def everything(spec, platform):
    """Path of every task, those of nested pipelines included, to all that it runs, gets and waits for."""
    configs = platform.platforms["kubernetes"].deployment_spec.executors

    def walk(component, path):
        for name, task in component.dag.tasks.items():
            inner = spec.components[task.component_ref.name]
            task, own = copy.deepcopy(task), copy.deepcopy(inner)
            task.component_ref.name, own.executor_label = "", ""
            own.ClearField("dag")
            label = inner.executor_label
            runs = (executors(spec)[label], json_format.MessageToDict(configs[label])) if label else None
            yield f"{path}.{name}", (task, own, runs)
            yield from walk(inner, f"{path}.{name}")

    return dict(walk(spec.root, "root"))


def as_the_sdk_compiles(folder, settings):
    """Write each component as often as it is used."""
    path = folder / "sdk.yaml"
    compiler.Compiler().compile(build_pipeline(settings), str(path))
    pipeline, platform = read_ir(path)
    skip_done_phases(pipeline, platform, settings.prune.phases)
    write_ir(pipeline, platform, "", path)
    return path


def test_every_task_is_what_it_was_before_components_were_shared(tmp_path):
    before = everything(*parse(as_the_sdk_compiles(tmp_path, settings(3))))
    compile_pipeline(settings(3), tmp_path / "shared.yaml")
    assert everything(*parse(tmp_path / "shared.yaml")) == before
    # Six tasks a phase; what is left is two phases of three.
    assert len(before) == 8 + 3 * 6 + 4 + 2 * 6


@pytest.mark.parametrize("phases", [1, 3, pytest.param(20, marks=pytest.mark.slow)])
def test_phases_share_their_components(tmp_path, phases):
    compile_pipeline(settings(phases), tmp_path / "pipeline.yaml")
    spec, platform = parse(tmp_path / "pipeline.yaml")
    evaluations = {f"evaluate-{phase + 1}" if phase else "evaluate" for phase in range(phases + 1)}
    evaluations.add("evaluate-left")
    steps = {"resolve-base", "needs-run", "prepare-data", "publish", "finalize", *STEPS, *evaluations}
    assert set(executors(spec)) == {f"exec-{step}" for step in steps}
    assert set(platform.platforms["kubernetes"].deployment_spec.executors) == set(executors(spec))
    nested = {"comp-phase", "comp-prepare", "comp-go-on", "comp-exit-handler-1"}
    nested |= {"comp-phases-left"} if phases > 1 else set()
    assert set(spec.components) == {f"comp-{step}" for step in steps} | nested


def test_components_that_differ_stay_apart(tmp_path):
    pipeline, platform = read_ir(as_the_sdk_compiles(tmp_path, settings(3)))
    pipeline["deploymentSpec"]["executors"]["exec-calibrate-2"]["container"]["image"] = "another"
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    configs["exec-prune-step-3"]["imagePullPolicy"] = "Never"
    share_components(pipeline, platform)
    names = pipeline["components"].keys()
    assert {name for name in names if name.startswith(("comp-calibrate", "comp-prune", "comp-phase"))} == {
        *("comp-calibrate", "comp-calibrate-2"),
        *("comp-prune-step", "comp-prune-step-3"),
        *("comp-phase", "comp-phase-2", "comp-phase-3", "comp-phases-left"),
    }


def test_containers_that_are_equal_count_once(tmp_path):
    pipeline, platform = read_ir(as_the_sdk_compiles(tmp_path, settings(2)))
    share_components(pipeline, platform)
    before = workflow_bytes(pipeline, platform)
    executors = pipeline["deploymentSpec"]["executors"]
    own = len(json.dumps(executors["exec-evaluate-3"]["container"]))
    executors["exec-evaluate-3"]["container"]["args"].append("another")
    assert own < workflow_bytes(pipeline, platform) - before < 2 * own + 1000


@pytest.mark.slow
def test_twenty_phases_stay_small(tmp_path):
    path = tmp_path / "pipeline.yaml"
    compile_pipeline(settings(20), path)
    size, workflow = path.stat().st_size, workflow_bytes(*read_ir(path))
    print(f"N_P = 20, all cluster settings in use: {size:,} bytes, on a cluster {workflow:,}")
    assert size < 250_000
    assert workflow < LARGEST_WORKFLOW_BYTES


@pytest.mark.slow
def test_the_largest_number_of_phases_is_where_the_line_through_two_sizes_meets_the_limit(tmp_path):
    def size(phases):
        compile_pipeline(settings(phases), tmp_path / "pipeline.yaml")
        return workflow_bytes(*read_ir(tmp_path / "pipeline.yaml"))

    most, one, nine = largest_phases(settings(1)), size(1), size(9)
    assert one + (most - 1) * (nine - one) / 8 <= LARGEST_WORKFLOW_BYTES
    assert one + most * (nine - one) / 8 > LARGEST_WORKFLOW_BYTES


@pytest.mark.slow
def test_the_size_on_a_cluster_grows_with_all_that_argo_keeps(tmp_path):
    def size(cluster, shared=True, phases=3):
        pipeline, platform = read_ir(as_the_sdk_compiles(tmp_path, settings(phases, cluster=cluster)))
        if shared:
            share_components(pipeline, platform)
        return workflow_bytes(pipeline, platform)

    least = size(ClusterSettings(shared_memory="", secret="", config_map=""))
    assert least < size(ClusterSettings()) < size(CLUSTER) < size(CLUSTER, shared=False)
    assert size(CLUSTER, phases=2) < size(CLUSTER)


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [ClusterSettings(), CLUSTER])
def test_more_phases_than_argo_can_store_are_refused_with_the_largest_number(tmp_path, cluster):
    most = largest_phases(settings(1, cluster=cluster))
    assert 20 <= most < 100
    compile_pipeline(settings(most, cluster=cluster), tmp_path / "p.yaml")
    stored = workflow_bytes(*read_ir(tmp_path / "p.yaml"))
    assert 0.95 * LARGEST_WORKFLOW_BYTES < stored <= LARGEST_WORKFLOW_BYTES
    with pytest.raises(
        SettingsError,
        match=rf"^prune.phases={most + 1} exceeds {most}: .*1 MiB.*steps_per_phase.*adapt-pruner run.*$",
    ):
        compile_pipeline(settings(most + 1, cluster=cluster), tmp_path / "q.yaml")
    assert not (tmp_path / "q.yaml").exists()
