"""Base models whose address may move: on the hub, in MLflow, by a HEAD file; and what runs make of them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from core.bases import importing
from core.bases.importing import import_base
from core.bases.resolution import current_base
from core.errors import CheckpointError, SettingsError, StorageError, TrackingError
from core.export.gguf import export_gguf
from core.model.checkpoint import INDEX
from core.runs.run import Run
from core.settings.addresses import base_name
from core.settings.model import ModelSettings
from core.settings.recipe import settings_from_dict
from core.settings.storage import TrackingSettings
from core.steps.frame import provenance_of
from core.steps.needs_run import run_needs_run
from core.storage.interface import join_uri
from core.storage.publication import open_publication, publish
from core.storage.store import open_store
from core.tracking import registry
from core.tracking.mlflow import open_tracker
from tests.support.evidence import note
from tests.support.hub import Repository, run_hub
from tests.support.models import LLAMA3
from tests.support.project import recipe_with, resolve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_REGISTRY_URI", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(folder):
    """The tiny project with two revisions of its model."""
    shutil.copytree(folder / "base", folder / "newer")
    (folder / "newer" / "LICENSE").write_text("another")
    return folder


@pytest.fixture
def models(store_uri):
    """Where checkpoints are published."""
    return join_uri(store_uri, "models")


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"


def take_up(base, store, **settings):
    tracking_uri = settings.pop("tracking_uri", "")
    return import_base(ModelSettings(base=base, **settings), str(store), tracking_uri=tracking_uri)


def refused(call, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    return text


def register(tracking, name, source, alias=None, tags=None):
    from core.tracking.client import connect

    client = connect(tracking)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    version = client.create_model_version(name, source=source, tags=tags)
    if alias:
        client.set_registered_model_alias(name, alias, version.version)
    return version.version


def test_a_head_file_names_what_is_current(folder, models, tmp_path):
    first = publish(folder / "base", join_uri(models, "runs/1/final")).digest[:16]
    second = publish(folder / "newer", join_uri(models, "runs/2/final")).digest[:16]
    store, seen = open_store(models), []
    kind = "s3" if models.startswith("s3:") else "folder"
    for line in ("runs/1/final\n", "runs/2/final", join_uri(models, "runs/1/final") + "\r\n"):
        store.write_bytes("HEAD", line.encode())
        uri, revision = take_up(join_uri(models, "HEAD"), tmp_path / "store")
        seen.append(revision)
        assert open_publication(uri).manifest.digest[:16] == revision
    assert seen == [first, second, first]
    assert first != second
    note("Faults", f"a HEAD file moves on ({kind})", "the next run takes the publication that it names")


def test_a_local_head_file_may_name_a_plain_folder_and_a_file_uri(folder, tmp_path):
    revision = take_up("base", tmp_path / "store")[1]
    (folder / "HEAD").write_text("base\n")
    assert take_up("./HEAD", tmp_path / "store")[1] == revision
    assert take_up(f"file://{folder}/HEAD", tmp_path / "store")[1] == revision
    publish(folder / "base", str(tmp_path / "a b"))
    (folder / "HEAD").write_text((tmp_path / "a b").as_uri())
    uri, _ = take_up("./HEAD", tmp_path / "store")
    assert uri == (tmp_path / "a b").as_uri()


BAD_LINES = {
    "nothing": (b"", "not one line of plain text"),
    "two lines": (b"base\nnewer\n", "not one line of plain text"),
    "an escape sequence": (b"base\x1b[2J", "not one line of plain text"),
    "blanks around it": (b" base\n", "not one line of plain text"),
    "bytes that are no text": (b"\xff\xfe\x00", "no text"),
    "a megabyte": (b"x" * 1_000_000, "more than 1024 bytes"),
    "a path out of its folder": (b"../elsewhere", "leaves its folder"),
    "an address on the web": (b"http://example.org/model", "not followed from there"),
    "a registry's address": (b"models:/name@alias", "not followed from there"),
    "another HEAD file": (b"sub/HEAD", "another HEAD file"),
    "a HEAD file on S3": (b"s3://other/HEAD", "another HEAD file"),
    "a hub address without an owner": (b"hf://model", "not a valid address on the hub"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_what_a_head_file_holds_is_not_trusted(folder, what):
    content, problem = BAD_LINES[what]
    (folder / "HEAD").write_bytes(content)
    text = refused(lambda: current_base(ModelSettings(base="./HEAD")))
    assert text.startswith("model.base=./HEAD holds ")
    assert problem in text
    assert text.isprintable()
    assert len(text) < 400
    note("Security", f"a HEAD file that holds {what}", "one line says what it must hold")


def test_a_head_file_on_s3_names_no_file_of_the_machine(s3_store_uri, folder):
    for line, problem in (
        (f"file://{folder}/base", "not followed from there"),
        (f"{folder}/base", "leaves its folder"),
    ):
        open_store(s3_store_uri).write_bytes("HEAD", line.encode())
        text = refused(lambda: current_base(ModelSettings(base=f"{s3_store_uri}/HEAD")))
        assert problem in text
    note("Security", "a HEAD file on S3 that names a file of the machine", "one line refuses it", 2)


def test_a_head_file_that_is_not_there_is_named(folder, s3_store_uri):
    for base in ("gone/HEAD", f"{s3_store_uri}/HEAD"):
        text = refused(lambda base=base: current_base(ModelSettings(base=base)))
        assert text.startswith(f"model.base={base}: there is no such file. Write the address")
    bucket = "s3://no-such-bucket-at-all/HEAD"
    assert "there is no bucket" in refused(lambda: current_base(ModelSettings(base=bucket)), StorageError)


def test_a_head_file_that_names_no_publication_is_named_with_it(folder, s3_store_uri, tmp_path):
    open_store(s3_store_uri).write_bytes("HEAD", b"runs/7/final")
    text = refused(lambda: take_up(f"{s3_store_uri}/HEAD", tmp_path / "store"))
    assert text.startswith(f"model.base={s3_store_uri}/HEAD stands for {s3_store_uri}/runs/7/final now. ")
    assert "has no manifest" in text


def test_an_alias_of_the_registry_is_looked_up_by_every_run(folder, models, tracking, tmp_path):
    name = "tiny-s3" if models.startswith("s3:") else "tiny"
    old, new = join_uri(models, "old"), join_uri(models, "new")
    digests = [publish(folder / kind, uri).digest[:16] for kind, uri in (("base", old), ("newer", new))]
    first = register(tracking, name, old, alias="prod")
    assert take_up(f"models:/{name}@prod", tmp_path / "store", tracking_uri=tracking)[1] == digests[0]
    register(tracking, name, new, alias="prod")
    assert take_up(f"models:/{name}@prod", tmp_path / "store", tracking_uri=tracking)[1] == digests[1]
    assert take_up(f"models:/{name}/{first}", tmp_path / "store", tracking_uri=tracking)[1] == digests[0]
    kind = "s3" if models.startswith("s3:") else "folder"
    note("Faults", f"an alias in MLflow's registry moves on ({kind})", "the next run takes the new version")


def test_what_a_run_of_ours_has_registered_is_a_base(folder, tracking, tmp_path):
    uri = join_uri(tmp_path / "models", "final")
    digest = publish(folder / "base", uri).digest[:16]
    tracker = open_tracker(TrackingSettings(uri=tracking), key="k", name="a run")
    registry.register(tracker, "ours", uri, params={}, phase=1)
    found = take_up("models:/ours@candidate", tmp_path / "store", tracking_uri=tracking)
    assert found == ((tmp_path / "models" / "final").as_uri(), digest)


def test_the_checkpoint_of_a_version_whose_source_is_a_logged_model_is_its_tag(folder, tracking, tmp_path):
    digest = publish(folder / "base", str(tmp_path / "final")).digest[:16]
    tags = {"checkpoint_uri": str(tmp_path / "final")}
    register(tracking, "external", "s3://never/looked/at", alias="prod", tags=tags)
    assert take_up("models:/external@prod", tmp_path / "store", tracking_uri=tracking)[1] == digest


def test_the_tracking_server_may_come_from_the_environment(folder, tracking, monkeypatch):
    register(tracking, "by-environment", str(folder / "base"), alias="prod")
    model = ModelSettings(base="models:/by-environment@prod")
    assert refused(lambda: current_base(model)) == (
        "model.base=models:/by-environment@prod needs MLflow. Set tracking.uri or MLFLOW_TRACKING_URI."
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    assert current_base(model).base == str(folder / "base")


@pytest.mark.parametrize(
    ("base", "what"),
    [
        ("models:/nobody@prod", "alias"),
        ("models:/known@nobody", "alias"),
        ("models:/known/99", "version"),
    ],
)
def test_a_version_that_is_not_registered_is_named(folder, tracking, base, what):
    register(tracking, "known", str(folder / "base"), alias="prod")
    text = refused(lambda: current_base(ModelSettings(base=base), tracking))
    assert text.startswith(f"model.base={base} is not in MLflow's registry at sqlite:///")
    assert text.endswith(f"Check the name and the {what} there.")
    note("Faults", f"a registry without the {what} that is asked for", "one line names it")


@pytest.mark.parametrize("source", ["mlflow-artifacts:/1/model", "https://example.org/m\x1b", "gs://b/m"])
def test_a_version_that_lies_where_no_run_can_read_is_refused(tracking, source):
    register(tracking, "afar", source, alias="prod")
    text = refused(lambda: current_base(ModelSettings(base="models:/afar@prod"), tracking))
    assert "neither a store nor a folder. Register a version whose source is" in text
    assert text.isprintable()
    note("Security", "a registered version at an address of another kind", "one line refuses it")


def test_mlflow_out_of_reach_is_one_line(folder):
    call = lambda: current_base(ModelSettings(base="models:/x@prod"), "http://127.0.0.1:9")  # noqa: E731
    assert "cannot be reached" in refused(call, TrackingError)


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_no_reader_opens_do_not_come_into_the_store(folder, tmp_path, sharded):
    """Some repositories hold the same weights twice, as shards and as ``consolidated.safetensors``."""
    base = folder / "base"
    if sharded:
        shard = (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
        names = safe_open(shard, "pt").keys()
        (base / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard.name)}))
    alone, revision = take_up("./base", tmp_path / "alone")
    for name in ("consolidated.safetensors", "model-1.safetensors", *["model.safetensors"] * sharded):
        (base / name).write_bytes(b"not read")
    beside, same = take_up("./base", tmp_path / "beside")
    assert revision == same
    files = open_publication(beside).manifest.paths
    assert files == open_publication(alone).manifest.paths
    weights = [name for name in files if name.endswith(".safetensors")]
    assert weights == ["model-00001-of-00001.safetensors" if sharded else "model.safetensors"]


def test_a_publication_with_weights_that_no_reader_opens_is_a_base_still(folder, tmp_path):
    """An earlier version has published such bases."""
    (folder / "base" / "consolidated.safetensors").write_bytes(b"not read")
    publish(folder / "base", folder / "published")
    assert "consolidated.safetensors" in open_publication(str(folder / "published")).manifest.paths
    (folder / "published" / "consolidated.safetensors").write_bytes(b"damaged")
    uri, _ = take_up("./published", tmp_path / "store")
    assert "consolidated.safetensors" not in open_publication(uri).manifest.paths


def test_a_hub_address_is_the_repository_at_its_revision(folder, project, tmp_path):
    main = {path.name: path.read_bytes() for path in (project / "base").iterdir()}
    repository = Repository(branches={"main": main, "v1": {**main, "LICENSE": b"free"}})
    (folder / "team" / "model").mkdir(parents=True)  # a folder of that name is not meant
    (folder / "HEAD").write_text("hf://team/model@v1\n")
    code = (
        "from core.bases.importing import import_base; from core.settings.model import ModelSettings\n"
        "for base, revision in (('hf://team/model', ''), ('hf://team/model@v1', ''),\n"
        "                       ('hf://team/model', 'v1'), ('./HEAD', '')):\n"
        "    print(import_base(ModelSettings(base=base, revision=revision), 'store')[1])"
    )
    with run_hub(models={"team/model": repository}) as hub:
        # The hub's client reads HF_ENDPOINT when it is imported: this must be a process of its own.
        environment = {**os.environ, **hub.environment(str(tmp_path / "cache")), "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        )
    assert result.stdout.split() == [repository.commit(name) for name in ("main", "v1", "v1", "v1")]


def test_what_is_made_of_a_hub_address_names_the_repository(folder):
    """A checkpoint is handed on: its card links to the base by this name."""
    run = Run.load(resolve(recipe_with({}))[0])
    for base, name in {"hf://team/model@v1": "team/model", "models:/x@y": "models:/x@y"}.items():
        model = dataclasses.replace(run.settings.model, base=base)
        changed = dataclasses.replace(run, settings=dataclasses.replace(run.settings, model=model))
        assert provenance_of(changed, 0, "", step="test")["base"] == name
        assert base_name(base) == name


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"base": "hf://model"}, "model.base=hf://model is not a valid hub address. Write hf://owner/name"),
        ({"base": "hf://a/b@"}, "model.base=hf://a/b@ is not a valid hub address."),
        ({"base": "models:/name"}, "model.base=models:/name names no version. Write models:/name@alias"),
        ({"base": "models:/name/latest"}, "model.base=models:/name/latest names no version."),
        ({"base": "gs://b/m"}, "model.base=gs://b/m is of an unknown kind."),
        ({"base": "hf://a/b@v1", "revision": "v2"}, "both name a revision. Leave one out."),
    ],
)
def test_addresses_are_checked_with_all_other_settings(settings, problem):
    recipe = recipe_with({f"model.{key}": value for key, value in settings.items()} | {"seed": -1})
    with pytest.raises(SettingsError) as caught:
        settings_from_dict(recipe)
    problems = [line for line in str(caught.value).splitlines() if line.startswith("model.")]
    assert len(problems) == 1
    assert problem in problems[0]


def test_a_run_starts_work_only_when_its_base_has_moved_on(folder):
    """What a schedule relies on: an unchanged base leads to the run that is done, a new one to a new run."""
    publish(folder / "base", str(folder / "models" / "1"))
    publish(folder / "newer", str(folder / "models" / "2"))
    (folder / "models" / "HEAD").write_text("1\n")
    recipe = recipe_with({"model.base": "models/HEAD"})
    run, base_uri = resolve(recipe, job="monday")
    assert base_uri == (folder / "models" / "1").as_uri()
    assert run_needs_run(run=run, being_done_by="").phase
    publish(folder / "base", f"{run['store']}/runs/{run['key']}/final")
    open_store(run["store"]).write_bytes(f"runs/{run['key']}/DONE.json", b"{}")
    Run.load(run).release()
    again, _ = resolve(recipe, job="tuesday")
    assert again["key"] == run["key"]
    assert not run_needs_run(run=again, being_done_by="").phase
    (folder / "models" / "HEAD").write_text("2\n")
    moved, _ = resolve(recipe, job="wednesday")
    assert moved["key"] != run["key"]
    assert run_needs_run(run=moved, being_done_by="").phase
    assert dataclasses.asdict(Run.load(moved).settings.model)["base"] == "models/HEAD"
    note("Faults", "a scheduled run whose base is the same as before", "nothing is computed")
    note("Faults", "a scheduled run whose base has moved on", "a new run starts")


@pytest.mark.parametrize(
    ("entries", "tensor", "named"),
    [
        ({}, "rope_freqs.weight", "rope_freqs.weight"),
        ({"llama.rope.scaling.type": "yarn"}, None, "rope.scaling.type=yarn"),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 8.0}, None, "rope.scaling.factor"),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0}, None, ""),
        ({"llama.rope.scaling.factor": 0.0}, None, ""),
    ],
)
def test_a_gguf_file_whose_frequencies_would_be_lost_is_refused(
    folder, tmp_path, entries, tensor, named, monkeypatch
):
    """By its header, which is all that is read before it is dequantized."""
    path = tmp_path / "model.gguf"
    export_gguf(folder / "base", path, dtype="f16")
    read = importing.read_gguf_header

    def changed(location):
        header = read(location)
        return dataclasses.replace(
            header,
            values=header.values | entries,
            tensors=header.tensors | ({tensor: (32,)} if tensor else {}),
        )

    monkeypatch.setattr(importing, "read_gguf_header", changed)
    if named:
        assert f"scales its rotary frequencies ({named}), which cannot be read" in refused(
            lambda: take_up(str(path), tmp_path / "store")
        )
        assert not (tmp_path / "store").exists()
    else:
        take_up(str(path), tmp_path / "store")


def test_our_own_export_of_scaled_frequencies_is_not_read_as_another_model(folder, tmp_path):
    base = folder / "base"
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = LLAMA3 | {"rope_theta": 10_000.0}
    (base / "config.json").write_text(json.dumps(config))
    export_gguf(base, tmp_path / "model.gguf", dtype="f16")
    said = refused(lambda: take_up(str(tmp_path / "model.gguf"), tmp_path / "store"))
    assert "rope_freqs.weight" in said
