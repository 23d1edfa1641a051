"""Whole runs by the command line while their store, their credentials or their disk fails."""

import re
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from core.errors import StorageError, full_disk
from core.storage.interface import join_uri
from core.storage.publication import open_publication
from core.storage.store import open_store
from tests.support import faults
from tests.support.disks import fill, read_only, tiny_disk
from tests.support.evidence import note
from tests.support.faults import Striking, goes_up
from tests.support.project import command_line, recipe_with, run_all, write_recipe
from tests.support.servers import s3_proxy

CHANGES = {"prune.phases": 1, "prune.attention_unit": "kv_group"}
TIMED = {"report.json", "record.json", "report.html"}
"""Files that tell how long something took."""


@pytest.fixture
def folder(folder):
    """The tiny project with the recipe of these tests."""
    write_recipe(folder / "recipe.yaml", CHANGES)
    return folder


def run(folder, store, environment=None, output="output"):
    """Call ``adapt-pruner run`` and check what its end promises; return its exit status and error lines."""
    command, own = command_line("run", "recipe.yaml", "--output", output, "--set", f"storage.store={store}")
    done = subprocess.run(
        command, cwd=folder, env=own | (environment or {}), capture_output=True, text=True, timeout=600
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == (1 if done.returncode else 0), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert all(line.endswith(".") for line in errors)
    return done.returncode, "".join(errors), done.stderr


def final_of(store):
    (uri,) = {join_uri(store, *key.split("/")[:2], "final") for key in open_store(store).list("runs/")}
    return uri


def published(store):
    keys = (re.fullmatch("runs/[0-9a-f]+/(.+)/MANIFEST.json", key) for key in open_store(store).list("runs/"))
    return {match[1] for match in keys if match}


def content(uri, scratch):
    """Return the bytes of a publication, less what tells how long something took."""
    folder = open_publication(uri).fetch(scratch)
    paths = [path for path in open_publication(uri).manifest.paths if path not in TIMED]
    return {path: (folder / path).read_bytes() for path in paths}


@pytest.fixture
def expected(folder, tmp_path):
    """What a run publishes that nothing disturbs."""
    _, uri = run_all(recipe_with(CHANGES), tmp_path / "artifacts")
    return content(uri, tmp_path / "expected")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_goes_on_when_one_request_in_twelve_fails(
    folder, expected, tmp_path, s3_server, s3_store_uri, seed
):
    chosen = [*faults.UP.values(), *faults.DOWN.values()]

    def any_fault(request, forward):
        return chosen[len(striking.struck) % len(chosen)](request, forward)

    striking = Striking(any_fault, share=1 / 12, seed=seed)
    with s3_proxy(s3_server, striking) as proxy:
        status, _, _ = run(folder, s3_store_uri, proxy.environment())
    assert status == 0
    assert len(striking.struck) > 20
    assert content(final_of(s3_store_uri), tmp_path / "fetched") == expected
    tried = "`adapt-pruner run`, a twelfth of whose requests fail at random: resets, 500, 503, lost, cut"
    note("Faults", tried, "went on to the end; the same bits as without")


@pytest.mark.slow
def test_credentials_that_expire_stop_a_run_and_the_rerun_computes_nothing_again(
    folder, expected, tmp_path, s3_server, s3_store_uri
):
    with s3_proxy(s3_server, Striking(faults.error(400, "ExpiredToken"), after=170)) as proxy:
        status, error, _ = run(folder, s3_store_uri, proxy.environment())
    assert status == 1
    assert re.search(
        r"failed: .* have expired \(ExpiredToken\)\. Get new ones, then rerun to resume\.", error
    )
    done = published(s3_store_uri)
    assert "data" in done
    assert "final" not in done
    status, _, told = run(folder, s3_store_uri, s3_server.environment())
    assert status == 0
    assert len(re.findall(": already done|  already done|was done before", told)) == len(done)
    assert content(final_of(s3_store_uri), tmp_path / "fetched") == expected
    tried = "credentials that expire in the middle of `adapt-pruner run`"
    note("Faults", tried, "one line and status 1; the rerun computed the rest; same bits")


@pytest.mark.slow
def test_a_full_disk_for_temporary_files_stops_a_run_which_a_rerun_completes(folder, expected, tmp_path):
    store = str(tmp_path / "runs")
    with tiny_disk(tmp_path / "disk", "200k") as disk:
        status, error, _ = run(folder, store, {"TMPDIR": str(disk)})
    assert status == 1
    assert "no space left on device. Free space" in error
    done = published(store)
    assert "final" not in done
    status, _, told = run(folder, store)
    assert status == 0
    assert len(re.findall("already done|was done before", told)) == len(done)
    assert content(final_of(store), tmp_path / "fetched") == expected
    note(
        "Faults", "a full disk for temporary files under `adapt-pruner run`", "one line; a rerun completed it"
    )


def test_a_full_disk_for_the_output_is_one_line(folder, tmp_path):
    with tiny_disk(tmp_path / "disk", "8k") as disk:
        fill(disk)
        status, error, _ = run(folder, tmp_path / "runs", output=disk / "output")
    assert status in (1, 2)
    assert "no space left on device. Free space" in error.lower().replace("free", "Free")
    note("Faults", "a full disk for the output of `adapt-pruner run`", "one line; nothing was computed")


def test_a_store_that_cannot_be_written_stops_a_run_before_it_computes(
    folder, tmp_path, s3_server, s3_store_uri
):
    striking = Striking(faults.error(403, "AccessDenied"), goes_up)
    with s3_proxy(s3_server, striking) as proxy:
        status, error, _ = run(folder, s3_store_uri, proxy.environment())
    assert status == 1
    assert "error: resolve-base failed: " in error
    assert "denies access (AccessDenied). Check AWS_ACCESS_KEY_ID" in error
    assert list(open_store(s3_store_uri).list()) == []
    (tmp_path / "runs").mkdir()
    with read_only(tmp_path / "runs"):
        status, error, _ = run(folder, tmp_path / "runs")
    assert (status, error) == (
        2,
        f"error: storage.store={tmp_path}/runs cannot be written (Read-only file system). "
        "Give a folder that you may write to.",
    )
    note(
        "Faults",
        "`adapt-pruner run` with a store that cannot be written (s3, folder)",
        "one line at the start",
    )


def by_safetensors(path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(100_000)}, path)


def by_safetensors_of_numpy(path):
    import numpy
    from safetensors.numpy import save_file

    save_file({"a": numpy.zeros(100_000)}, path)


def by_copying(path):
    source = path.parents[2] / "source"
    source.write_bytes(bytes(100_000))
    shutil.copyfile(source, path)


def by_sqlite(path):
    connection = sqlite3.connect(path)
    connection.execute("create table t (x)")


def by_datasets(path):
    from datasets import Dataset

    Dataset.from_dict({"a": ["x" * 100_000]}).save_to_disk(path)


def by_tokenizers(path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"word {number}": number for number in range(10_000)})).save(str(path))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("x" * 100_000),
        by_safetensors,
        by_safetensors_of_numpy,
        by_copying,
        by_sqlite,
        by_datasets,
        by_tokenizers,
    ],
    ids=["text", "safetensors", "numpy", "copy", "sqlite", "datasets", "tokenizers"],
)
def test_whatever_library_meets_a_full_disk_it_is_one_line(tmp_path, write, request):
    with tiny_disk(tmp_path / "disk", "100k") as disk:
        fill(disk)
        with pytest.raises(Exception, match=r"full|space") as error:
            write(Path(disk, "file"))
    told = full_disk(error.value)
    assert isinstance(told, StorageError)
    assert re.search("(no space left on device|disk is full)[.] Free space there, and in ", str(told))
    assert "\n" not in str(told)
    note("Faults", f"a full disk, met by {request.node.callspec.id}", "one line: free space")


def test_other_errors_are_not_taken_for_a_full_disk():
    assert full_disk(ValueError("no such thing")) is None
    assert full_disk(PermissionError(13, "Permission denied", "file")) is None
    assert full_disk(StorageError("x cannot be written: no space left on device. Free space.")) is None
