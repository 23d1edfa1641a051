"""Links, pipes, devices, huge files and names that steer terminals, in what comes from outside."""

import gzip
import io
import json
import lzma
import os
import shutil
import tarfile
import zipfile

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from core.bases.importing import import_base
from core.data.rows import stream_rows
from core.errors import AdaptPrunerError, CheckpointError, SettingsError
from core.export.hub_files import checkpoint_files
from core.export.padded import export_padded
from core.model.build import build_model, load_model, load_tokenizer
from core.model.checkpoint import INDEX, read_json, save_model
from core.model.config import config_with_layers, load_config
from core.model.shape import LayerShape
from core.settings.model import ModelSettings
from core.settings.texts import TextSource
from core.storage.publication import open_publication, publish
from pipelines.cli import main
from tests.support.evidence import note
from tests.support.fuzzing import bounded, outcome

SECRET = "the contents of a private file"


@pytest.fixture
def base(project, tmp_path):
    return shutil.copytree(project / "base", tmp_path / "base")


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text(SECRET)
    return path


def take_up(base, store):
    return lambda: import_base(ModelSettings(base=str(base)), str(store))


def stored(folder):
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


WANTED = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    INDEX,
    "tokenizer_extra.json",
    "LICENSE",
    "x.txt",
)


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("kind", ["pipe", "device", "link out", "dangling link"])
def test_what_is_no_file_of_the_folder_is_refused_and_never_waited_for(base, secret, tmp_path, kind, name):
    path = base / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        target = {"device": "/dev/zero", "link out": secret, "dangling link": tmp_path / "gone"}[kind]
        path.symlink_to(target)
    said = outcome(take_up(base, tmp_path / "store"))
    assert said
    assert not any(SECRET in p.read_text(errors="ignore") for p in stored(tmp_path / "store"))
    assert not stored(tmp_path / "store" / "bases")
    note("Security", f"a {kind} under the name of a checkpoint's file", "refused with one line")


@pytest.mark.parametrize("name", ["README.md", "notes.md", "run.log"])
def test_pipes_beside_a_checkpoint_are_left_alone(base, tmp_path, name):
    os.mkfifo(base / name)
    assert not outcome(take_up(base, tmp_path / "store"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "LICENSES"])
def test_folders_are_not_taken_for_files(base, tmp_path, name):
    (base / name).unlink(missing_ok=True)
    (base / name).mkdir()
    said = outcome(take_up(base, tmp_path / "store"))
    assert bool(said) == (name in ("model.safetensors", "config.json"))


def test_the_links_of_a_hugging_face_cache_are_followed(base, tmp_path):
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / ("c" * 40),
        tmp_path / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(base.iterdir()):
        path.rename(blobs / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    uri, _ = import_base(ModelSettings(base=str(snapshot)), str(tmp_path / "store"))
    assert set(open_publication(uri).manifest.paths) >= {"model.safetensors", "tokenizer.json"}
    load_tokenizer(snapshot)
    note("Security", "the links of a Hugging Face cache", "followed")
    (snapshot / "tokenizer_x.json").symlink_to("../../../secret.txt")
    (tmp_path / "secret.txt").write_text(SECRET)
    assert "is a link that leads out of its folder" in outcome(take_up(snapshot, tmp_path / "other"))


def test_links_within_the_folder_and_to_the_folder_are_followed(base, tmp_path):
    (base / "tokenizer.json").rename(base / "original")
    (base / "tokenizer.json").symlink_to("original")
    (tmp_path / "link").symlink_to(base, target_is_directory=True)
    assert not outcome(take_up(tmp_path / "link", tmp_path / "store"))


def unequal(base, folder):
    layers = [LayerShape(query_heads=6, kv_heads=3, mlp_width=width) for width in (40, 31, 7)]
    save_model(
        build_model(config_with_layers(load_config(base), layers)), folder, companions=base, provenance={}
    )
    return folder


def test_companions_that_lead_out_are_not_copied_along(base, secret, tmp_path):
    folder = unequal(base, tmp_path / "model")
    (folder / "tokenizer_x").symlink_to(secret)
    said = outcome(lambda: export_padded(folder, tmp_path / "padded"))
    assert "tokenizer_x is a link that leads out of its folder" in said
    assert not (tmp_path / "padded").exists()
    (base / "vocab_x").symlink_to(secret)
    assert "vocab_x is a link" in outcome(lambda: unequal(base, tmp_path / "again"))
    assert "vocab_x is a link" in outcome(lambda: checkpoint_files(base))
    note("Security", "a tokenizer's file that is a link to a private file, in an export or a push", "refused")


@pytest.mark.parametrize("name", ["config.json", INDEX, "generation_config.json", "adapt_pruner.json"])
def test_json_of_a_gigabyte_is_refused_unread(base, tmp_path, name):
    with (base / name).open("wb") as file:
        file.truncate(10**9)  # zeros that take no space
    read = {"config.json": load_config, INDEX: load_model}.get(name, lambda folder: read_json(folder / name))
    assert "it is larger than 10 MB" in outcome(lambda: read(base))
    assert "larger than " in outcome(take_up(base, tmp_path / "store"))
    note("Security", "settings of a gigabyte beside the weights", "refused unread")


def test_a_tokenizer_of_a_gigabyte_is_refused_unread(base):
    with (base / "tokenizer.json").open("wb") as file:
        file.truncate(10**9)
    assert "is larger than 200 MB" in outcome(lambda: load_tokenizer(base))


def test_a_pipe_in_a_store_is_not_read(base, tmp_path):
    (base / "empty.txt").touch()
    publish(base, str(tmp_path / "store"))
    (tmp_path / "store" / "empty.txt").unlink()
    os.mkfifo(tmp_path / "store" / "empty.txt")
    assert "something else found" in outcome(
        lambda: open_publication(str(tmp_path / "store")).fetch(tmp_path / "to")
    )
    note("Security", "a pipe in the place of a published file", "refused with one line")


STEERING = "\x1b]0;owned\x07\x1b[2J\u202egpj.exe\r\nerror: all is well"


def hostile_names(base, place):
    if place == "tensors":
        tensors = load_file(base / "model.safetensors")
        save_file(
            tensors | {f"model.{STEERING}": tensors["model.norm.weight"].clone()}, base / "model.safetensors"
        )
    elif place == "model type":
        (base / "config.json").write_text(json.dumps({"model_type": STEERING}))
    elif place == "config":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"hidden_act": STEERING}))
    elif place == "shard":
        names = load_file(base / "model.safetensors")
        (base / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, STEERING + ".safetensors")}))
    elif place == "template":
        config = json.loads((base / "tokenizer_config.json").read_text())
        template = "{{ raise_exception(" + json.dumps(STEERING) + ") }}"
        (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))


@pytest.mark.parametrize("place", ["tensors", "model type", "config", "shard", "template"])
def test_names_that_steer_a_terminal_are_written_out(base, place):
    hostile_names(base, place)
    done = CliRunner().invoke(main, ["generate", str(base), "hello"])
    assert done.exit_code == 1, done.output
    lines = done.stderr.splitlines()
    assert [line.startswith("error: ") for line in lines if "error" in line] == [True]
    assert lines[-1].isprintable()
    assert "\\x1b" in lines[-1] or (place == "model type" and "\\\\x1b" in lines[-1])
    note("Security", f"control characters in the names of a checkpoint ({place})", "written out in the error")


def test_errors_are_one_line_each():
    assert str(CheckpointError(f"a {STEERING} b")).isprintable()
    assert str(SettingsError(["one\ntwo", "three"])).split("\n") == ["one\\ntwo", "three"]
    assert "s3cret" not in str(AdaptPrunerError("http://me:s3cret@host is away."))


def test_what_a_model_writes_steers_no_terminal(base, capsys):
    from pipelines.commands.generate import printable_streamer

    streamer = printable_streamer(load_tokenizer(base))
    streamer.on_finalized_text("a\x1b[2Jb\nc\td\u202e", stream_end=True)
    assert capsys.readouterr().out == "a?[2Jb\nc\td?\n"
    note("Security", "control characters in what a model answers", "shown as question marks")


ROWS = "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(50)).encode()


def rows(path):
    return lambda: [row["text"] for row in stream_rows(TextSource(path=str(path)))]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_texts_are_read_unless_they_are_bombs(tmp_path, suffix, compress, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(ROWS))
    assert rows(tmp_path / f"a.jsonl{suffix}")() == [f"row {n}" for n in range(50)]
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(bytes(30_000_000)))
    said = outcome(rows(tmp_path / f"b.jsonl{suffix}"))
    assert "unpacks to more than 200 times its size" in said
    note("Security", f"a {suffix} file that unpacks to hundreds of times its size", "refused with one line")


def zipped(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../escaped.jsonl", ROWS)


def tarred(path):
    with tarfile.open(path, "w") as file:
        member = tarfile.TarInfo("../../escaped.jsonl")
        member.size = len(ROWS)
        file.addfile(member, io.BytesIO(ROWS))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)


def gzipped(path):
    path.write_bytes(gzip.compress(bytes(10**7)))


@pytest.mark.parametrize("disguise", [zipped, tarred, gzipped])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv", "a.jsonl.xz"])
def test_archives_under_another_name_are_refused(tmp_path, disguise, name):
    disguise(tmp_path / name)
    said = outcome(rows(tmp_path / name))
    assert "is compressed or archived in another way than its name says" in said
    note(
        "Security", "an archive under the name of a data file, with paths and links that lead out", "refused"
    )


def test_the_bound_of_the_tests_holds():
    with pytest.raises(MemoryError), bounded():
        bytearray(2**30)


def test_a_sound_checkpoint_passes(base, tmp_path):
    assert not outcome(take_up(base, tmp_path / "store"))
    assert not outcome(lambda: load_model(base))
    assert not outcome(lambda: load_tokenizer(base))
    assert not outcome(lambda: checkpoint_files(base))
