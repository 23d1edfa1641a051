"""The step recover-train in its own process, killed during a phase and started again."""

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

from core.model.build import load_model
from core.runs.run import Run
from core.steps.calibrate import run_calibrate
from core.steps.prepare_data import run_prepare_data
from core.steps.prune_step import run_prune_step
from core.steps.publish import run_publish
from core.steps.recover_train import run_recover_train
from core.steps.score_layers import run_score_layers
from core.storage.interface import join_uri
from core.storage.publication import find_publication, open_publication, publish
from tests.support.evidence import note
from tests.support.project import Artifact, recipe_with, resolve
from tests.training.test_resume import TABLE, states_at


def recover_train(job, die=None):
    """Run recover-train in its own process; ``die`` is when it kills itself with SIGKILL.

    Args:
        job: Its arguments, the variables of its environment, and the file of its log.
        die: ``("saved", n)``: when the n-th state is published, at any point of a training step.
            ``("forward", n)``: at the n-th pass, at any point of publishing. ``("done", 1)``: once the
            checkpoint is published, before states are removed.
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
    context.set_forkserver_preload(
        ["tests.training.test_training_kills", "transformers.models.llama.modeling_llama"]
    )
    return context


@pytest.fixture(scope="module")
def pruned(project, tmp_path_factory):
    """A run of one phase up to recover-train, and the arguments of that."""
    folder = tmp_path_factory.mktemp("pruned")
    changes = {
        "prune.phases": 1,
        "training.tokens": str(TRAINING_STEPS * 6 * 32),
        "training.save_every": "1 steps",
        "training.held_out_sequences": 4,
        "training.eval_every": 3,
        "storage.store": str(folder / "store"),
    }
    with contextlib.chdir(project):
        handle, base_uri = resolve(recipe_with(changes))
        data_uri = run_prepare_data(run=handle, base_uri=base_uri)
        given = {"run": handle, "phase": 1, "checkpoint_uri": base_uri, "data_uri": data_uri}
        statistics, plan = Artifact(folder / "statistics"), Artifact(folder / "plan")
        run_calibrate(**given, statistics=statistics)
        run_score_layers(**given, plan=plan)
        checkpoint_uri = run_prune_step(**given, model=Artifact(folder / "m"))
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
    """Every published file but the report is the same, and so is the report, except for times."""
    assert open_publication(job["uri"]).digest == open_publication(expected["uri"]).digest
    reports = [open_publication(each["uri"]).read_json("report.json") for each in (job, expected)]
    for report in reports:
        assert report.pop("seconds") > 0
        assert report.pop("tokens_per_s") > 0
        of_machine = [name for name in report["series"] if name not in ("gradient_norm", "held_out_loss")]
        lengths = {len(report["series"].pop(name)) for name in of_machine}
        assert lengths == {TRAINING_STEPS}
    assert reports[0] == reports[1]
    assert len(reports[0]["losses"]) == TRAINING_STEPS


KILLS = {"saved": "once a state is up", "forward": "in a forward pass", "done": "once the result is up"}


@pytest.mark.slow
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
            assert (find_publication(job["uri"]) is None) == (kill[0] != "done")
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
    run_in_a_process(processes, expected)  # also lets the server import all it needs
    started = time.monotonic()
    run_in_a_process(processes, job_in(str(tmp_path / "timed")))
    undisturbed_s = time.monotonic() - started
    job = job_in(s3_store_uri)
    log, kills = Path(job["log"]), 0
    log.touch()
    while find_publication(job["uri"]) is None:
        process = processes.Process(target=recover_train, args=(job,))
        process.start()
        if kills < 40 and (kills < 5 or log.read_text().count("resumed at step") < 5):
            process.join(random.uniform(0.05, 0.6) * undisturbed_s)
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


@pytest.mark.slow
def test_the_time_of_earlier_attempts_is_taken_over(processes, job_in, tmp_path):
    job = job_in(str(tmp_path / "store"))
    run_in_a_process(processes, job, ("saved", 1))
    states_uri = join_uri(job["uri"], "_resume")
    uri = join_uri(states_uri, states_at(states_uri)[-1])
    changed = shutil.copytree(open_publication(uri).fetch(tmp_path), tmp_path / "changed")
    state = json.loads((changed / "state.json").read_text())
    state["progress"]["seconds"] = 1e4
    (changed / "state.json").write_text(json.dumps(state))
    open_publication(uri).delete()
    publish(changed, uri)
    run_in_a_process(processes, job)
    report = open_publication(job["uri"]).read_json("report.json")
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
        result=Artifact(tmp_path / "result"),
        report=Artifact(tmp_path / "report"),
        model=Artifact(tmp_path / "final-model"),
    )
    paths = set(open_publication(final).manifest.paths)
    assert {"config.json", "tokenizer.json", "record.json", "README.md"} < paths
    assert not {path for path in paths if "_resume" in path or "stray" in path}
    model = load_model(open_publication(final).fetch(tmp_path / "fetched"))
    assert torch.equal(model.lm_head.weight, load_model(Path(job["uri"])).lm_head.weight)
    run_recover_train(**job["given"], phase=1, model=Artifact(tmp_path / "model"))  # done already
    assert not late.parent.exists()
