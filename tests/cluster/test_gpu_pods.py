"""GPU pods, field by field: what NVIDIA's device plugin (0.17) and Kubernetes document, and what a run asks.

The pods are made of the compiled pipeline as KFP's driver makes them (``initPodSpecPatch`` and
``extendPodSpecPatch`` of 2.17). No GPU takes part.
"""

import re
from decimal import Decimal

import pytest
from google.protobuf import json_format
from kubernetes.client import models
from kubernetes.utils.quantity import parse_quantity

from core.settings.cluster import ClusterSettings, ComponentSettings, Toleration
from pipelines.adapt_accel import compile_pipeline
from pipelines.remote.submission import hints
from tests.support.ir import executors, parse, settings
from tests.support.openapi import misfits
from tests.support.project import ROOT

MIG, SHARED, SHARED_MIG = "nvidia.com/mig-1g.5gb", "nvidia.com/gpu.shared", "nvidia.com/mig-1g.10gb.shared"
KINDS = {
    "recover-train": "nvidia.com/gpu",
    "calibrate": MIG,
    "evaluate": SHARED,
    "prune-step": SHARED_MIG,
}
"""What the plugin advertises: whole GPUs, MIG devices (strategy mixed), time slices, slices of MIG."""
WITHOUT = ("resolve-base", "needs-run", "prepare-data", "score-layers", "publish", "finalize")
PRODUCT = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
CLUSTER = ClusterSettings(
    gpu_node_selector=PRODUCT,
    gpu_tolerations=(Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule"),),
    components={
        **{name: ComponentSettings(gpu_type=kind) for name, kind in KINDS.items()},
        "recover-train": ComponentSettings(gpus=4, memory="256Gi", shared_memory="8Gi"),
    },
)


@pytest.fixture(scope="module")
def pods(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "pipeline.yaml"
    compile_pipeline(settings(1, cluster=CLUSTER), path)
    spec, platform = parse(path)
    configs = platform.platforms["kubernetes"].deployment_spec.executors
    return {
        label.removeprefix("exec-"): pod(executor.container, json_format.MessageToDict(configs[label]))
        for label, executor in executors(spec).items()
    }


def pod(container, config):
    """The pod's specification that KFP's driver makes, less its own launcher."""
    wanted = container.resources
    limits, requests = {"memory": wanted.resource_memory_limit}, {"memory": wanted.resource_memory_request}
    requests["cpu"] = wanted.resource_cpu_request
    if wanted.accelerator.resource_type:
        limits[wanted.accelerator.resource_type] = wanted.accelerator.resource_count
    mounts = config.get("emptyDirMounts", ())
    return {
        "containers": [
            {
                "name": "main",
                "image": container.image,
                "env": [{"name": each.name, "value": each.value} for each in container.env],
                "resources": {"limits": limits, "requests": requests},
                "volumeMounts": [{"name": m["volumeName"], "mountPath": m["mountPath"]} for m in mounts],
                "securityContext": {
                    key: int(value) if isinstance(value, str) else value
                    for key, value in config["securityContext"].items()
                },
            }
        ],
        "nodeSelector": config.get("nodeSelector", {}).get("labels", {}),
        "tolerations": config.get("tolerations", []),
        "volumes": [
            {"name": m["volumeName"], "emptyDir": {"medium": m["medium"], "sizeLimit": m["sizeLimit"]}}
            for m in mounts
        ],
    }


def devices(spec):
    """Names and numbers of the extended resources, which have a domain, in limits and requests."""
    resources = spec["containers"][0]["resources"]
    return [{k: v for k, v in resources[part].items() if "/" in k} for part in ("limits", "requests")]


def test_the_pods_are_what_kubernetes_takes(pods):
    assert set(pods) >= {*KINDS, *WITHOUT}
    for spec in pods.values():
        assert list(misfits(models, "V1PodSpec", spec, "spec")) == []


@pytest.mark.parametrize(("component", "kind"), KINDS.items())
def test_a_device_is_a_limit_of_one_kind_by_the_name_that_the_plugin_advertises(pods, component, kind):
    """Kubernetes: in limits only, or equal in both; the plugin: one kind a container, whole numbers."""
    limits, requests = devices(pods[component])
    assert limits == {kind: "4" if component == "recover-train" else "1"}
    assert requests in ({}, limits)
    assert re.fullmatch(r"nvidia\.com/(gpu|mig-[1-9]g\.\d+gb)(\.shared)?", kind)


@pytest.mark.parametrize("component", WITHOUT)
def test_a_task_without_gpus_can_see_none(pods, component):
    """The plugin shows all GPUs of a node to a container that sets NVIDIA_VISIBLE_DEVICES and asks for none.

    Images of nvidia/cuda set it; ours is made of Python's.
    """
    assert devices(pods[component]) == [{}, {}]
    assert not [each for each in pods[component]["containers"][0]["env"] if "NVIDIA" in each["name"]]
    assert "nvidia.com/gpu" not in repr(pods[component]["tolerations"])
    assert pods[component]["nodeSelector"] == {}
    for dockerfile in (ROOT / "docker").rglob("Dockerfile"):
        assert not re.search(
            r"NVIDIA_(VISIBLE_DEVICES|DRIVER_CAPABILITIES)|FROM nvidia/", dockerfile.read_text()
        )


@pytest.mark.parametrize("component", KINDS)
def test_a_gpu_pod_is_let_onto_the_nodes_that_are_kept_for_gpus(pods, component):
    """The toleration is the one of the plugin's own example; the label is that of GPU feature discovery."""
    assert pods[component]["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    assert pods[component]["nodeSelector"] == PRODUCT


def test_ranks_of_a_pod_have_shared_memory_that_is_part_of_its_memory(pods):
    """NCCL and worker processes use /dev/shm; what lies in a volume of memory counts against the limit."""
    (main,) = pods["recover-train"]["containers"]
    assert main["volumeMounts"] == [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    (volume,) = pods["recover-train"]["volumes"]
    assert volume == {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}
    memory = parse_quantity(main["resources"]["limits"]["memory"])
    assert parse_quantity("8Gi") < memory == parse_quantity(main["resources"]["requests"]["memory"])


def test_devices_need_no_rights(pods):
    """The runtime lets a container use its devices by its control group: neither root nor privileges."""
    for spec in pods.values():
        (main,) = spec["containers"]
        assert main["securityContext"] == {"runAsUser": 10001, "runAsGroup": 0, "runAsNonRoot": True}


def test_cpus_are_not_pinned(pods):
    """Kubernetes gives cores of their own to pods of the class Guaranteed only: with CPU in the limits."""
    for spec in pods.values():
        resources = spec["containers"][0]["resources"]
        assert "cpu" not in resources["limits"]
        assert parse_quantity(resources["requests"]["cpu"]) > Decimal(0)


@pytest.mark.parametrize(
    ("kind", "gpus", "warned"),
    [
        ("nvidia.com/gpu", 4, False),
        (MIG, 1, False),
        (MIG, 2, True),
        (SHARED, 2, True),
        (SHARED_MIG, 2, True),
        ("amd.com/gpu", 2, False),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_several_parts_of_gpus_are_hinted_at(kind, gpus, warned, own):
    """CUDA shows a process one MIG device, and two time slices may be of one GPU or be refused."""
    cluster = ClusterSettings(gpu_type=kind, gpus=gpus)
    if own:
        cluster = ClusterSettings(components={"recover-train": ComponentSettings(gpu_type=kind, gpus=gpus)})
    found = [hint for hint in hints(settings(1, cluster=cluster)) if "part of a GPU" in hint]
    assert [f"{gpus} of {kind}" in hint for hint in found] == [True] * warned
