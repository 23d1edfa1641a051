"""One pod of a run is told to end while another one computes; or all of them are."""

import concurrent.futures
import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from core.errors import LeaseError
from core.storage import lease as lease_module
from core.storage.lease import (
    LEFT_S,
    TTL_S,
    Lease,
    holding_lease,
    read_lease,
    take_lease,
    watch_lease,
)
from core.storage.owner import Owner
from core.storage.store import open_store
from tests.support.evidence import note
from tests.support.project import ROOT
from tests.support.waiting import wait_until

RUN = "runs/0123456789ab"
TABLE = "Leases and cleaning"
HERE, THERE = (Owner(job="first", host=host, machine="") for host in ("pod-7", "pod-8"))
RIVAL = Owner(job="second", host="pod-9", machine="")


@pytest.fixture(autouse=True)
def short_looks(monkeypatch):
    monkeypatch.setattr(lease_module, "LOOK_S", 0.02)


def leave(store, owner, *, left_s=LEFT_S):
    """Do what SIGTERM makes a pod do."""
    take_lease(store, RUN, owner, ttl_s=left_s)


def start(code, store):
    """Start a process of a pod that runs ``code``, and wait for its first line."""
    head = f"""
import sys, threading
from core.storage import lease as lease_module
from core.storage.lease import LEFT_S, holding_lease, take_lease
from core.storage.owner import Owner
from core.storage.store import open_store
lease_module.LOOK_S = 0.02
def compute():
    for _ in range(1200):  # a signal that comes just before a long wait would be heard after it only
        threading.Event().wait(0.05)
store, RUN, THERE = open_store(sys.argv[1]), "{RUN}", Owner(job="first", host=sys.argv[2], machine="")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", head + code, store.uri, THERE.host],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"computing\n"
    return process


HOLD = """
with holding_lease(store, RUN, THERE):
    print("computing", flush=True)
    compute()
"""


def end(process):
    """Tell a process to end, as Kubernetes does."""
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def test_a_pod_that_is_told_to_end_shortens_no_lease_of_pods_that_compute(store):
    with holding_lease(store, RUN, HERE):
        for _ in range(3):
            leave(store, THERE)
            wait_until(lambda: read_lease(store, RUN).ttl_s == TTL_S)
            assert read_lease(store, RUN).owner == HERE
    leave(store, THERE)
    time.sleep(0.2)
    assert read_lease(store, RUN).ttl_s == LEFT_S  # nobody computes any more


def test_a_drained_pod_beside_one_that_computes(tmp_path):
    store = open_store(tmp_path / "store")
    other = start(HOLD, store)
    with holding_lease(store, RUN, HERE):
        end(other)
        wait_until(lambda: (read_lease(store, RUN).owner, read_lease(store, RUN).ttl_s) == (HERE, TTL_S))
    note(TABLE, "SIGTERM to one of two pods of a run that compute", "the other one renews the lease at once")


def test_pods_that_are_told_to_end_together_leave_a_lease_that_expires_soon(tmp_path):
    store = open_store(tmp_path / "store")
    for pause_s in (0.0, 0.3):
        pods = [start(HOLD, store), start(HOLD, store)]
        pods[0].terminate()
        time.sleep(pause_s)  # the other one has renewed it, or is about to
        end(pods[1])
        end(pods[0])
        assert read_lease(store, RUN).ttl_s == LEFT_S
    note(TABLE, "SIGTERM to all pods of a run", "the lease holds for 30 s more", 2)


def test_a_renewal_that_is_on_its_way_at_sigterm_does_not_come_last(tmp_path):
    code = """
import os, pathlib, subprocess
write = type(store).write_bytes
def write_late(key, data):
    if threading.current_thread() is not keeper:
        return write(store, key, data)
    new = pathlib.Path(sys.argv[1], "new")
    new.write_bytes(data)
    server = subprocess.Popen(["sh", "-c", f"sleep 0.5; mv {new} {pathlib.Path(sys.argv[1], key)}"])
    print("computing", flush=True)
    server.wait()
with holding_lease(store, RUN, THERE):
    (keeper,) = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    store.write_bytes = write_late
    take_lease(store, RUN, Owner(job="first", host="pod-7", machine=""), ttl_s=LEFT_S)
    compute()
"""
    store = open_store(tmp_path / "store")
    end(start(code, store))
    time.sleep(1.0)
    assert read_lease(store, RUN).ttl_s == LEFT_S


@pytest.fixture
def watching(store, caplog):
    """Start to wait for the lease, as an execution does that is refused it."""

    def start_watching(pool):
        with caplog.at_level("INFO"):
            waiting = pool.submit(watch_lease, store, RUN)
            wait_until(lambda: "waiting to see whether it is renewed" in caplog.text)
        assert not waiting.done()
        return waiting

    return start_watching


def test_who_waits_takes_no_pod_that_ends_for_one_that_lives(store, watching, monkeypatch):
    monkeypatch.setattr(lease_module, "LEFT_S", 2.0)
    take_lease(store, RUN, HERE)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = watching(pool)
        for owner in (THERE, HERE, HERE):
            leave(store, owner, left_s=2.0)
            time.sleep(0.1)
            assert not waiting.done()
        assert waiting.result(timeout=30) is None
    note(TABLE, "all pods of a run are told to end while another execution waits", "that one takes it over")


@pytest.mark.parametrize("skew_s", [0, -60])
def test_who_waits_sees_a_pod_that_lives_beside_one_that_ends(store, watching, skew_s):
    take_lease(store, RUN, HERE)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = watching(pool)
        leave(store, THERE)
        time.sleep(0.1)
        renewed = Lease(number=1, owner=HERE, renewed_s=time.time() + skew_s)  # its clock may be behind
        store.write_bytes(f"{RUN}/_lease/0001.json", renewed.to_json())
        assert waiting.result(timeout=30) == renewed


def test_who_waits_for_a_lease_that_gets_damaged_finds_nobody_alive(store, watching):
    take_lease(store, RUN, HERE)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = watching(pool)
        store.write_bytes(f"{RUN}/_lease/0001.json", b"{")
        assert waiting.result(timeout=30) is None


def test_a_run_is_not_taken_over_while_one_of_its_pods_is_drained(store, watching, monkeypatch):
    monkeypatch.setattr(lease_module, "LEFT_S", 2.0)
    with holding_lease(store, RUN, HERE), concurrent.futures.ThreadPoolExecutor(1) as pool:
        take_lease(store, RUN, THERE)
        waiting = watching(pool)
        leave(store, THERE, left_s=2.0)
        alive = waiting.result(timeout=30)
        assert alive is not None
        assert (alive.owner, alive.ttl_s) == (HERE, TTL_S)
        with pytest.raises(LeaseError, match="job first on pod-7"):
            take_lease(store, RUN, RIVAL)
    note(
        TABLE, "one of two pods is told to end while another execution waits", "that one finds the run alive"
    )


def test_a_takeover_is_noticed_at_the_next_look(store):
    def work():
        with holding_lease(store, RUN, HERE):
            seize(store)
            wait_until(lambda: False)

    with pytest.raises(LeaseError, match="job second"):
        work()


def seize(store):
    """Take the lease over as if it had expired."""
    taken = Lease(number=2, owner=RIVAL, renewed_s=time.time())
    assert store.write_bytes(f"{RUN}/_lease/0002.json", taken.to_json(), if_absent=True)
    store.delete(f"{RUN}/_lease/0001.json")


def test_a_look_at_the_lease_is_one_small_read(store):
    calls = []

    class Told:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(store, name)

    with holding_lease(Told(), RUN, HERE):
        wait_until(lambda: calls.count("read_bytes") >= 5)
    assert set(calls[calls.index("read_bytes") :]) == {"read_bytes"}
    assert dataclasses.replace(read_lease(store, RUN), renewed_s=0) == Lease(
        number=1, owner=HERE, renewed_s=0
    )
