"""Where a run stands, as its store shows it."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from core.pruning.phases import phase_steps
from core.runs.finding import stored_runs
from core.steps.watching import watched
from core.storage.lease import release_lease, take_lease
from core.storage.owner import Owner
from core.storage.store import open_store
from pipelines.cli import main
from tests.support.stored_runs import json_file, publish_quickly, write_run

OTHERS = {"calibrated": 10.0, "scored": 5.0, "pruned": 5.0}
EVALUATE, TRAIN = 60.0, 100.0


@pytest.fixture
def started(tmp_path):
    """A run of three phases whose first is done."""
    store = tmp_path / "store"
    key = write_run(store, "trial", phases=3, layers=2, done=1)
    return store, store / "runs" / key


def look(store):
    (stored,) = stored_runs(open_store(str(store)))
    return stored, watched(stored)


def steps_of(stored):
    return phase_steps(stored.run.settings.training.total_steps, 3)


def state(folder, step, loss, seconds):
    progress = {"losses": [[step - 1, loss + 1, 1e-4], [step, loss, 1e-4]], "seconds": seconds}
    publish_quickly(folder / f"{step + 1:06d}", {"state.json": json_file(progress=progress, shards=0)})


def test_between_phases_the_time_left_is_that_of_the_steps_that_are_missing(started):
    store, _ = started
    stored, now = look(store)
    first, *rest = steps_of(stored)
    assert (now.phase, now.step) == (2, "calibrate")
    assert (now.trained, now.to_train) == (first, first + sum(rest))
    assert now.loss == pytest.approx(3 - 0.01 * 19)
    assert now.seconds_left == pytest.approx(
        2 * (sum(OTHERS.values()) + EVALUATE) + sum(rest) * TRAIN / first
    )
    assert now.share == pytest.approx((2 + 5) / (2 + 15 + 1))


def test_within_a_training_its_newest_state_counts(started):
    store, run = started
    for step in OTHERS:
        publish_quickly(run / "phases" / "02" / step, {"report.json": json_file(seconds=OTHERS[step])})
    stored, _ = look(store)
    first, second, third = steps_of(stored)
    resume = run / "phases" / "02" / "recovered" / "_resume"
    state(resume, first + 99, 2.75, 9.0)
    state(resume, first + 299, 2.5, 30.0)
    Path(resume, "999999").mkdir()
    Path(resume, "999999", "state.json").write_text("{}")  # an upload that is not complete
    _, now = look(store)
    assert (now.phase, now.step, now.trained, now.loss) == (2, "recover-train", first + 300, 2.5)
    rate = (TRAIN + 30.0) / (first + 300)
    expected = (second - 300 + third) * rate + 2 * EVALUATE + sum(OTHERS.values())
    assert now.seconds_left == pytest.approx(expected)
    assert now.share == pytest.approx((2 + 5 + 3 + 300 / second) / 18)


def test_before_each_kind_of_step_was_seen_no_time_is_told(tmp_path):
    write_run(tmp_path, "new", phases=2, layers=2, done=0)
    _, now = look(tmp_path)
    assert (now.phase, now.step, now.seconds_left, now.loss) == (1, "calibrate", None, None)


def test_the_last_evaluation_is_waited_for(tmp_path):
    key = write_run(tmp_path, "end", phases=2, layers=2, done=2)
    _, now = look(tmp_path)
    assert (now.phase, now.step, now.seconds_left) == (2, "publish", 0.0)
    (evaluated,) = (tmp_path / "runs" / key / "phases" / "02").glob("evaluated-*")
    (evaluated / "MANIFEST.json").unlink()
    _, now = look(tmp_path)
    assert (now.phase, now.step, now.seconds_left) == (2, "evaluate", EVALUATE)


def test_the_command_follows_until_nobody_works(started, monkeypatch):
    store, run = started
    opened, key = open_store(str(store)), run.name
    take_lease(opened, f"runs/{key}", Owner.of("job"))
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            publish_quickly(run / "phases" / "02" / "calibrated", {"report.json": json_file(seconds=1.0)})
        if len(looks) == 4:
            release_lease(opened, f"runs/{key}", "job")

    monkeypatch.setattr("pipelines.commands.watch.time.sleep", sleep)
    result = CliRunner().invoke(main, ["watch", f"{store}/runs/{key}", "--every", "3s"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert looks == [3.0] * 4
    assert [line.split(";")[1].strip() for line in lines] == [
        "phase 2 of 3, calibrate",
        "phase 2 of 3, score-layers",
        "phase 2 of 3, score-layers",
    ]
    assert [line.split()[2].rstrip(",") for line in lines] == ["running", "running", "interrupted"]
    assert "of work left" in lines[0]


def test_a_damaged_run_and_a_done_one_have_a_line(tmp_path):
    done = write_run(tmp_path, "done", phases=1, layers=2)
    bad = write_run(tmp_path, "bad", phases=1, layers=2)
    (tmp_path / "runs" / bad / "run.json").write_text("{")
    result = CliRunner().invoke(main, ["watch", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert f"done {done}  done" in result.output
    assert f"{bad}  damaged" in result.output


def test_a_pause_of_nothing_is_refused(tmp_path):
    result = CliRunner().invoke(main, ["watch", str(tmp_path), "--every", "0"])
    assert result.exit_code == 2
    assert "error: --every=0 leaves no pause between requests. Give a time such as 10s." in result.output
