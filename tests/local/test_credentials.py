"""Nothing that a run leaves or says holds a credential of its environment: every byte is searched.

The credentials are canaries, values that occur nowhere else: those of a real S3 server, by which the run gets
at its store, of an MLflow server, and of the Hugging Face hub.
"""

import base64
import contextlib
import gzip
import os
import subprocess
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import boto3
import pytest
from click.testing import CliRunner

from core.errors import SettingsError, StorageError, TrackingError
from core.settings.recipe import settings_from_dict
from core.settings.storage import TrackingSettings
from core.storage.store import open_store
from core.tracking.mlflow import open_tracker
from pipelines.adapt_accel import compile_pipeline
from pipelines.cli import main
from tests.support.evidence import note
from tests.support.project import command_line, recipe_with, write_recipe
from tests.support.servers import BUCKET, mlflow_server

pytestmark = pytest.mark.slow

CANARIES = {
    "HF_TOKEN": "hf_canaryHubTokenQm4tZ8",
    "HUGGING_FACE_HUB_TOKEN": "hf_canaryOldTokenWk2rP6",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-password-Vb7",
    "MLFLOW_TRACKING_USERNAME": "canary-mlflow-user-Xd3",
    "MLFLOW_TRACKING_TOKEN": "canary-mlflow-token-Lg9",
    "SOMETHING_ELSE": "canary-of-the-environment-Hs5",
}
IN_URI = "canary-in-a-uri-Fj1"
TALKATIVE = {
    "TRANSFORMERS_VERBOSITY": "debug",
    "HF_HUB_VERBOSITY": "debug",
    "DATASETS_VERBOSITY": "debug",
    "MLFLOW_LOGGING_LEVEL": "DEBUG",
    "HF_HUB_OFFLINE": "1",
}


def forms(canary):
    """How a canary may be written."""
    text = canary.encode()
    return {
        text,
        base64.b64encode(text).rstrip(b"="),
        urllib.parse.quote(canary, safe="").encode(),
        text.hex().encode(),
    }


def unpacked(content):
    """Return the content, and what is in it if it is an archive."""
    yield content
    if content.startswith(b"\x1f\x8b"):
        with contextlib.suppress(OSError):
            yield gzip.decompress(content)
    if content.startswith(b"PK"):
        import io

        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def leaks(found, canaries):
    """Return which of the named contents hold which canaries; names are looked at, too."""
    return sorted(
        {
            (str(name), which)
            for name, content in found.items()
            for part in (str(name).encode(), *unpacked(content))
            for which, canary in canaries.items()
            for form in forms(canary)
            if form in part
        }
    )


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def objects(uri):
    client, prefix = boto3.client("s3"), uri.removeprefix(f"s3://{BUCKET}/")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
    return {f"s3:{key}": client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def call(folder, *arguments, environment):
    command, own = command_line(*arguments)
    done = subprocess.run(command, cwd=folder, env=own | environment, capture_output=True, timeout=600)
    return done, {"stdout": done.stdout, "stderr": done.stderr}


@pytest.fixture
def canaries(s3_server):
    keys = {"AWS_ACCESS_KEY_ID": s3_server.access_key, "AWS_SECRET_ACCESS_KEY": s3_server.secret_key}
    return CANARIES | keys | {"in a URI": IN_URI}


def environment_of(s3_server):
    return s3_server.environment() | CANARIES | TALKATIVE


def test_a_whole_run_leaves_no_credential_anywhere(folder, tmp_path, s3_server, s3_store_uri, canaries):
    (tmp_path / "mlflow").mkdir()
    write_recipe(folder / "recipe.yaml", {"prune.phases": 1, "training.tokens": "384", "storage.keep": "all"})
    output = tmp_path / "output"
    with mlflow_server(tmp_path / "mlflow") as address:
        environment = environment_of(s3_server)
        environment["MLFLOW_TRACKING_URI"] = f"http://me:{IN_URI}@{address}"
        settings = [f"--set=storage.store={s3_store_uri}", "--set=tracking.model_name=tiny"]
        done, said = call(
            folder, "run", "recipe.yaml", *settings, "--output", output, environment=environment
        )
        assert done.returncode == 0, done.stderr.decode() + (output / "run.log").read_text()[-3000:]
        compiled, spoken = call(
            folder, "compile", "recipe.yaml", *settings, "-o", output / "p.yaml", environment=environment
        )
        assert compiled.returncode == 0
        exported, told = call(
            folder,
            *("export", f"{s3_store_uri}/runs/{key_of(s3_store_uri)}/final", output / "m.gguf"),
            *("--format", "gguf"),
            environment=environment,
        )
        assert exported.returncode == 0, exported.stderr
    kept = files(tmp_path / "mlflow")
    stored = objects(s3_store_uri)
    assert any(str(name).endswith("server.db") for name in kept)
    assert any(str(name).endswith("report.html") for name in kept)
    assert any("/final/record.json" in name for name in stored)
    searched = said | files(output) | stored | kept
    searched |= {f"{name} of compile": content for name, content in spoken.items()}
    searched |= {f"{name} of export": content for name, content in told.items()}
    assert b"me:***@" in b"".join(searched.values()), "where it is tracked is told"
    assert leaks(searched, canaries) == []
    note(
        "Security",
        "credentials of S3, MLflow and the hub, in what a run prints, logs, stores, tracks and exports",
        "found in none",
        len(searched),
    )


def key_of(uri):
    (key,) = {name.removeprefix(uri).split("/")[1] for name in open_store(uri).list("runs/")}
    return key


OTHERS = ("token", "endpoint", "profile", "tracking")


@pytest.mark.parametrize("wrong", ["secret", *OTHERS])
def test_runs_that_fail_tell_no_credential(folder, tmp_path, s3_server, s3_store_uri, canaries, wrong):
    environment = environment_of(s3_server)
    environment["AWS_MAX_ATTEMPTS"] = "1"
    more = {
        "secret": {"AWS_SECRET_ACCESS_KEY": "canary-wrong-secret-Nc8"},
        "token": {"AWS_SESSION_TOKEN": "canary-session-token-Gy4"},
        "endpoint": {"AWS_ENDPOINT_URL_S3": f"http://me:{IN_URI}@127.0.0.1:1"},
        "profile": {"AWS_ENDPOINT_URL_S3": f"me:{IN_URI}@nowhere"},
        "tracking": {"MLFLOW_TRACKING_URI": f"http://me:{IN_URI}@127.0.0.1:1"},
    }[wrong]
    output = tmp_path / "output"
    done, said = call(
        folder,
        *("run", "recipe.yaml", f"--set=storage.store={s3_store_uri}", "--output", output),
        environment=environment | more,
    )
    assert done.returncode in (1, 2), done.stderr
    assert done.stderr.decode().splitlines()[-1].startswith("error: ")
    searched = said | files(output) | objects(s3_store_uri)
    assert leaks(searched, canaries | more | {"in a URI": IN_URI}) == []
    what = {
        "secret": "a wrong secret key",
        "token": "a wrong session token",
        "endpoint": "a password in the endpoint's address, which does not answer",
        "profile": "a password in an invalid endpoint's address",
        "tracking": "a password in the tracking server's address, which does not answer",
    }[wrong]
    note("Security", f"a run that fails: {what}", "told and left without a credential")


def test_the_search_finds_what_is_planted(folder, tmp_path, s3_server, s3_store_uri, canaries, monkeypatch):
    (folder / "sitecustomize.py").write_text("import os, sys; print(dict(os.environ), file=sys.stderr)")
    environment = environment_of(s3_server) | {"PYTHONPATH": str(folder)}
    command, own = command_line("inspect", "base")
    paths = os.pathsep.join([str(folder), own["PYTHONPATH"]])
    done = subprocess.run(
        command, cwd=folder, env=own | environment | {"PYTHONPATH": paths}, capture_output=True, timeout=300
    )
    found = {which for _, which in leaks({"stderr": done.stderr}, canaries)}
    assert found == set(canaries) - {"in a URI"}
    for content in (
        IN_URI.encode(),
        gzip.compress(IN_URI.encode()),
        base64.b64encode(IN_URI.encode()),
        IN_URI.encode().hex().encode(),
    ):
        assert leaks({"planted": content}, canaries) == [("planted", "in a URI")]
    assert leaks({f"x/{IN_URI}": b""}, canaries)


PLACES = {
    "storage.store": f"s3://key:{IN_URI}@bucket/prefix",
    "tracking.uri": f"http://me:{IN_URI}@mlflow:5000",
    "model.base": f"s3://me:{IN_URI}@bucket/model",
    "evaluation.perplexity": {"path": f"https://{IN_URI}@host/text.txt"},
    "training.sources": [{"path": f"https://host/x?access_token={IN_URI}"}],
    "cluster.image": f"docker://me:{IN_URI}@registry/image",
}


@pytest.mark.parametrize("name", PLACES)
def test_settings_with_credentials_are_refused_without_telling_them(folder, tmp_path, name):
    write_recipe(folder / "recipe.yaml", {name: PLACES[name]})
    for arguments in (["run", "recipe.yaml", "--output", "out"], ["compile", "recipe.yaml", "-o", "p.yaml"]):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 2
        assert f"{name}" in done.stderr
        assert "holds a password or a token" in done.stderr
        assert IN_URI not in done.output
    assert not (folder / "p.yaml").exists()
    assert not (folder / "store").exists()
    note("Security", f"a recipe with a password in {name}", "refused with one line that does not tell it")


@pytest.mark.parametrize(
    "override",
    [
        f"storage.store=s3://key:{IN_URI}@bucket",
        f"storage.stor=s3://key:{IN_URI}@bucket",
        f"tracking.uri=http://me:{IN_URI}@host/a/b",
        f"tracking.uri=http://{IN_URI}@host",
        f"http://me:{IN_URI}@host",
        f"prune.target=http://me:{IN_URI}@host",
        f"prune.phases=http://me:{IN_URI}@host",
        f"storage.keep=http://me:{IN_URI}@host",
        f"training.save_every=http://me:{IN_URI}@host",
    ],
)
def test_overrides_with_credentials_are_refused_without_telling_them(folder, override):
    done = CliRunner().invoke(main, ["run", "recipe.yaml", "--set", override])
    assert done.exit_code == 2
    assert IN_URI not in done.output


def test_a_compiled_pipeline_knows_no_environment(tmp_path, monkeypatch, canaries):
    for name, value in canaries.items():
        monkeypatch.setenv(name.replace(" ", "_"), value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{IN_URI}@mlflow:5000")
    settings = settings_from_dict(recipe_with({"storage.store": "s3://bucket/prefix"}))
    compile_pipeline(settings, tmp_path / "p.yaml")
    assert leaks(files(tmp_path), canaries) == []
    note("Security", "the compiled pipeline beside an environment of credentials", "holds none of them")


def test_errors_of_stores_and_trackers_hide_passwords(monkeypatch):
    for uri in (f"s3://key:{IN_URI}@bucket", f"http://me:{IN_URI}@host", f"ftp://{IN_URI}@host"):
        with pytest.raises(StorageError) as caught:
            open_store(uri)
        assert IN_URI not in str(caught.value)
    uri = f"postgresql://me:{IN_URI}@127.0.0.1:1/mlflow"
    with pytest.raises(TrackingError) as failed:
        open_tracker(TrackingSettings(uri=uri), key="k", name="n").start({}, {})
    assert IN_URI not in str(failed.value)
    with pytest.raises(SettingsError) as refused:
        settings_from_dict(recipe_with({"tracking.uri": uri}))
    assert IN_URI not in str(refused.value)


def test_no_source_shows_local_variables_or_the_environment():
    root = Path(__file__).resolve().parents[2]
    for path in (
        path for name in ("core", "pipelines", "components") for path in (root / name).rglob("*.py")
    ):
        text = path.read_text()
        for word in (
            "show_locals=True",
            "rich.traceback",
            "print(os.environ",
            "log.debug(os.environ",
            "cgitb",
        ):
            assert word not in text, path
