"""The image itself, by an engine that speaks Docker's API: Docker, or Podman's service (DOCKER_HOST).

IMAGE names it: ``make test-image IMAGE=...``. Without it these tests are skipped.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from kfp import local

from core.settings.recipe import settings_from_dict
from core.storage.interface import join_uri
from core.storage.publication import open_publication
from core.storage.store import open_store
from pipelines.adapt_accel import build_pipeline
from tests.local.test_kills import content, orphans
from tests.support.project import recipe_with

IMAGE = os.environ.get("IMAGE", "")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # settings that only a cluster uses
    pytest.mark.slow,
    pytest.mark.skipif(not IMAGE, reason="IMAGE names no image: make test-image IMAGE=..."),
]

# What a strict cluster allows a pod.
STRICT = {
    "user": "10001:0",
    "read_only": True,
    "tmpfs": {"/tmp": ""},
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "environment": {"OMP_NUM_THREADS": "1"},
}


@pytest.fixture(scope="module")
def engine():
    import docker

    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture
def place(project, tmp_path):
    """A copy of the tiny project, and a folder that any user may write."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work").chmod(0o777)
    shutil.copytree(project, tmp_path / "project")
    subprocess.run(["chmod", "-R", "a+rX", tmp_path], check=True)
    return tmp_path


def recipe_in(place, store):
    texts = {"path": str(place / "project/texts.jsonl")}
    return recipe_with(
        {
            "model.base": str(place / "project/base"),
            "prune.phases": 1,
            "calibration.source": texts,
            "training.sources": [texts],
            "evaluation.perplexity": {"path": str(place / "project/held-out.txt")},
            "storage.store": store,
            "cluster.image": IMAGE,
        }
    )


def run(engine, command, place=None, **options):
    mounts = {} if place is None else {str(place): {"bind": str(place), "mode": "rw"}}
    container = engine.containers.run(
        IMAGE, command, detach=True, network_mode="none", volumes=mounts, **STRICT | options
    )
    try:
        code = container.wait()["StatusCode"]
        return code, container.logs().decode()
    finally:
        container.remove(force=True)


def test_it_says_what_it_is(engine):
    labels = engine.images.get(IMAGE).labels
    for name in ("title", "version", "licenses", "base.name", "revision"):
        assert labels[f"org.opencontainers.image.{name}"], name
    assert labels["io.adapt-pruner.variant"] in ("cpu", "cuda")


def test_it_runs_as_nobody_and_can_write_nothing_but_temporary_files(engine):
    code, shown = run(engine, ["sh", "-c", "id -u; touch /x /home/pruner/x; touch /tmp/x && echo tmp"])
    assert code == 0
    assert {"10001", "tmp"} <= set(shown.split())
    assert shown.count("Read-only") == 2
    code, shown = run(engine, ["grep", "CapBnd", "/proc/self/status"])
    assert int(shown.split()[1], 16) == 0


def test_the_command_runs_without_network_and_without_rights(engine, place):
    import yaml

    recipe = recipe_in(place, str(place / "work/store"))
    (place / "project/recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["adapt-pruner", "run", str(place / "project/recipe.yaml"), "--output", str(place / "work/out")]
    code, shown = run(engine, command, place)
    assert code == 0, shown
    assert "Done in" in shown
    assert orphans(str(place / "work/store")) == set()


def test_the_pipeline_runs_in_containers(engine, place, s3_server, s3_store_uri, monkeypatch):
    from docker.types import Mount

    recipe = recipe_in(place, join_uri(s3_store_uri, "store"))
    known = {name: value for name, value in s3_server.environment().items() if "PROXY" not in name.upper()}
    local.init(
        local.DockerRunner(
            network_mode="host",  # the S3 server listens on this machine alone
            mounts=[Mount(str(place / "project"), str(place / "project"), type="bind", read_only=True)],
            **STRICT | {"environment": STRICT["environment"] | known},
        ),
        pipeline_root=str(place / "work"),
        raise_on_error=True,
    )
    build_pipeline(settings_from_dict(recipe), local=True)()
    store = recipe["storage"]["store"]
    (key,) = {key.split("/")[1] for key in open_store(store).list("runs/")}
    final = open_publication(join_uri(store, "runs", key, "final")).fetch(Path(place, "final"))
    assert (final / "report.html").is_file()
    assert content(join_uri(store, "runs", key, "final"), place / "again")["config.json"]
    assert orphans(store) == set()
