"""The step recover-train by two ranks on the CPU, spawned as on a cluster; killed, and resumed by one."""

import time
import uuid

import psutil
import pytest
from safetensors.torch import load_file

from core.storage.interface import join_uri
from core.storage.publication import find_publication, open_publication
from tests.training.test_resume import states_at
from tests.training.test_training_kills import (  # noqa: F401
    TRAINING_STEPS,
    job_in,
    processes,
    pruned,
    recover_train,
    run_in_a_process,
)


def with_mark(mark):
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK_OF_A_TEST") == mark:
                found.append(process)
        except psutil.Error:
            pass
    return found


def assert_close_results(job, expected, folder):
    found, wanted = (open_publication(each["uri"]) for each in (job, expected))
    losses = [[x for _, x, _ in each.read_json("report.json")["losses"]] for each in (found, wanted)]
    assert len(losses[0]) == TRAINING_STEPS
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    whole = [each.fetch(folder / str(i)) for i, each in enumerate((found, wanted))]
    for path in whole[1].glob("*.safetensors"):
        tensors = load_file(whole[0] / path.name)
        for key, tensor in load_file(path).items():
            assert (tensors[key].float() - tensor.float()).abs().max() < 0.01, key


@pytest.mark.slow
def test_two_ranks_train_die_with_their_step_and_one_process_goes_on(processes, job_in, tmp_path):  # noqa: F811
    expected = job_in(str(tmp_path / "one"), save_every="0")
    run_in_a_process(processes, expected)
    job = job_in(str(tmp_path / "two"), ranks=2, sharding="full", save_every="1 steps")
    job["environment"]["MARK_OF_A_TEST"] = mark = uuid.uuid4().hex
    log = run_in_a_process(processes, job, ("saved", 1))
    assert "2 ranks, 3 sequences at once on each; weights, gradients and optimizer are shared out" in log
    deadline = time.monotonic() + 60
    while with_mark(mark):
        assert time.monotonic() < deadline, "ranks have outlived the process that started them"
        time.sleep(0.2)
    states_uri = join_uri(job["uri"], "_resume")
    assert states_at(states_uri)
    assert find_publication(job["uri"]) is None
    alone = job_in(str(tmp_path / "two"), ranks=1)
    assert alone["uri"] == job["uri"], "the number of ranks is not part of the key"
    assert "resumed at step" in run_in_a_process(processes, alone)
    assert_close_results(alone, expected, tmp_path / "fetched")
    assert states_at(states_uri) == []


@pytest.mark.slow
def test_two_ranks_publish_what_one_process_publishes(processes, job_in, tmp_path):  # noqa: F811
    expected = job_in(str(tmp_path / "one"), save_every="0", optimizer_state="reset")
    run_in_a_process(processes, expected)
    job = job_in(str(tmp_path / "two"), ranks=2, save_every="1 steps", optimizer_state="reset")
    log = run_in_a_process(processes, job)
    assert "2 ranks, 3 sequences at once on each; each holds all weights" in log
    assert_close_results(job, expected, tmp_path / "fetched")
