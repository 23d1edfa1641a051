"""Training that is killed and started again, with its states in a folder and on a real S3 server."""

import contextlib
import functools
import logging
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from core.quantities import Interval, parse_interval
from core.storage.interface import join_uri
from core.storage.publication import open_publication, publish
from core.storage.store import open_store
from core.training import pace, resume, state
from core.training.recover import recover
from core.training.resume import SavedStates, remove_states
from core.training.rows import Rows
from tests.support.evidence import note
from tests.support.models import UNEQUAL, random_tokens, tiny
from tests.support.publications import behind
from tests.support.servers import Reply, s3_proxy
from tests.support.training import training_settings, weights

TABLE = "Resumed training"
STEPS, FIRST_STEP = 6, 10
BELONGS_TO = {"checkpoint": "c", "data": "d", "settings": "s"}
ALWAYS, NEVER = Interval(steps=1), Interval()


class StoppedError(Exception):
    pass


@pytest.fixture
def uri(store_uri):
    return join_uri(store_uri, "runs/k/phases/01/recovered/_resume")


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, "core")
    return caplog


def model_of(seed=0):
    return tiny("llama", UNEQUAL, dtype=torch.float32, seed=seed)


def attempt(uri, folder, *, every=ALWAYS, stop=None, seed=0, settled=False, at_step=lambda step: None):
    """Train as a task does and return the losses and the weights.

    ``at_step`` is called after each step, before its state is saved; with ``settled``, when what was saved
    before is up. ``stop`` ends the attempt after that step.
    """
    tokens, model = random_tokens(rows=4 * STEPS), model_of(seed)
    with SavedStates(uri, folder, every=every, belongs_to=BELONGS_TO) as states:
        state = states.newest(model, first_step=FIRST_STEP)

        def save(optimizer, progress):
            if settled:
                states._publisher.submit(int).result()
            at_step(len(progress.losses))
            states.save(model, optimizer, progress)
            if len(progress.losses) == stop:
                raise StoppedError

        torch.manual_seed(3)
        report = recover(
            model,
            Rows(tokens, torch.ones_like(tokens)),
            training_settings(),
            first_step=FIRST_STEP,
            total_steps=30,
            resume_from=state,
            save=save,
        )
    return report.losses, weights(model)


def stopped_attempt(uri, folder, stop, **options):
    """Train until the step ``stop``, two steps after the start, and save the state there."""
    with pytest.raises(StoppedError):
        attempt(uri, folder, stop=stop, every=Interval(steps=2), **options)


def states_at(uri):
    return sorted({key.partition("/")[0] for key in open_store(uri).list()})


def write_two_states(uri, folder):
    """Leave the states of steps 12 and 14, as a task does that is killed before it removes the older one."""
    stopped_attempt(uri, folder / "one", 2)
    saved = open_publication(join_uri(uri, "000012")).fetch(folder / "saved")
    kept = {
        entry.path: (saved / entry.path).read_bytes()
        for entry in open_publication(join_uri(uri, "000012")).manifest.files
    }
    stopped_attempt(uri, folder / "two", 4)
    assert states_at(uri) == ["000014"]
    (folder / "again").mkdir()
    for name, content in kept.items():
        (folder / "again" / name).write_bytes(content)
    publish(folder / "again", join_uri(uri, "000012"))


def assert_undisturbed(result, folder):
    losses, weights = attempt(str(folder / "undisturbed"), folder / "unused", every=NEVER)
    assert result[0] == losses
    assert torch.equal(result[1], weights)


def test_the_next_attempt_resumes_from_the_newest_state_and_one_is_kept(uri, tmp_path, log):
    stopped_attempt(uri, tmp_path / "work", 2)
    assert states_at(uri) == ["000012"]
    stopped_attempt(uri, tmp_path / "work", 4, seed=1)
    assert "resumed at step 12 of 30" in log.text
    assert states_at(uri) == ["000014"]
    result = attempt(uri, tmp_path / "work", seed=2)
    assert "resumed at step 14 of 30" in log.text
    assert "saved the training state of step 14 (0." in log.text
    assert_undisturbed(result, tmp_path)
    assert not (tmp_path / "work").exists()


def overwrite(name, content):
    def damage(uri):
        store, at = open_store(uri), f"000014/{name}"
        store.write_bytes(at, content(store.read_bytes(at)))

    return damage


DAMAGES = {
    "a bit of it is flipped": overwrite(
        "state-00001.safetensors", lambda x: x[:-9] + bytes([x[-9] ^ 1]) + x[-8:]
    ),
    "its tensors are cut short": overwrite("state-00001.safetensors", lambda x: x[:-1]),
    "its state.json is changed": overwrite("state.json", lambda x: x.replace(b'"format": 1', b'"format": 2')),
    "its manifest is not JSON": overwrite("MANIFEST.json", lambda x: x[: len(x) // 2]),
    "its tensors are gone": lambda uri: open_store(uri).delete("000014/state-00001.safetensors"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_state_is_logged_and_the_one_before_is_used(what, uri, tmp_path, log):
    write_two_states(uri, tmp_path)
    DAMAGES[what](uri)
    log.clear()
    stopped_attempt(uri, tmp_path / "work", 4, seed=5)
    assert "the training state of step 14 is removed, not used: " in log.text
    assert "resumed at step 12 of 30" in log.text
    assert states_at(uri) == ["000014"]  # a sound one, under the name of the damaged one
    assert_undisturbed(attempt(uri, tmp_path / "work", seed=6), tmp_path)
    assert "resumed at step 14 of 30" in log.text
    happened = "told, and removed; resumed from the state before; curve and weights equal to the last bit"
    note(TABLE, f"the newest state is damaged: {what}", happened)


def test_a_state_whose_publishing_was_cut_off_is_none(uri, tmp_path, log):
    write_two_states(uri, tmp_path)
    open_store(uri).delete("000014/MANIFEST.json")
    assert_undisturbed(attempt(uri, tmp_path / "work", seed=5), tmp_path)
    assert "resumed at step 12 of 30" in log.text
    assert "not used" not in log.text
    note(TABLE, "the newest state lacks its manifest", "resumed from the state before; equal to the last bit")


def test_all_states_damaged_is_a_start_from_the_beginning(uri, tmp_path, log):
    write_two_states(uri, tmp_path)
    for step in (12, 14):
        open_store(uri).write_bytes(f"{step:06d}/state.json", b"{}")
    log.clear()
    assert_undisturbed(attempt(uri, tmp_path / "work"), tmp_path)
    assert log.text.count("is removed, not used") == 2
    assert "resumed" not in log.text
    note(TABLE, "all states are damaged", "told, and removed; trained from the start; equal to the last bit")


@pytest.mark.parametrize("changed", [*BELONGS_TO, "first step", "name", "model"])
def test_a_state_of_another_training_is_logged_and_not_used(changed, uri, tmp_path, log):
    stopped_attempt(uri, tmp_path / "work", 2)
    belongs_to = BELONGS_TO | ({changed: "other"} if changed in BELONGS_TO else {})
    first_step = FIRST_STEP - (changed == "first step")
    if changed == "name":
        saved = open_publication(join_uri(uri, "000012")).fetch(tmp_path / "saved")
        publish(saved, join_uri(uri, "000013"))
        open_publication(join_uri(uri, "000012")).delete()
    model = tiny("llama", UNEQUAL[::-1], dtype=torch.float32) if changed == "model" else model_of()
    before = model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    with SavedStates(uri, tmp_path / "work", every=NEVER, belongs_to=belongs_to) as states:
        assert states.newest(model, first_step=first_step) is None
    assert "not used" in log.text
    assert torch.equal(model.state_dict()["model.layers.0.mlp.up_proj.weight"], before)
    assert states_at(uri) == []
    note(
        TABLE,
        f"a state of another training: another {changed}",
        "told, and removed; not a tensor of it is used",
    )


def test_a_setting_of_zero_saves_nothing(uri, tmp_path, log):
    attempt(uri, tmp_path / "work", every=parse_interval("0"))
    assert states_at(uri) == []
    assert "saved" not in log.text
    assert not (tmp_path / "work").exists()


def test_states_are_saved_by_the_clock(tmp_path):
    often, seldom = str(tmp_path / "often"), str(tmp_path / "seldom")
    attempt(often, tmp_path / "work", every=Interval(seconds=1e-6), settled=True)
    attempt(seldom, tmp_path / "work", every=Interval(seconds=3600))
    assert states_at(often) == ["000015"]  # the last step's would be of no use: the checkpoint follows
    assert states_at(seldom) == []


def test_the_interval_counts_from_the_state_that_was_resumed_from(tmp_path, log):
    uri = str(tmp_path / "store")
    stopped_attempt(uri, tmp_path / "work", 2)
    attempt(uri, tmp_path / "work", every=Interval(steps=3), settled=True)
    assert states_at(uri) == ["000015"]
    assert "step 13" not in log.text


@contextlib.contextmanager
def folder_that_goes_down(tmp_path, request):
    """A folder in whose place there is a file for a while."""
    store = tmp_path / "store"
    yield str(store), lambda now: store.touch() if now else store.unlink()


@contextlib.contextmanager
def server_that_goes_down(tmp_path, request):
    """A real S3 server behind a proxy that answers 503 for a while."""
    uri, patch = request.getfixturevalue("s3_store_uri"), request.getfixturevalue("monkeypatch")
    is_down = threading.Event()
    broken = lambda request, forward: Reply(status=503) if is_down.is_set() else forward()  # noqa: E731
    with s3_proxy(request.getfixturevalue("s3_server"), broken) as proxy:
        for name, value in (proxy.environment() | {"AWS_MAX_ATTEMPTS": "1"}).items():
            patch.setenv(name, value)
        yield uri, lambda now: is_down.set() if now else is_down.clear()


@pytest.mark.parametrize("place", [folder_that_goes_down, server_that_goes_down])
def test_training_continues_while_the_store_is_down_and_saves_when_it_is_back(place, request, tmp_path, log):
    counts = []
    with place(tmp_path, request) as (uri, down):

        def at_step(step):
            counts.append(log.text.count("is not saved"))
            if step in (1, 4):
                down(step == 1)

        result = attempt(uri, tmp_path / "work", settled=True, at_step=at_step)
        assert counts == [0, 1, 2, 3, 3]
        assert states_at(uri) == ["000015"]
    assert "Training continues" in log.text
    assert_undisturbed(result, tmp_path)
    note(
        TABLE,
        f"the store ({'folder' if place is folder_that_goes_down else 'S3'}) is down at three saves",
        f"told {counts[-1]} times; training goes on; saved when it is back; equal to the last bit",
    )


def test_training_does_not_wait_for_a_slow_store(s3_server, s3_store_uri, tmp_path, log, monkeypatch):
    release, puts = threading.Event(), []

    def slow(request, forward):
        if request.method == "PUT" and not release.is_set():
            puts.append(request.path)
            if not release.wait(20):
                return Reply(status=403)
        return forward()

    def at_step(step):
        if step == STEPS - 1:
            assert "saved the training state" not in log.text
            release.set()

    with behind(s3_server, slow, monkeypatch):
        attempt(s3_store_uri, tmp_path / "work", at_step=at_step)
        assert all("/000011/" in path for path in puts)
        # One at a time. The end of training waits for it, and for the next if that has begun.
        assert set(states_at(s3_store_uri)) <= {"000011", "000015"}
        assert "saved the training state of step 11" in log.text
    note(TABLE, "the store takes no bytes for four steps", "training goes on; the state is saved afterwards")


def test_a_full_disk_does_not_end_the_training(tmp_path, log):
    (tmp_path / "work").touch()  # nothing can be written below a file
    result = attempt(str(tmp_path / "store"), tmp_path / "work" / "states", settled=True)
    assert log.text.count("is not saved") == STEPS - 1
    assert states_at(str(tmp_path / "store")) == []
    assert_undisturbed(result, tmp_path)


def test_an_upload_that_fails_half_way_leaves_the_state_before(
    s3_server, s3_store_uri, tmp_path, log, monkeypatch
):
    def without_manifests(request, forward):
        refused = request.method == "PUT" and request.path.endswith("MANIFEST.json")
        return Reply(status=403) if refused else forward()

    stopped_attempt(s3_store_uri, tmp_path / "work", 2)
    with behind(s3_server, without_manifests, monkeypatch):
        result = attempt(s3_store_uri, tmp_path / "work", settled=True)
    assert log.text.count("denies access") == log.text.count("is not saved") == 3
    assert states_at(s3_store_uri) == ["000012"]
    assert_undisturbed(result, tmp_path)
    note(
        TABLE, "the store takes a state but not its manifest", "told; no half is left, the state before stays"
    )


def test_all_that_is_left_of_states_is_removed(uri, tmp_path):
    write_two_states(uri, tmp_path)
    store = open_store(uri)
    store.delete("000014/MANIFEST.json")  # half-published
    store.write_bytes("other", b"x")
    open_store(uri.removesuffix("/_resume")).write_bytes("MANIFEST.json", b"{}")
    if (folder := store.local_path("")) is not None:
        (folder / "000014" / ".state-00001.safetensors.0123abcd.part").write_bytes(b"half")
    remove_states(uri)
    assert states_at(uri) == []
    assert folder is None or not folder.exists()
    assert list(open_store(uri.removesuffix("/_resume")).list()) == ["MANIFEST.json"]
    remove_states(uri)  # again is no error


def test_of_a_state_that_is_removed_the_manifest_goes_first(s3_server, s3_store_uri, tmp_path, monkeypatch):
    stopped_attempt(s3_store_uri, tmp_path / "work", 2)
    deleted = []

    def watch(request, forward):
        if request.method == "DELETE":
            deleted.append(request.path.rpartition("/")[2])
        return forward()

    with behind(s3_server, watch, monkeypatch):
        remove_states(s3_store_uri)
    assert deleted[0] == "MANIFEST.json", "a kill half-way would leave one that promises what is gone"
    assert len(deleted) > 1


def test_states_that_cannot_be_removed_are_logged(s3_server, s3_store_uri, tmp_path, log, monkeypatch):
    stopped_attempt(s3_store_uri, tmp_path / "work", 2)
    refused = lambda request, forward: Reply(status=403) if request.method == "DELETE" else forward()  # noqa: E731
    with behind(s3_server, refused, monkeypatch):
        remove_states(s3_store_uri)
    assert "training states that are no longer needed could not be removed: " in log.text
    assert states_at(s3_store_uri) == ["000012"]


@pytest.mark.parametrize("room", [2**40, 0], ids=["copied", "written first"])
def test_a_state_is_that_of_its_step_however_late_it_is_written(room, tmp_path, monkeypatch, log):
    uri, release, written_by = str(tmp_path / "store"), threading.Event(), []
    monkeypatch.setattr(resume, "spare_bytes", lambda: room)

    def late(tensors, path):
        written_by.append(threading.current_thread().name)
        if threading.current_thread() is not threading.main_thread():
            assert release.wait(60)
        return save_file(tensors, path)

    monkeypatch.setattr(state, "save_file", late)

    def at_step(step):
        if step == 5:  # the weights of step 3 have changed twice
            release.set()

    with pytest.raises(StoppedError):
        attempt(uri, tmp_path / "one", every=Interval(steps=3), stop=5, at_step=at_step)
    assert {name == "MainThread" for name in written_by} == {not room}
    assert states_at(uri) == ["000013"]
    assert_undisturbed(attempt(uri, tmp_path / "two", seed=3), tmp_path)


def test_auto_measures_what_it_costs_and_saves_by_that(tmp_path, log, monkeypatch):
    monkeypatch.setattr(resume, "Pace", functools.partial(pace.Pace, least_s=1e-3))
    uri = str(tmp_path / "store")
    with pytest.raises(StoppedError):
        attempt(uri, tmp_path / "one", every=None, stop=4, settled=True, at_step=lambda _: time.sleep(0.2))
    assert log.text.count("training stood still for 0.") == log.text.count("saved the training state") > 0
    assert log.text.count("saving costs 0.") == 1
    assert_undisturbed(attempt(uri, tmp_path / "two", seed=3), tmp_path)
