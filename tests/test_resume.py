"""Training that is killed and started again, with its states in a folder and on a real S3 server."""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from core.config import TextSource, TrainingSettings
from core.model.build import load_model
from core.quantities import Interval, parse_interval
from core.run import Run
from core.steps import (
    run_calibrate,
    run_prepare_data,
    run_prune_step,
    run_publish,
    run_recover_train,
    run_score_layers,
)
from core.steps.once import digest_of, read_published
from core.storage.manifest import delete_publication, fetch, publish, read_manifest
from core.storage.store import join_uri, open_store
from core.training.recover import recover
from core.training.resume import SavedStates, remove_states
from tests.evidence import note
from tests.models import UNEQUAL, random_tokens, tiny
from tests.project import Artifact, recipe_with, resolve
from tests.servers import Reply, s3_proxy

TABLE = "Resumed training"
STEPS, FIRST_STEP = 6, 10
BELONGS_TO = {"checkpoint": "c", "data": "d", "settings": "s"}
SETTINGS = TrainingSettings(
    tokens="1k",
    sources=(TextSource(path="x"),),
    sequence_length=12,
    global_batch=4,
    micro_batch=4,
    learning_rate=1e-2,
    min_learning_rate=1e-3,
    precision="float32",
)
ALWAYS, NEVER = Interval(steps=1), Interval()


class StoppedError(Exception):
    pass


@pytest.fixture(params=["folder", "s3"])
def uri(request, tmp_path):
    base = str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_store_uri")
    return join_uri(base, "runs/k/phases/01/recovered/_resume")


@pytest.fixture(autouse=True)
def told(caplog):
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
            states.save(model, optimizer, progress, facts={})
            if len(progress.losses) == stop:
                raise StoppedError

        torch.manual_seed(3)
        report = recover(
            model,
            tokens,
            torch.ones_like(tokens),
            SETTINGS,
            first_step=FIRST_STEP,
            total_steps=30,
            resume_from=state,
            save=save,
        )
    return report.losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def stopped_attempt(uri, folder, stop, **options):
    """Train until the step ``stop``, two steps after the start, and save the state there."""
    with pytest.raises(StoppedError):
        attempt(uri, folder, stop=stop, every=Interval(steps=2), **options)


def states_at(uri):
    return sorted({key.partition("/")[0] for key in open_store(uri).list()})


def write_two_states(uri, folder):
    """Leave the states of steps 12 and 14, as a task does that is killed before it removes the older one."""
    stopped_attempt(uri, folder / "one", 2)
    saved = fetch(join_uri(uri, "000012"), folder / "saved")
    kept = {
        entry.path: (saved / entry.path).read_bytes()
        for entry in read_manifest(join_uri(uri, "000012")).files
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


def test_the_next_attempt_goes_on_from_the_newest_state_and_one_is_kept(uri, tmp_path, told):
    stopped_attempt(uri, tmp_path / "work", 2)
    assert states_at(uri) == ["000012"]
    stopped_attempt(uri, tmp_path / "work", 4, seed=1)
    assert "resumed at step 12 of 30" in told.text
    assert states_at(uri) == ["000014"]
    result = attempt(uri, tmp_path / "work", seed=2)
    assert "resumed at step 14 of 30" in told.text
    assert "saved the training state of step 14 (0." in told.text
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
    "its manifest is no JSON": overwrite("MANIFEST.json", lambda x: x[: len(x) // 2]),
    "its tensors are gone": lambda uri: open_store(uri).delete("000014/state-00001.safetensors"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_state_is_told_and_the_one_before_is_used(what, uri, tmp_path, told):
    write_two_states(uri, tmp_path)
    DAMAGES[what](uri)
    told.clear()
    stopped_attempt(uri, tmp_path / "work", 4, seed=5)
    assert "the training state of step 14 is removed, not used: " in told.text
    assert "resumed at step 12 of 30" in told.text
    assert states_at(uri) == ["000014"]  # a sound one, under the name of the damaged one
    assert_undisturbed(attempt(uri, tmp_path / "work", seed=6), tmp_path)
    assert "resumed at step 14 of 30" in told.text
    happened = "told, and removed; resumed from the state before; curve and weights equal to the last bit"
    note(TABLE, f"the newest state is damaged: {what}", happened)


def test_a_state_whose_publishing_was_cut_off_is_none(uri, tmp_path, told):
    write_two_states(uri, tmp_path)
    open_store(uri).delete("000014/MANIFEST.json")
    assert_undisturbed(attempt(uri, tmp_path / "work", seed=5), tmp_path)
    assert "resumed at step 12 of 30" in told.text
    assert "not used" not in told.text
    note(TABLE, "the newest state lacks its manifest", "resumed from the state before; equal to the last bit")


def test_all_states_damaged_is_a_start_from_the_beginning(uri, tmp_path, told):
    write_two_states(uri, tmp_path)
    for step in (12, 14):
        open_store(uri).write_bytes(f"{step:06d}/state.json", b"{}")
    told.clear()
    assert_undisturbed(attempt(uri, tmp_path / "work"), tmp_path)
    assert told.text.count("is removed, not used") == 2
    assert "resumed" not in told.text
    note(TABLE, "all states are damaged", "told, and removed; trained from the start; equal to the last bit")


@pytest.mark.parametrize("changed", [*BELONGS_TO, "first step", "name", "model"])
def test_a_state_of_another_training_is_told_and_not_used(changed, uri, tmp_path, told):
    stopped_attempt(uri, tmp_path / "work", 2)
    belongs_to = BELONGS_TO | ({changed: "other"} if changed in BELONGS_TO else {})
    first_step = FIRST_STEP - (changed == "first step")
    if changed == "name":
        saved = fetch(join_uri(uri, "000012"), tmp_path / "saved")
        publish(saved, join_uri(uri, "000013"))
        delete_publication(join_uri(uri, "000012"), keep_manifest=False)
    model = tiny("llama", UNEQUAL[::-1], dtype=torch.float32) if changed == "model" else model_of()
    before = model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    with SavedStates(uri, tmp_path / "work", every=NEVER, belongs_to=belongs_to) as states:
        assert states.newest(model, first_step=first_step) is None
    assert "not used" in told.text
    assert torch.equal(model.state_dict()["model.layers.0.mlp.up_proj.weight"], before)
    assert states_at(uri) == []
    note(
        TABLE,
        f"a state of another training: another {changed}",
        "told, and removed; not a tensor of it is used",
    )


def test_a_setting_of_zero_saves_nothing(uri, tmp_path, told):
    attempt(uri, tmp_path / "work", every=parse_interval("0"))
    assert states_at(uri) == []
    assert "saved" not in told.text
    assert not (tmp_path / "work").exists()


def test_states_are_saved_by_the_clock(tmp_path):
    often, seldom = str(tmp_path / "often"), str(tmp_path / "seldom")
    attempt(often, tmp_path / "work", every=Interval(seconds=1e-6), settled=True)
    attempt(seldom, tmp_path / "work", every=Interval(seconds=3600))
    assert states_at(often) == ["000015"]  # the last step's would be of no use: the checkpoint follows
    assert states_at(seldom) == []


def test_the_interval_counts_from_the_state_that_was_resumed_from(tmp_path, told):
    uri = str(tmp_path / "store")
    stopped_attempt(uri, tmp_path / "work", 2)
    attempt(uri, tmp_path / "work", every=Interval(steps=3), settled=True)
    assert states_at(uri) == ["000015"]
    assert "step 13" not in told.text


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
def test_training_goes_on_while_the_store_is_down_and_saves_when_it_is_back(place, request, tmp_path, told):
    counts = []
    with place(tmp_path, request) as (uri, down):

        def at_step(step):
            counts.append(told.text.count("is not saved"))
            if step in (1, 4):
                down(step == 1)

        result = attempt(uri, tmp_path / "work", settled=True, at_step=at_step)
        assert counts == [0, 1, 2, 3, 3]
        assert states_at(uri) == ["000015"]
    assert "Training goes on" in told.text
    assert_undisturbed(result, tmp_path)
    note(
        TABLE,
        f"the store ({'folder' if place is folder_that_goes_down else 'S3'}) is down at three saves",
        f"told {counts[-1]} times; training goes on; saved when it is back; equal to the last bit",
    )


def test_training_does_not_wait_for_a_slow_store(s3_server, s3_store_uri, tmp_path, told, monkeypatch):
    release, puts = threading.Event(), []

    def slow(request, forward):
        if request.method == "PUT" and not release.is_set():
            puts.append(request.path)
            if not release.wait(20):
                return Reply(status=403)
        return forward()

    def at_step(step):
        if step == STEPS - 1:
            assert "saved the training state" not in told.text
            release.set()

    with s3_proxy(s3_server, slow) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        attempt(s3_store_uri, tmp_path / "work", at_step=at_step)
        assert all("/000011/" in path for path in puts)
        # One at a time. The end of training waits for it, and for the next if that has begun.
        assert set(states_at(s3_store_uri)) <= {"000011", "000015"}
        assert "saved the training state of step 11" in told.text
    note(TABLE, "the store takes no bytes for four steps", "training goes on; the state is saved afterwards")


def test_a_full_disk_does_not_end_the_training(tmp_path, told):
    (tmp_path / "work").touch()  # nothing can be written below a file
    result = attempt(str(tmp_path / "store"), tmp_path / "work" / "states")
    assert told.text.count("is not saved") == STEPS - 1
    assert states_at(str(tmp_path / "store")) == []
    assert_undisturbed(result, tmp_path)


def test_an_upload_that_fails_half_way_leaves_the_state_before(
    s3_server, s3_store_uri, tmp_path, told, monkeypatch
):
    def without_manifests(request, forward):
        refused = request.method == "PUT" and request.path.endswith("MANIFEST.json")
        return Reply(status=403) if refused else forward()

    stopped_attempt(s3_store_uri, tmp_path / "work", 2)
    with s3_proxy(s3_server, without_manifests) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        result = attempt(s3_store_uri, tmp_path / "work", settled=True)
    assert told.text.count("denies access") == told.text.count("is not saved") == 3
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


def test_states_that_cannot_be_removed_are_told(s3_server, s3_store_uri, tmp_path, told, monkeypatch):
    stopped_attempt(s3_store_uri, tmp_path / "work", 2)
    refused = lambda request, forward: Reply(status=403) if request.method == "DELETE" else forward()  # noqa: E731
    with s3_proxy(s3_server, refused) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        remove_states(s3_store_uri)
    assert "training states that are no longer needed stay: " in told.text
    assert states_at(s3_store_uri) == ["000012"]


# --- real kills of the real step


def recover_train(job, die=None):
    """Run recover-train in a process of its own; ``die`` is when it kills itself with SIGKILL.

    Args:
        job: Its arguments, the variables of its environment, and the file of its log.
        die: ``("saved", n)``: as soon as the n-th state is published, in the midst of whatever step training
            is at by then. ``("forward", n)``: at the n-th forward pass, in the midst of whatever publishing
            is at by then. ``("done", 1)``: when the checkpoint is published, before states are removed.
    """
    import torch

    torch.set_num_threads(1)
    os.environ.update(job["environment"])
    event, count = die or ("", 0)
    left = threading.Semaphore(max(count - 1, 0))
    forwards = []

    def happened(what):
        if what == event and not left.acquire(blocking=False):
            os.kill(os.getpid(), signal.SIGKILL)

    class Watch(logging.FileHandler):
        def emit(self, record):
            super().emit(record)
            if record.getMessage().startswith("saved the training state"):
                happened("saved")
            if record.getMessage().startswith(f"published {job['uri']}:"):
                happened("done")

    def at_forward(module, _):
        if type(module).__name__ == "LlamaForCausalLM" and module.training:
            forwards.append(1)
            happened("forward")
            if event == "saved" and len(forwards) > FORWARDS // 2:
                time.sleep(60)  # a machine that is busy may need its time to publish so often

    torch.nn.modules.module.register_module_forward_pre_hook(at_forward)
    logging.getLogger("core").addHandler(Watch(job["log"]))
    logging.getLogger("core").setLevel(logging.INFO)
    run_recover_train(**job["given"], phase=1, model=Artifact(Path(job["log"]).with_suffix(".model")))


TRAINING_STEPS = 20
FORWARDS = 2 * TRAINING_STEPS  # two micro-batches a step


@pytest.fixture(scope="module")
def processes():
    """A context whose processes start at once: they are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_resume", "transformers.models.llama.modeling_llama"])
    return context


@pytest.fixture(scope="module")
def pruned(project, tmp_path_factory):
    """A run of one phase up to recover-train, and the arguments of that."""
    folder = tmp_path_factory.mktemp("pruned")
    changes = {
        "prune.phases": 1,
        "training.tokens": str(TRAINING_STEPS * 6 * 32),
        "training.save_every": "1 steps",
        "storage.store": str(folder / "store"),
    }
    with contextlib.chdir(project):
        handle, base_uri = resolve(recipe_with(changes))
        data_uri = run_prepare_data(run=handle, base_uri=base_uri)
        given = {"run": handle, "phase": 1, "checkpoint_uri": base_uri, "data_uri": data_uri}
        statistics, plan = Artifact(folder / "statistics"), Artifact(folder / "plan")
        run_calibrate(**given, statistics=statistics)
        run_score_layers(**given, statistics_path=statistics.path, plan=plan)
        checkpoint_uri = run_prune_step(
            run=handle, phase=1, checkpoint_uri=base_uri, plan_path=plan.path, model=Artifact(folder / "m")
        )
    return Run.load(handle), {"checkpoint_uri": checkpoint_uri, "data_uri": data_uri}


@pytest.fixture
def job_in(pruned, tmp_path):
    """Make a job of ``recover_train`` in a store; what comes before stays where it is."""

    def make(store, **training):
        run, given = pruned
        settings = dataclasses.replace(
            run.settings, training=dataclasses.replace(run.settings.training, **training)
        )
        moved = dataclasses.replace(run, store=store, settings=settings)
        moved.save()
        return {
            "given": given | {"run": moved.handle()},
            "uri": moved.phase_uri(1, "recovered"),
            "environment": {name: value for name, value in os.environ.items() if name.startswith("AWS_")},
            "log": str(tmp_path / f"{len(list(tmp_path.iterdir()))}.log"),
        }

    return make


def run_in_a_process(processes, job, die=None):
    process = processes.Process(target=recover_train, args=(job, die))
    process.start()
    process.join(300)
    assert process.exitcode == (-signal.SIGKILL if die else 0)
    return Path(job["log"]).read_text()


def assert_equal_results(job, expected):
    """Every published file but the report is the same, and of the report all that does not tell the time."""
    assert digest_of(job["uri"]) == digest_of(expected["uri"])
    reports = [read_published(each["uri"], "report.json") for each in (job, expected)]
    for report in reports:
        assert report.pop("seconds") > 0
        assert report.pop("tokens_per_s") > 0
    assert reports[0] == reports[1]
    assert len(reports[0]["losses"]) == TRAINING_STEPS


KILLS = {"saved": "once a state is up", "forward": "in a forward pass", "done": "once the result is up"}


@pytest.mark.parametrize(
    ("place", "precision", "kills"),
    [
        ("folder", "float32", [("saved", 1), ("saved", 2), ("done", 1)]),
        ("s3", "bfloat16", [("saved", 1), ("forward", 7), ("saved", 1)]),
    ],
)
def test_killed_in_the_midst_of_a_phase(place, precision, kills, processes, job_in, tmp_path, request):
    store = str(tmp_path / "store") if place == "folder" else request.getfixturevalue("s3_store_uri")
    expected = job_in(str(tmp_path / "undisturbed"), precision=precision, save_every="0")
    assert "saved" not in run_in_a_process(processes, expected)
    job = job_in(store, precision=precision)
    states_uri, resumed_at = join_uri(job["uri"], "_resume"), []
    for kill in [*kills, None]:
        Path(job["log"]).unlink(missing_ok=True)
        log = run_in_a_process(processes, job, kill)
        resumed_at += [int(words.split()[0]) for words in log.split("resumed at step ")[1:]]
        if kill is not None:
            assert states_at(states_uri)
            assert (read_manifest(job["uri"]) is None) == (kill[0] != "done")
    assert resumed_at == sorted(resumed_at)
    assert 0 < resumed_at[0] < resumed_at[-1] < TRAINING_STEPS
    assert_equal_results(job, expected)
    assert states_at(states_uri) == []
    if place == "folder":
        assert not Path(job["uri"], "_resume").exists()
    moments = ", ".join(KILLS[event] for event, _ in kills)
    happened = f"went on inside the phase {len(resumed_at)} times; curve and files equal to the last bit"
    note(TABLE, f"recover-train ({place}, {precision}) is killed {moments}", f"{happened}; no state is left")


@pytest.mark.slow
def test_killed_at_any_moment(processes, job_in, tmp_path, s3_store_uri):
    """The moments are the system clock's: they differ from run to run."""
    expected = job_in(str(tmp_path / "undisturbed"), save_every="0")
    run_in_a_process(processes, expected)
    job = job_in(s3_store_uri)
    log, kills = Path(job["log"]), 0
    while read_manifest(job["uri"]) is None:
        process = processes.Process(target=recover_train, args=(job,))
        process.start()
        if kills < 40 and (kills < 5 or log.read_text().count("resumed at step") < 5):
            process.join(random.uniform(0.1, 1))
            process.kill()
        process.join(300)
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
    run_in_a_process(processes, job)
    assert kills
    assert_equal_results(job, expected)
    assert states_at(join_uri(job["uri"], "_resume")) == []
    happened = "the result is equal to the last bit; no state is left"
    note(TABLE, "recover-train (s3, float32) is killed at random moments until it is done", happened, kills)


def test_time_and_perplexity_of_earlier_attempts_are_taken_over(processes, job_in, tmp_path):
    job = job_in(str(tmp_path / "store"))
    run_in_a_process(processes, job, ("saved", 1))
    states_uri = join_uri(job["uri"], "_resume")
    uri = join_uri(states_uri, states_at(states_uri)[-1])
    changed = shutil.copytree(fetch(uri, tmp_path), tmp_path / "changed")
    state = json.loads((changed / "state.json").read_text())
    measured, state["facts"]["perplexity_pruned"] = state["facts"]["perplexity_pruned"], 12345.0
    state["progress"]["seconds"] = 1e4
    (changed / "state.json").write_text(json.dumps(state))
    delete_publication(uri, keep_manifest=False)
    publish(changed, uri)
    run_in_a_process(processes, job)
    report = read_published(job["uri"], "report.json")
    assert measured > 1
    assert report["perplexity_pruned"] == 12345.0  # not measured again
    assert report["seconds"] > 1e4
    assert 0 < report["tokens_per_s"] < report["tokens"] / 1e4


def test_what_lies_in_the_folder_of_a_checkpoint_is_not_published_with_it(job_in, tmp_path):
    job = job_in(str(tmp_path / "store"), save_every="0")
    run_recover_train(**job["given"], phase=1, model=Artifact(tmp_path / "model"))
    late = Path(job["uri"], "_resume", "000003", "state.json")  # of a task that was thought to be gone
    late.parent.mkdir(parents=True)
    late.write_text("{}")
    Path(job["uri"], "stray.txt").touch()
    final = run_publish(
        run=job["given"]["run"],
        checkpoint_uri=job["uri"],
        report=Artifact(tmp_path / "report"),
        model=Artifact(tmp_path / "final-model"),
    )
    paths = {entry.path for entry in read_manifest(final).files}
    assert {"config.json", "tokenizer.json", "record.json", "README.md"} < paths
    assert not {path for path in paths if "_resume" in path or "stray" in path}
    model = load_model(fetch(final, tmp_path / "fetched"))
    assert torch.equal(model.lm_head.weight, load_model(Path(job["uri"])).lm_head.weight)
    run_recover_train(**job["given"], phase=1, model=Artifact(tmp_path / "model"))  # done already
    assert not late.parent.exists()
