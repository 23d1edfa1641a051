"""The commands that look into a store: ``adapt-pruner runs`` and ``adapt-pruner clean``."""

import contextlib
import json
import os
import pty
import subprocess
import time

import pytest
from click.testing import CliRunner

from core.runs.overview import list_runs
from core.storage.owner import Owner
from core.storage.store import open_store
from pipelines.cli import main
from tests.support.evidence import note
from tests.support.project import command_line, recipe_with, run_all
from tests.support.runs import make_run, put, snapshot

TABLE = "Leases and cleaning"


def call(*arguments, status=0):
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == status, result.output
    return result


def table(store):
    """The command's table: a list of cells a run, by its key."""
    lines = call("runs", store.uri).stdout.splitlines()
    head = lines[0]
    starts = [head.index(name) for name in HEAD]
    rows = [
        [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines[1:]
    ]
    return {row[0]: dict(zip(HEAD, row, strict=True)) for row in rows}


HEAD = ("run", "name", "base", "target", "state", "phase", "last step")


def test_the_table_tells_of_every_run_how_far_it_came_and_who_works_on_it(store):
    make_run(store, "000000000001", done=True)
    make_run(store, "000000000002", phases=20, until=(3, "scored"), job="worker")
    make_run(store, "000000000003", phases=20, until=(12, "recovered"), job="dead", ttl_s=0)
    make_run(store, "000000000004", until=None)
    rows = table(store)
    told = {key: (row["state"], row["phase"], row["last step"].split("  ")[0]) for key, row in rows.items()}
    assert told == {
        "000000000001": ("done", "2 of 2", "publish"),
        "000000000002": (f"running: {Owner.of('worker')}", "3 of 20", "score-layers"),
        "000000000003": ("interrupted", "12 of 20", "recover-train"),
        "000000000004": ("interrupted", "0 of 2", "prepare-data"),
    }
    for row in rows.values():
        assert (row["name"], row["base"], row["target"]) == ("trial", "user/base", "75%")
    note(TABLE, "adapt-pruner runs on a store of done, running and interrupted runs", "told apart")


def test_json_is_for_machines(store):
    run = make_run(store, "000000000001", until=(1, "pruned"), job="worker")
    (told,) = json.loads(call("runs", store.uri, "--json").stdout)
    active_s = told.pop("active_s")
    assert abs(active_s - time.time()) < 600
    assert told == {
        "key": "000000000001",
        "state": "running",
        "owner": str(Owner.of("worker")),
        "name": "trial",
        "base": "user/base",
        "target": "75%",
        "phase": 1,
        "phases": 2,
        "last_step": "prune-step",
        "size": sum(len(content) for key, content in snapshot(store).items() if key.startswith(run)),
    }


@pytest.mark.slow
def test_a_real_run_is_shown_as_it_is(project, tmp_path):
    changes = {"storage.store": str(tmp_path / "store"), "training.tokens": "0", "training.sources": []}
    with contextlib.chdir(project):
        handle, _ = run_all(recipe_with(changes), tmp_path)
    (run,) = list_runs(open_store(handle["store"]))
    assert (run.key, run.state, run.phase, run.phases, run.last_step) == (
        handle["key"],
        "done",
        2,
        2,
        "publish",
    )
    assert (run.name, run.base, run.target, run.owner) == ("trial", "base", "75%", "")


def test_an_empty_store_is_said_to_be_empty(store, tmp_path):
    (tmp_path / "store").mkdir()
    assert call("runs", store.uri).stdout == f"{store.uri} contains no runs.\n"
    assert json.loads(call("runs", store.uri, "--json").stdout) == []
    assert call("clean", store.uri).stdout == "Nothing to remove.\n"


@pytest.mark.parametrize("command", ["runs", "clean"])
def test_a_folder_that_is_not_there_is_refused(tmp_path, command):
    error = call(command, str(tmp_path / "missing"), status=2).stderr
    assert error.startswith("error: STORE=")
    assert "is not a folder" in error


@pytest.mark.parametrize("command", ["runs", "clean"])
def test_a_bucket_that_is_not_there_is_one_error_line(s3_store_uri, command):
    error = call(command, "s3://no-such-bucket/x", status=1).stderr
    assert error.startswith("error: ")
    assert "no bucket" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b"\xff", b'{"settings": {"name": "x"}}', b"[" * 100_000],
    ids=range(7),
)
def test_a_damaged_run_is_shown_as_damaged(store, content):
    make_run(store, "000000000001", until=(1, "pruned"))
    make_run(store, "000000000002", done=True)
    store.write_bytes("runs/000000000001/run.json", content)
    store.write_bytes("runs/000000000002/_lease/0001.json", content)
    store.write_bytes("runs/notes.txt", b"mine")
    store.write_bytes("runs/mine/notes.txt", b"mine")
    rows = table(store)
    assert {key: row["state"] for key, row in rows.items()} == {
        "000000000001": "damaged",
        "000000000002": "done",
    }
    assert rows["000000000001"]["last step"].startswith("prune-step")
    note(TABLE, "adapt-pruner runs where a run.json is damaged", "shown as damaged, the others as they are")


def test_nothing_in_a_store_steers_the_terminal(store):
    run = make_run(store, "000000000001")
    told = json.loads(store.read_bytes(f"{run}/run.json"))
    told["settings"]["name"] = "[red]a\x1b[31mb\nc[/red]"
    store.write_bytes(f"{run}/run.json", json.dumps(told).encode())
    assert table(store)["000000000001"]["name"] == "[red]a?[31mb?c[/red]"


def leave_garbage(store):
    make_run(store, "000000000001", done=True)
    make_run(store, "000000000002", job="worker")
    store.write_bytes("runs/000000000001/final/0a1b2c3d4e5f6071/model.safetensors", bytes(3_000_000))
    store.write_bytes("runs/000000000001/phases/01/recovered/_resume/00000120/a", bytes(1000))
    store.write_bytes("runs/000000000001/phases/01/recovered/_resume/00000120/b", bytes(1000))
    store.write_bytes("runs/000000000002/final/half", b"1")
    store.write_bytes("notes.txt", b"mine")
    return {key for key in store.list() if "0a1b2c3d4e5f6071" in key or "_resume" in key}


def check_list(shown):
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "runs/000000000001/final not listed by the manifest beside it 1 3.0 MB" in rows
    place = "runs/000000000001/phases/01/recovered"
    assert f"{place} a training state of a phase that is published 2 2.0 kB" in rows
    assert f"left alone: runs/000000000002, since {Owner.of('worker')} works on it" in rows
    assert "left alone: notes.txt, which does not belong to a run" in rows
    assert "To remove: 3 files, 3.0 MB." in rows


def test_clean_lists_and_refuses_to_ask_where_nobody_can_answer(store):
    leave_garbage(store)
    before = snapshot(store)
    result = call("clean", store.uri, status=2)
    check_list(result.stdout)
    assert result.stderr == "error: clean asks for confirmation, but stdin is not a terminal. Give --yes.\n"
    assert snapshot(store) == before
    note(TABLE, "adapt-pruner clean without a terminal and without --yes", "exit 2, nothing changed")


def test_clean_removes_when_told_so_beforehand(store):
    garbage = leave_garbage(store)
    before = snapshot(store)
    shown = call("clean", store.uri, "--yes").stdout
    check_list(shown)
    assert shown.endswith("Removed 3 files, 3.0 MB.\n")
    assert snapshot(store) == {key: content for key, content in before.items() if key not in garbage}
    assert "Nothing to remove." in call("clean", store.uri, "--yes").stdout
    note(TABLE, "adapt-pruner clean --yes", "removes what it has listed and nothing else")


def on_a_terminal(answer, *arguments):
    """Run the command with a pseudo-terminal as its standard input."""
    ours, theirs = pty.openpty()
    line, environment = command_line(*arguments)
    environment |= {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    try:
        os.write(ours, answer)
        return subprocess.run(
            line, stdin=theirs, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(("answer", "status"), [(b"n\n", 0), (b"\n", 0), (b"\x04", 1)])
def test_any_answer_but_yes_changes_nothing(store, answer, status):
    leave_garbage(store)
    before = snapshot(store)
    done = on_a_terminal(answer, "clean", store.uri)
    check_list(done.stdout)
    assert "Remove them?" in done.stdout
    assert done.returncode == status
    assert snapshot(store) == before
    note(TABLE, "adapt-pruner clean, answered no", "nothing changed")


def test_the_answer_yes_removes(store):
    garbage = leave_garbage(store)
    done = on_a_terminal(b"y\n", "clean", store.uri)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("Removed 3 files, 3.0 MB.\n")
    assert not garbage & set(store.list())


def test_a_base_model_that_is_half_taken_up_is_said_to_be_left(store):
    put(store, "bases/0123456789abcdef", model_safetensors=b"1")
    store.write_bytes("bases/fedcba9876543210/model.safetensors", b"1")
    before = snapshot(store)
    left, nothing = call("clean", store.uri, "--yes").stdout.splitlines()
    assert left == "left alone: bases/fedcba9876543210, since it was written to less than a day ago"
    assert nothing == "Nothing to remove."
    assert snapshot(store) == before
