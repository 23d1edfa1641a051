"""The recipe's ``cluster`` section: each setting reaches the pods."""

import dataclasses
import json
import re
import typing

import pytest
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2 as kubernetes_pb2

from core.settings.cluster import ClusterSettings, ComponentName, ComponentSettings, Toleration
from core.settings.parameters import parameters_of
from core.settings.recipe import settings_from_dict
from core.storage.store import open_store
from pipelines.adapt_accel import compile_pipeline
from pipelines.cluster import CONFIG_KEYS, label_of
from tests.support.ir import dags, executors, parse
from tests.support.project import ROOT

LEAST = {
    "name": "trial",
    "model": {"base": "m"},
    "calibration": {"source": {"path": "c.txt"}},
    "prune": {"phases": 1},
}
ENVIRONMENT = [{"name": "TMPDIR", "value": "/scratch"}, {"name": "HF_HOME", "value": "/scratch/huggingface"}]
SHARED = {"volumeName": "shared-memory", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "1Gi"}
SELECTOR = {"pool": "big", "example.com/zone": "1"}
TAINTS = [{"key": "dedicated", "value": "ml", "effect": "NoSchedule"}, {"operator": "Exists"}]
TOLERATIONS = [
    {"key": "dedicated", "operator": "Equal", "value": "ml", "effect": "NoSchedule"},
    {"operator": "Exists"},
]
PULL = {"secretName": "regcred", "secretNameParameter": {"runtimeValue": {"constant": "regcred"}}}

# The setting, as a recipe says it; a component whose pods show it; where in the IR; what must stand there.
CASES = [
    ("image", {"image": "r.example/i:1"}, "finalize", "container.image", "r.example/i:1"),
    ("image_pull_policy", {"image_pull_policy": "Always"}, "evaluate", "imagePullPolicy", "Always"),
    ("image_pull_secrets", {"image_pull_secrets": ["regcred"]}, "evaluate", "imagePullSecret", [PULL]),
    ("run_as_user", {"run_as_user": 2000}, "evaluate", "securityContext.runAsUser", "2000"),
    ("run_as_user", {"run_as_user": 0}, "evaluate", "securityContext", {"runAsNonRoot": True}),
    ("secret", {"secret": "keys"}, "publish", "secretAsEnv.0.secretName", "keys"),
    ("secret", {"secret": ""}, "publish", "secretAsEnv", None),
    ("config_map", {"config_map": "places"}, "publish", "configMapAsEnv.0.configMapName", "places"),
    ("config_map", {"config_map": ""}, "publish", "configMapAsEnv", None),
    (
        "environment",
        {"environment": {"HTTPS_PROXY": "http://proxy:3128"}},
        "needs-run",
        "container.env",
        [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    ),
    ("gpus", {"gpus": 2}, "recover-train", "container.resources.accelerator.resourceCount", "2"),
    ("gpus", {"gpus": 0}, "recover-train", "container.resources.accelerator", None),
    (
        "gpu_type",
        {"gpu_type": "amd.com/gpu"},
        "evaluate",
        "container.resources.accelerator.resourceType",
        "amd.com/gpu",
    ),
    ("gpu_node_selector", {"gpu_node_selector": SELECTOR}, "calibrate", "nodeSelector.labels", SELECTOR),
    ("gpu_tolerations", {"gpu_tolerations": TAINTS}, "calibrate", "tolerations", TOLERATIONS),
    ("cpu", {"cpu": "500m"}, "prune-step", "container.resources.resourceCpuRequest", "500m"),
    ("memory", {"memory": "48Gi"}, "prune-step", "container.resources.resourceMemoryRequest", "48Gi"),
    ("memory", {"memory": "48Gi"}, "prune-step", "container.resources.resourceMemoryLimit", "48Gi"),
    (
        "shared_memory",
        {"shared_memory": "8Gi"},
        "evaluate",
        "emptyDirMounts",
        [{**SHARED, "sizeLimit": "8Gi"}],
    ),
    ("shared_memory", {"shared_memory": ""}, "evaluate", "emptyDirMounts", None),
    (
        "scratch",
        {"scratch": "90Gi"},
        "publish",
        "emptyDirMounts",
        [SHARED, {"volumeName": "scratch", "mountPath": "/scratch", "sizeLimit": "90Gi"}],
    ),
    ("scratch", {"scratch": "90Gi"}, "publish", "container.env", ENVIRONMENT),
    (
        "scratch_storage_class",
        {"scratch": "90Gi", "scratch_storage_class": "fast"},
        "publish",
        "genericEphemeralVolume",
        [
            {
                "volumeName": "scratch",
                "mountPath": "/scratch",
                "accessModes": ["ReadWriteOnce"],
                "size": "90Gi",
                "storageClassName": "fast",
            }
        ],
    ),
    (
        "scratch_storage_class",
        {"scratch": "90Gi", "scratch_storage_class": "fast"},
        "publish",
        "container.env",
        ENVIRONMENT,
    ),
    (
        "cache_claim",
        {"cache_claim": "checkpoints"},
        "evaluate",
        "pvcMount",
        [
            {
                "constant": "checkpoints",
                "pvcNameParameter": {"runtimeValue": {"constant": "checkpoints"}},
                "mountPath": "/cache",
            }
        ],
    ),
    (
        "cache_claim",
        {"cache_claim": "checkpoints"},
        "evaluate",
        "container.env",
        [{"name": "ADAPT_PRUNER_CACHE", "value": "/cache"}],
    ),
    ("timeout", {"timeout": "1.5h"}, "recover-train", "activeDeadlineSeconds", "5400"),
    ("retries", {"retries": 5}, "calibrate", "retryPolicy.maxRetryCount", 5),
    ("retries", {"retries": 0}, "calibrate", "retryPolicy", None),
    ("retry_wait", {"retry_wait": "2min"}, "calibrate", "retryPolicy.backoffDuration", "120s"),
    ("retry_within", {"retry_within": "1h"}, "calibrate", "retryPolicy.backoffMaxDuration", "3600s"),
    ("node_selector", {"node_selector": SELECTOR}, "needs-run", "nodeSelector.labels", SELECTOR),
    ("tolerations", {"tolerations": TAINTS}, "needs-run", "tolerations", TOLERATIONS),
    (
        "queue",
        {"queue": "research"},
        "needs-run",
        "podMetadata.labels",
        {
            "kueue.x-k8s.io/queue-name": "research",
            "adapt-pruner/component": "needs-run",
            "adapt-pruner/recipe": "trial",
        },
    ),
]
COMPONENTS = typing.get_args(ComponentName)
OWN = [field.name for field in dataclasses.fields(ComponentSettings)]


def compiled(folder, cluster, **more):
    """Component to all that the compiled pipeline says of its pods, read strictly."""
    path = folder / "pipeline.yaml"
    compile_pipeline(settings_from_dict({**LEAST, "cluster": cluster, **more}), path)
    spec, platform = parse(path)
    configs = platform.platforms["kubernetes"].deployment_spec.executors
    found = {}
    for _, dag in dags(spec):
        for task in dag.dag.tasks.values():
            label = spec.components[task.component_ref.name].executor_label
            if not label or label.endswith("-left"):  # evaluations, as those that are told their phase
                continue
            config = kubernetes_pb2.KubernetesExecutorConfig()
            json_format.ParseDict(json_format.MessageToDict(configs[label]), config)
            found[re.sub(r"^exec-|-\d+$", "", label)] = {
                **json_format.MessageToDict(executors(spec)[label]),
                **json_format.MessageToDict(task),
                **json_format.MessageToDict(config),
            }
    # It is told whose tasks get accelerators: that follows from the others' settings.
    del found["resolve-base"]["inputs"]["parameters"]["accelerated"]
    return found


def piece(pods, where):
    for key in where.split("."):
        pods = pods[int(key)] if key.isdigit() else pods.get(key)
        if pods is None:
            return None
    return pods


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("plain"), {})


@pytest.mark.parametrize(("name", "cluster", "component", "where", "expected"), CASES)
def test_a_setting_reaches_the_pods(tmp_path, plain, name, cluster, component, where, expected):
    assert piece(compiled(tmp_path, cluster)[component], where) == expected
    assert piece(plain[component], where) != expected, "else this would show nothing"


@pytest.mark.parametrize(
    ("name", "cluster", "component", "where", "expected"), [case for case in CASES if case[0] in OWN]
)
def test_one_component_can_have_it_otherwise(tmp_path, plain, name, cluster, component, where, expected):
    pods = compiled(tmp_path, {"components": {component: cluster}})
    assert piece(pods.pop(component), where) == expected
    assert pods == {other: plain[other] for other in pods}


def test_a_training_on_nodes_has_a_small_pod_and_is_told_what_they_get(tmp_path, plain):
    cluster = {"gpus": 8, "memory": "9Gi", "cpu": "7", "training_runtime": "ours", "queue": "research"}
    found = compiled(tmp_path, cluster, training={"nodes": 2})
    pod = found["recover-train"]["container"]
    assert {key: value for key, value in pod["resources"].items() if not key.startswith("resource")} == {
        "cpuRequest": 0.5,
        "memoryRequest": 4.294967296,
        "memoryLimit": 4.294967296,
    }
    (told,) = [each["value"] for each in pod["env"] if each["name"] == "ADAPT_PRUNER_NODES"]
    assert json.loads(told) == {
        "runtime": "ours",
        "resources": {
            "requests": {"cpu": "7", "memory": "9Gi"},
            "limits": {"memory": "9Gi", "nvidia.com/gpu": "8"},
        },
    }
    assert piece(found["evaluate"], "container.resources.accelerator.resourceCount") == "8"
    others = [pods for name, pods in found.items() if name != "recover-train"]
    assert not any("ADAPT_PRUNER_NODES" in json.dumps(pods) for pods in [*others, *plain.values()])


def test_variables_of_the_config_map_are_those_that_the_store_reads(monkeypatch):
    values = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_DEFAULT_REGION": "eu-central-1"}
    assert values.keys() | {"MLFLOW_TRACKING_URI"} == set(CONFIG_KEYS)
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    meta = open_store("s3://bucket/prefix")._client.meta
    assert {"AWS_ENDPOINT_URL": meta.endpoint_url, "AWS_DEFAULT_REGION": meta.region_name} == values


def test_every_setting_is_in_the_table():
    names = {field.name for field in dataclasses.fields(ClusterSettings)}
    assert {case[0] for case in CASES} == names - {"components", "training_runtime"}
    assert set(OWN) <= names


def test_a_components_settings_are_those_of_the_cluster_and_have_no_defaults():
    cluster = typing.get_type_hints(ClusterSettings)
    for name, hint in typing.get_type_hints(ComponentSettings).items():
        assert hint == cluster[name] | None
    assert ComponentSettings().named() == {}


def test_the_components_are_those_of_the_pipeline(plain):
    assert set(plain) == set(COMPONENTS)
    files = {path.stem.replace("_", "-") for path in (ROOT / "components").glob("*.py")}
    assert set(COMPONENTS) == files - {"--init--", "decorator", "runtime", "check-pod"}


def test_recover_train_alone_may_have_several_gpus(tmp_path):
    pods = compiled(tmp_path, {"components": {"recover-train": {"gpus": 4}}})
    counts = {name: piece(pod, "container.resources.accelerator.resourceCount") for name, pod in pods.items()}
    assert counts["recover-train"] == "4"
    assert set(counts.values()) == {"4", "1", None}
    assert [name for name, count in counts.items() if count == "4"] == ["recover-train"]


def test_gpu_tasks_alone_go_to_the_gpu_nodes(tmp_path):
    cluster = {"node_selector": {"a": "b"}, "gpu_node_selector": {"c": "d"}, "gpu_tolerations": TAINTS}
    pods = compiled(tmp_path, {**cluster, "components": {"prune-step": {"gpus": 1}, "evaluate": {"gpus": 0}}})
    labels = {name: piece(pod, "nodeSelector.labels") for name, pod in pods.items()}
    on_gpus = {"calibrate", "score-layers", "recover-train", "prune-step"}
    assert {name for name, pod in pods.items() if piece(pod, "tolerations")} == on_gpus
    assert {name for name, found in labels.items() if found == {"a": "b", "c": "d"}} == on_gpus
    assert {name for name, found in labels.items() if found == {"a": "b"}} == set(COMPONENTS) - on_gpus


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("table5-qwen2.5-0.5b", "table5-qwen2.5-0.5b"),
        ("Llama_3.2 (1B), 50 %", "Llama_3.2-1B-50"),
        ("  ümlaut/näme!", "mlaut-n-me"),
        ("x" * 62 + "._" + "y" * 9, "x" * 62),
        ("???", ""),
    ],
)
def test_a_recipes_name_becomes_a_valid_label(name, label):
    assert label_of(name) == label
    assert re.fullmatch(r"(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?", label)  # Kubernetes' own rule


def test_pods_run_as_the_images_user_and_read_the_keys_that_are_there(plain):
    for pods in plain.values():
        assert pods["securityContext"] == {"runAsUser": "10001", "runAsGroup": "0", "runAsNonRoot": True}
        assert pods["secretAsEnv"][0]["optional"] is pods["configMapAsEnv"][0]["optional"] is True


def test_the_section_survives_the_way_through_json_and_stays_out_of_the_key_and_of_the_run_form():
    cluster = {
        "tolerations": TAINTS,
        "node_selector": {"zone": 1.0},
        "components": {"evaluate": {"gpus": 2.0, "tolerations": TAINTS[:1]}},
    }
    settings = settings_from_dict({**LEAST, "cluster": cluster})
    assert settings.cluster.node_selector == {"zone": "1"}
    own = ComponentSettings(
        gpus=2, tolerations=(Toleration(key="dedicated", value="ml", effect="NoSchedule"),)
    )
    assert settings.cluster.components == {"evaluate": own}
    assert settings_from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert settings.digest() == settings_from_dict(LEAST).digest()
    assert parameters_of(settings) == parameters_of(settings_from_dict(LEAST))
