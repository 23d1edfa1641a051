"""The doctor asks Kubernetes: secrets, config maps, and nodes that can take the pods of a run."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from core.settings.cluster import ClusterSettings, ComponentSettings, Toleration
from core.settings.recipe import load_recipe
from pipelines.remote.fitting import misfit
from pipelines.remote.probe import largest_pods, pods_of, write_probe
from pipelines.remote.submission import prepare
from tests.support.doctor import PODS, doctor, ended, fixes, node, table
from tests.support.ir import parse

pytestmark = pytest.mark.usefixtures("quick")


def test_what_the_namespace_lacks(api, recipe, kubernetes):
    cluster, kubeconfig = kubernetes
    api.frames = [ended(*PODS, policy="Always")]

    def look():
        pull = 'cluster.image_pull_secrets=["pull"]'
        return table(doctor(api, "--kubeconfig", kubeconfig, "--set", pull))

    missing = (
        "fix",
        "there is no secret pull in the namespace kubeflow. Create it there (see Install in docs/"
        "operating.md), or correct its name in the section cluster.",
    )
    assert look()["secret"][1] == missing
    cluster.add(
        "secrets",
        {"metadata": {"name": "pull", "namespace": "kubeflow"}, "data": {".dockerconfigjson": "e30="}},
    )
    assert look()["secret"][1] == ("ok", "pull has .dockerconfigjson")
    data = cluster.objects["secrets"][0]["data"]
    data["AWS_SECRET_KEY"] = data.pop("AWS_SECRET_ACCESS_KEY")
    assert look()["secret"][0] == (
        "note",
        "adapt-pruner has AWS_ACCESS_KEY_ID (and AWS_SECRET_KEY, which no task reads). It lacks "
        "AWS_SECRET_ACCESS_KEY: without, pods need a cloud role. Add them if that is not meant.",
    )
    del cluster.objects["configmaps"][0]["data"]["MLFLOW_TRACKING_URI"]
    state, said = look()["config map"][0]
    assert (state, "MLFLOW_TRACKING_URI: without, nothing is tracked" in said) == ("note", True)
    cluster.objects["configmaps"].clear()
    assert look()["config map"][0][0] == "fix"
    cluster.forbidden = {"get secrets", "list nodes"}
    found = look()
    assert [state for state, _ in found["kubernetes"]] == ["note"] * 3
    assert "nodes" not in found
    assert found["kubernetes"][0][1].startswith("your account must not get secrets (403)")


def test_a_kubeconfig_that_leads_nowhere(api, recipe, kubernetes, tmp_path):
    api.frames = [ended(*PODS)]
    result = doctor(api, "--kubeconfig", tmp_path / "none")
    assert result.exit_code == 2
    assert "none cannot be used" in result.stderr
    result = doctor(api, "--kubeconfig", kubernetes[1], "--kube-context", "elsewhere")
    assert result.exit_code == 2
    text = kubernetes[1].read_text()
    kubernetes[1].write_text(re.sub(r"127.0.0.1:\d+", "127.0.0.1:9", text))
    result = doctor(api, "--kubeconfig", kubernetes[1], "--kube-context", "there")
    assert {"note"} == {state for state, _ in table(result)["kubernetes"]}
    assert "cannot be reached" in table(result)["kubernetes"][0][1]


GPU = {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": "4"}
TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
H100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"labels": {}}, "the label nvidia.com/gpu.product is not NVIDIA-H100-80GB-HBM3"),
        (
            {"taints": [TAINT | {"key": "dedicated"}]},
            "the taint dedicated=present:NoSchedule is not tolerated",
        ),
        (
            {"taints": [TAINT | {"effect": "NoExecute"}]},
            "the taint nvidia.com/gpu=present:NoExecute is not tolerated",
        ),
        ({"taints": [TAINT | {"key": "soft", "effect": "PreferNoSchedule"}]}, ""),
        ({"allocatable": GPU | {"nvidia.com/gpu": "1"}}, "it has 1 of the 2 of nvidia.com/gpu"),
        ({"allocatable": {"cpu": "64", "memory": "512Gi"}}, "it has 0 of the 2 of nvidia.com/gpu"),
        ({"allocatable": GPU | {"cpu": "3500m"}}, "it has 3500m of the 4 of cpu"),
        ({"allocatable": GPU | {"memory": "33554431Ki"}}, "it has 33554431Ki of the 32Gi of memory"),
        ({"allocatable": GPU | {"memory": "33554432Ki"}}, ""),
    ],
)
def test_a_node_takes_a_pod_if_labels_taints_and_resources_allow_it(submission, changes, reason):
    settings = ClusterSettings(
        gpus=2,
        gpu_node_selector=H100,
        gpu_tolerations=(Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule"),),
    )
    found = misfit(
        pod_of(settings, "recover-train"),
        node("n", **{"allocatable": GPU, "labels": H100, "taints": [TAINT]} | changes),
    )
    assert found == reason


def pod_of(cluster, component, **training):
    settings = load_recipe(Path("trial.yaml"))
    settings = replace(settings, cluster=cluster, training=replace(settings.training, **training))
    (pod,) = [pod for pod in pods_of(prepare(settings)) if pod.component == component]
    return pod


def test_a_pipeline_that_no_node_can_take_names_component_and_reasons(api, recipe, kubernetes):
    api.frames = [ended(*PODS)]
    arguments = ["--kubeconfig", kubernetes[1], "--set", "cluster.components.recover-train={gpus: 16}"]
    (line,) = fixes(doctor(api, *arguments))
    assert line.startswith(
        "nodes: no node can take recover-train (1 of 3: it has 2 of the 4 of cpu; 1 of 3: it has 0 of the "
        "16 of nvidia.com/gpu; 1 of 3: it has 8 of the 16 of nvidia.com/gpu). "
    )


def test_pods_that_fit_nowhere_for_the_same_reason_are_one_line(api, recipe, kubernetes):
    api.frames = [ended(*PODS)]
    (line,) = fixes(doctor(api, "--kubeconfig", kubernetes[1], "--set", "cluster.node_selector.zone=x"))
    names, _, why = line.removeprefix("nodes: no node can take ").partition(" (")
    assert len(names.split(", ")) == 10
    assert why.startswith("3 of 3: the label zone is not x)")


def test_the_nodes_of_a_training_on_several_are_what_is_looked_for(recipe):
    """The step's own pod only waits for them."""
    cluster = ClusterSettings(
        components={"recover-train": ComponentSettings(gpus=8, memory="256Gi", cpu="48")}
    )
    pod = pod_of(cluster, "recover-train", nodes=2, global_batch=16)
    assert pod.requests == {"cpu": "48", "memory": "256Gi", "nvidia.com/gpu": "8"}


def test_of_pods_in_the_same_place_the_largest_is_tried(submission, tmp_path):
    pods = {pod.component: pod for pod in pods_of(submission)}
    assert [pod.component for pod in largest_pods(list(pods.values()))] == list(PODS)
    larger = {"evaluate": "cpu: '5'", "prune-step": "memory: 33Gi", "recover-train": "gpus: 2"}
    overrides = [f"cluster.components.{name}={{{text}}}" for name, text in larger.items()]
    settings = load_recipe(Path("trial.yaml"), tuple(overrides))
    assert [pod.component for pod in largest_pods(pods_of(prepare(settings)))] == [
        "recover-train",
        "finalize",
    ]
    settings = load_recipe(Path("trial.yaml"), ("cluster.components.publish={queue: last}",))
    found = largest_pods(pods_of(prepare(settings)))
    assert {pod.component for pod in found} == {*PODS, "publish"}
    write_probe(prepare(settings), found, tmp_path / "probe.yaml")
    labels = (
        parse(tmp_path / "probe.yaml")[1].platforms["kubernetes"].deployment_spec.executors["exec-publish"]
    )
    assert dict(labels["podMetadata"]["labels"]) == {
        "adapt-pruner/component": "publish",
        "adapt-pruner/recipe": "doctor",
        "kueue.x-k8s.io/queue-name": "last",
    }
