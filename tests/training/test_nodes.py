"""Nodes that train together: real processes on loopback, each with ranks of its own, as on a cluster."""

import functools
import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from components.nodes.main import arguments_of, main
from core.errors import OutOfMemoryError, SettingsError
from core.steps.training_plan import agreed_plan, planned_training
from core.storage.interface import join_uri
from core.storage.publication import find_publication
from core.storage.store import open_store
from core.training.parallel import nodes
from core.training.parallel.launch import run_ranks
from core.training.parallel.nodes import Meeting, MeetingOverError, Place
from tests.support.models import tiny
from tests.support.training import training_settings
from tests.training.test_ranks_step import assert_close_results
from tests.training.test_resume import states_at
from tests.training.test_training_kills import (  # noqa: F401
    job_in,
    pruned,
    run_in_a_process,
)

pytestmark = pytest.mark.slow

SILENT_S = 4.0
BOUND_S = 120.0
"""Within it all nodes have ended on a machine that is busy."""


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.training.test_nodes", "transformers.models.llama.modeling_llama", "multiprocessing.spawn"]
    )
    return context


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def variables(node, port, count=2):
    """What the runtime of Kubeflow Trainer sets."""
    return {
        "PET_NNODES": str(count),
        "PET_NODE_RANK": str(node),
        "PET_NPROC_PER_NODE": "auto",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def quickly():
    nodes.SILENT_S, nodes.BEAT_S = SILENT_S, 0.2


def add_up(rank, how):
    """Say which ranks there are; on the second node, fail in some way while the others wait."""
    if rank == 2 and how == "ours":
        raise OutOfMemoryError("out of memory: set something.")
    if rank == 2 and how == "theirs":
        raise KeyError("lost")
    if rank == 2 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank >= 2 and how == "node killed":
        time.sleep(600)
    found = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.ones(1) * rank)
    return [rank, *(int(each) for each in found)]


def be_a_node(node, port, how, told):
    """Be a node of two with two ranks, and write down how that has ended."""
    quickly()
    os.environ.update(variables(node, port))
    torch.set_num_threads(1)
    if node == 1 and how == "node killed":
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.alarm(3)
    try:
        with Meeting(Place.of(os.environ)) as meeting:
            shared = meeting.share("name", f"of {node}"), meeting.hear("word", f"from {node}")
            work = functools.partial(add_up, how=how)
            ranks = run_ranks(work, 2, "cpu", method="fork", place=meeting.place, check=meeting.check)
        said = [ranks, *shared]
    except Exception as error:
        said = [type(error).__name__, str(error)]
    Path(told).write_text(json.dumps(said))


ENDS = {
    "ours": r"node 1 of 2 has failed: out of memory: set something.",
    "theirs": r"node 1 of 2 has failed: rank 2 of 4 has failed: KeyError: 'lost'.",
    "killed": r"node 1 of 2 has failed: rank 2 of 4 was ended by SIGKILL",
    "node killed": r"node 1 of 2 has not been heard of for 4 s: its process was killed, or",
}


@pytest.mark.parametrize("how", ["", *ENDS])
def test_nodes_are_one_group_and_end_together(how, processes, tmp_path):
    port, told = free_port(), [tmp_path / str(node) for node in range(2)]
    started = [processes.Process(target=be_a_node, args=(node, port, how, told[node])) for node in (0, 1)]
    for process in reversed(started):  # the first node may come last
        process.start()
    begun = time.monotonic()
    for process in started:
        process.join(BOUND_S)
    assert [process.exitcode for process in started] == [0, -signal.SIGKILL if how == "node killed" else 0]
    assert time.monotonic() - begun < BOUND_S
    said = [json.loads(path.read_text()) for path in told if path.exists()]
    if not how:
        assert said == [[[2 * node, 0, 1, 2, 3], ["of 0", "of 1"], "from 0"] for node in (0, 1)]
    else:
        assert said[0][0] == "TrainingError"
        assert said[0][1].startswith(ENDS[how])


def test_a_node_of_an_earlier_attempt_is_not_taken_for_one_of_this(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "BEAT_S", 0.1)
    place = Place(node=1, nodes=2, host="127.0.0.1", port=free_port())
    first = Meeting(Place(node=0, nodes=2, host="127.0.0.1", port=place.port))
    first._store = first._open()
    assert Meeting(place)._join(time.monotonic() + 10).add("joined/1", 0) == 1
    asked = []
    with pytest.raises(MeetingOverError), Meeting(place, lambda: len(asked) == 2 or asked.append(1)):
        pass
    with pytest.raises(Exception, match=r"^node 1 of 2 has ended and was started again\. Rerunning"):
        first.check()


def test_the_first_node_does_not_wait_for_those_that_have_left(monkeypatch):
    monkeypatch.setattr(nodes, "MEET_S", 3.0)
    place = Place(node=0, nodes=2, host="127.0.0.1", port=free_port())
    with pytest.raises(MeetingOverError), Meeting(place, lambda: True):
        pass


def test_a_node_that_is_alone_has_met():
    with Meeting(Place()) as meeting:
        assert (meeting.share("x", "a"), meeting.hear("y", "b"), meeting.check()) == (["a"], "b", None)


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, Place(node=1, nodes=2, host="127.0.0.1", port=7)),
        ({"PET_NODE_RANK": "2"}, "PET_NODE_RANK=2"),
        ({"PET_NNODES": "auto"}, "PET_NNODES=auto"),
        ({"PET_MASTER_ADDR": ""}, "PET_MASTER_ADDR=,"),
        ({"PET_MASTER_PORT": "0"}, "name no node"),
    ],
)
def test_the_runtime_names_the_place(changed, wanted):
    given = variables(1, 7) | changed
    if isinstance(wanted, Place):
        assert Place.of(given) == wanted
        assert Place.of({key.removeprefix("PET_"): value for key, value in given.items()}) == wanted
    else:
        with pytest.raises(SettingsError, match=wanted):
            Place.of(given)


class Sharing:
    """A meeting whose other node says something else."""

    place = Place(node=0, nodes=2)

    def __init__(self, **changes):
        self.changes = changes

    def share(self, _, value):
        names = ("ranks", "sharded", "size")
        other = dict(zip(names, json.loads(value), strict=True)) | self.changes
        return [value, json.dumps([other[name] for name in names])]


def test_nodes_take_the_plan_that_needs_least_and_count_all_ranks():
    config = tiny("llama").config
    settings = training_settings(global_batch=24, micro_batch=0, nodes=2, ranks=3)
    plan = planned_training(config, None, settings, "cpu")
    assert (plan.ranks, plan.sharded, plan.settings.micro_batch) == (6, False, 4)
    agreed = agreed_plan(plan, Sharing(sharded=True, size=2))
    assert (agreed.ranks, agreed.sharded, agreed.settings.micro_batch) == (6, True, 2)
    with pytest.raises(Exception, match=r"^the nodes have 3, 4 GPUs: they must have the same number each\.$"):
        agreed_plan(plan, Sharing(ranks=8))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"nodes": 5}, "nodes=5 must divide global_batch=12"),
        ({"nodes": 4, "ranks": 2}, "nodes=4 times ranks=2 must divide global_batch=12"),
        ({"nodes": 0}, "nodes=0 must lie between 1 and"),
    ],
)
def test_a_batch_that_the_nodes_do_not_divide_is_refused(changes, named):
    with pytest.raises(SettingsError, match=named):
        training_settings(global_batch=12, micro_batch=1, **changes)


def train_on_a_node(node, port, job):
    """Be one of two nodes, as the TrainJob starts it."""
    nodes.SILENT_S = 8.0
    os.environ.update(job["environment"] | variables(node, port))
    torch.set_num_threads(1)
    given = job["given"]
    logging.getLogger("core").addHandler(logging.FileHandler(f"{job['log']}-{node}"))
    begun = arguments_of(given["run"], 1, given["checkpoint_uri"], given["data_uri"])
    try:
        main(begun)
    except Exception as error:
        Path(f"{job['log']}-{node}-error").write_text(str(error))
        raise


def started_nodes(processes, job):
    port = free_port()
    both = [processes.Process(target=train_on_a_node, args=(node, port, job)) for node in (0, 1)]
    for process in both:
        process.start()
    return both


def test_two_nodes_train_die_with_one_and_one_process_goes_on(processes, job_in, tmp_path):  # noqa: F811
    expected = job_in(str(tmp_path / "one"), save_every="0")
    run_in_a_process(processes, expected)
    job = job_in(str(tmp_path / "two"), nodes=2, sharding="full", save_every="1 steps")
    both = started_nodes(processes, job)
    states_uri = join_uri(job["uri"], "_resume")
    deadline = time.monotonic() + 300
    while not any(re.fullmatch("[0-9]+/MANIFEST.json", key) for key in open_store(states_uri).list()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    both[1].kill()
    killed = time.monotonic()
    both[0].join(BOUND_S)
    assert both[0].exitcode == 1
    assert time.monotonic() - killed < BOUND_S
    assert Path(f"{job['log']}-0-error").read_text().startswith("node 1 of 2 has not been heard of for 8 s")
    assert "2 ranks on 2 nodes, 3 sequences at once on each" in Path(f"{job['log']}-0").read_text()
    assert find_publication(job["uri"]) is None
    alone = job_in(str(tmp_path / "two"))
    assert alone["uri"] == job["uri"], "the number of nodes is not part of the key"
    assert "resumed at step" in run_in_a_process(processes, alone)
    assert_close_results(alone, expected, tmp_path / "fetched")
    assert states_at(states_uri) == []
