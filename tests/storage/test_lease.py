"""The lease of a run: who gets it, who loses it, and what becomes of one whose holder is dead."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from core.errors import LeaseError
from core.storage import lease as lease_module
from core.storage import owner as owner_module
from core.storage.lease import (
    Lease,
    holding_lease,
    read_lease,
    release_lease,
    take_lease,
    time_text,
    watch_lease,
)
from core.storage.owner import LOCAL, Owner
from core.storage.store import open_store
from tests.support.evidence import note
from tests.support.project import ROOT
from tests.support.waiting import wait_until

RUN = "runs/0123456789ab"
TABLE = "Leases and cleaning"


def leases(store):
    return sorted(key for key in store.list() if "/_lease/" in key)


def refusal(store, job):
    """What a rival is told."""
    with pytest.raises(LeaseError) as error:
        take_lease(store, RUN, Owner.of(job))
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_second_owner_is_told_who_holds_the_lease_until_when_and_what_to_do(store):
    lease = take_lease(store, RUN, dataclasses.replace(Owner.of("first"), host="pod-7"))
    message = refusal(store, "second")
    for part in ("job first on pod-7", time_text(lease.renewed_s), time_text(lease.expires_s), "Wait", "end"):
        assert part in message
    assert lease.expires_s == lease.renewed_s + 600
    assert json.loads(store.read_bytes(f"{RUN}/_lease/0001.json"))["renewed"] == time_text(lease.renewed_s)
    note(
        TABLE, "a second execution asks for a lease that is held", "refused; told who, since when, until when"
    )


def test_the_owner_renews_in_place_and_gives_back(store):
    first = take_lease(store, RUN, Owner.of("first"))
    again = take_lease(store, RUN, Owner.of("first"))
    assert again.number == first.number == 1
    assert again.renewed_s > first.renewed_s
    assert leases(store) == [f"{RUN}/_lease/0001.json"]
    release_lease(store, RUN, "second")
    assert read_lease(store, RUN) == again
    release_lease(store, RUN, "first")
    assert leases(store) == []
    assert take_lease(store, RUN, Owner.of("second")).owner.job == "second"


def test_an_expired_lease_is_taken_over_and_its_owner_then_stops(store):
    take_lease(store, RUN, Owner.of("first"), ttl_s=0)
    assert take_lease(store, RUN, Owner.of("second")).number == 2
    assert leases(store) == [f"{RUN}/_lease/0002.json"]
    assert "job second" in refusal(store, "first")
    release_lease(store, RUN, "first")
    assert leases(store) == [f"{RUN}/_lease/0002.json"]
    note(TABLE, "a lease expires and another execution asks", "taken over; the first one then stops")


def test_an_expired_lease_does_not_stop_its_own_owner(store):
    take_lease(store, RUN, Owner.of("first"), ttl_s=0)
    assert take_lease(store, RUN, Owner.of("first")).number == 1
    assert "job first" in refusal(store, "second")
    note(TABLE, "a task waits for a machine until its lease has expired", "it goes on: nobody had asked")


def test_of_eight_takers_of_an_expired_lease_exactly_one_wins(store):
    rounds = 5
    for number in range(rounds):
        run = f"runs/{number:012d}"
        take_lease(store, run, Owner.of("dead"), ttl_s=0)
        start = threading.Barrier(8)

        def take(taker, run=run, start=start):
            start.wait()
            try:
                return take_lease(store, run, Owner.of(f"taker-{taker}"))
            except LeaseError as error:
                return str(error)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(take, range(8)))
        (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Lease)]
        assert read_lease(store, run) == winner
        assert winner.number == 2
        assert (
            sum(f"job {winner.owner.job} " in str(outcome) for outcome in outcomes if outcome != winner) == 7
        )
    note(TABLE, "eight executions race for an expired lease", "one gets it, seven are told who", rounds)


class Blinking:
    """A store whose first listing misses what is deleted and what is created while it is made."""

    def __init__(self, store):
        self._store, self._listed = store, False

    def __getattr__(self, name):
        return getattr(self._store, name)

    def list(self, prefix=""):
        found = self._store.list(prefix) if self._listed else iter(())
        self._listed = True
        return found


def test_a_lease_that_changes_hands_while_it_is_looked_for_is_not_taken_twice(store):
    seize(store, "second")
    with pytest.raises(LeaseError, match="job second"):
        take_lease(Blinking(store), RUN, Owner.of("third"))
    assert [key.rpartition("/")[2] for key in store.list(f"{RUN}/_lease/")] == ["0002.json"]
    note(TABLE, "a lease changes hands while another execution looks for it", "it is not taken twice")


def test_a_thread_renews_while_the_block_runs(store):
    with holding_lease(store, RUN, Owner.of("first"), renew_s=0.01):
        before = read_lease(store, RUN)
        deadline = time.monotonic() + 60
        while read_lease(store, RUN) == before:
            assert time.monotonic() < deadline
    assert read_lease(store, RUN).owner.job == "first"
    ended = read_lease(store, RUN)
    time.sleep(0.1)
    assert read_lease(store, RUN) == ended


def seize(store, job):
    """Take the lease as if it had expired: what a rival does while the owner's machine sleeps."""
    lease = Lease(number=2, owner=Owner.of(job), renewed_s=time.time())
    assert store.write_bytes(f"{RUN}/_lease/0002.json", lease.to_json(), if_absent=True)


@pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN], ids=["shell", "nohup"])
def test_a_block_whose_lease_was_taken_over_is_interrupted(store, interrupts):
    def work():
        with holding_lease(store, RUN, Owner.of("first"), renew_s=0.01):
            seize(store, "second")
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                time.sleep(0.01)
            pytest.fail("it went on for a minute")

    before = signal.signal(signal.SIGINT, interrupts)
    handler = signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.raises(LeaseError, match="job second"):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGUSR1) == handler
    note(TABLE, "a lease is taken over while its owner computes", "the computation is interrupted")


def test_outside_of_the_main_thread_a_lost_lease_shows_at_the_end_of_the_block(store):
    def work():
        with holding_lease(store, RUN, Owner.of("first"), renew_s=0.01):
            seize(store, "second")
            time.sleep(0.3)

    with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(LeaseError, match="job second"):
        pool.submit(work).result()


def test_an_interrupt_by_the_user_stays_one(store):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), holding_lease(store, RUN, Owner.of("first")):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigusr1_from_outside_ends_a_step_as_a_failure(tmp_path):
    """A batch system sends it before it ends a job; no lease was lost then."""
    code = """
import sys, time
from components.runtime import task
from core.storage.lease import holding_lease
from core.storage.owner import Owner
from core.storage.store import open_store
with task("evaluate", 1), holding_lease(open_store(sys.argv[1]), "RUN", Owner.of("first")):
    print("computing", flush=True)
    time.sleep(60)
print("done")
""".replace("RUN", RUN)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "computing\n"
    process.send_signal(signal.SIGUSR1)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (1, "")
    (error,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "SIGUSR1" in error
    assert error == stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert "done in" not in stderr
    note(TABLE, "SIGUSR1 from outside while a step computes", "the step fails; one line names the signal")


def test_sigterm_ends_a_step_and_leaves_a_lease_that_expires_soon(tmp_path):
    """As pods are ended: of a run that was terminated, or on a node that is drained."""
    code = """
import os, signal, sys, threading
from core.storage.lease import holding_lease
from core.storage.owner import Owner
from core.storage.store import open_store
with holding_lease(open_store(sys.argv[1]), "RUN", Owner(job="first", host="pod-7", machine="")):
    ready, tell = os.pipe()
    if not (worker := os.fork()):
        os.write(tell, b"1")
        threading.Event().wait(60)
        os._exit(1)
    os.read(ready, 1)
    os.kill(worker, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM
    print("computing", flush=True)
    threading.Event().wait(60)
print("done")
""".replace("RUN", RUN)
    store = open_store(str(tmp_path / "store"))
    command = [sys.executable, "-c", code, store.uri]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"computing\n"
    assert read_lease(store, RUN).ttl_s == 600
    process.terminate()
    assert process.communicate(timeout=30) == (b"", None)
    assert process.returncode == -signal.SIGTERM
    left = read_lease(store, RUN)
    assert (left.number, left.ttl_s) == (1, 30)
    assert time.time() < left.expires_s < time.time() + 30
    refusal(store, "second")
    again = take_lease(store, RUN, Owner(job="first", host="pod-8", machine=""))
    assert (again.number, again.ttl_s) == (1, 600)
    note(TABLE, "SIGTERM while a step computes", "the lease holds for 30 s more; the same execution gets it")


def test_who_waits_for_a_lease_does_not_take_its_end_for_a_renewal(store, monkeypatch, caplog):
    monkeypatch.setattr(lease_module, "LOOK_S", 0.01)
    owner = Owner(job="first", host="pod-7", machine="")
    take_lease(store, RUN, owner)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, caplog.at_level("INFO"):

        def start_watching():
            caplog.clear()
            waiting = pool.submit(watch_lease, store, RUN)
            wait_until(lambda: "waiting to see whether it is renewed" in caplog.text)
            return waiting

        waiting = start_watching()
        take_lease(store, RUN, owner, ttl_s=0.5)
        assert waiting.result(timeout=30) is None
        take_lease(store, RUN, owner)
        waiting = start_watching()
        renewed = take_lease(store, RUN, owner)
        assert waiting.result(timeout=30) == renewed


def test_a_store_that_fails_for_a_while_stops_no_owner(tmp_path, caplog):
    store = open_store(tmp_path / "store")
    with holding_lease(store, RUN, Owner.of("first"), renew_s=0.01):
        (tmp_path / "store").rename(tmp_path / "away")
        (tmp_path / "store").write_text("no folder any more")
        wait_until(lambda: "not renewed" in caplog.text)
        (tmp_path / "store").unlink()
        (tmp_path / "away").rename(tmp_path / "store")
    assert read_lease(store, RUN).owner.job == "first"
    note(TABLE, "the store cannot be reached while a lease is to be renewed", "said; the work goes on")


DAMAGED = (
    b"",
    b"{",
    b"[]",
    b"\xff",
    b"[" * 100_000,
    b'{"job": "a"}',
    b'{"job": "a", "host": "b", "machine": "", "started": "", "pid": null, "renewed_s": NaN, "ttl_s": 1}',
    b'{"job": "a", "host": "b", "machine": "", "started": "", "pid": null, "renewed_s": 1e300, "ttl_s": 1}',
    b'{"job": 1, "host": "b", "machine": "", "started": "", "pid": null, "renewed_s": 9e9, "ttl_s": 1}',
    b'{"job": "a", "host": "b\\n", "machine": "", "started": "", "pid": null, "renewed_s": 9e9, "ttl_s": 1}',
    b'{"job": "a", "host": "b", "machine": "", "started": "", "pid": -1, "renewed_s": 9e9, "ttl_s": 1}',
)


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_lease_stops_nobody(tmp_path, content):
    store = open_store(tmp_path / "store")
    store.write_bytes(f"{RUN}/_lease/0007.json", content)
    store.write_bytes(f"{RUN}/_lease/notes.txt", b"no lease")
    assert take_lease(store, RUN, Owner.of("first")).number == 8
    note(TABLE, "the lease's file is damaged", "it counts as expired")


HOLD = f"""
import os, sys, time
os.environ["{LOCAL}"] = str(os.getpid())
from core.storage.lease import take_lease
from core.storage.owner import Owner
from core.storage.store import open_store
take_lease(open_store(sys.argv[1]), "{RUN}", Owner.of("first"))
print("held", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def process_that_holds(store):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, store.uri], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_killed_local_run_frees_its_lease_at_once(store):
    with process_that_holds(store) as process:
        assert f"process {process.pid}" in refusal(store, "second")
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has asked: a zombie
        assert take_lease(store, RUN, Owner.of("second")).number == 2
    note(
        TABLE, "a local run is killed (SIGKILL) and started again at once", "the lease is taken over at once"
    )


def test_a_process_is_only_missed_on_its_own_machine():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = Owner.of("job", pid=child.pid)
    try:
        assert not here.is_gone()
    finally:
        child.kill()
        child.communicate()
    assert here.is_gone()
    assert not dataclasses.replace(here, host="elsewhere").is_gone()
    boot, namespace = here.machine.split(" ")
    assert not dataclasses.replace(here, machine=f"{boot} pid:[1]").is_gone()  # a container of equal name
    assert not dataclasses.replace(here, machine=f"another-boot {namespace}").is_gone()
    assert not Owner.of("job").is_gone()  # tasks that live on their own
    note(TABLE, "a process of that id is missing, in another container of equal name", "its lease holds")


def test_an_id_that_another_process_has_now_is_no_sign_of_life():
    mine = Owner.of("job", pid=os.getpid())
    assert not mine.is_gone()
    assert dataclasses.replace(mine, started="1").is_gone()


def test_without_proc_processes_are_found_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(owner_module, "_BOOT", tmp_path / "missing")
    monkeypatch.setattr(owner_module, "_state", owner_module._state_by_psutil)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner.of("job", pid=child.pid)
    assert not owner.is_gone()
    assert len(owner.machine) == 12
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owner.is_gone()
    child.communicate()
    assert owner.is_gone()
