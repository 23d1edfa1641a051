"""The lease of a run: at most one execution works on it at a time, and a dead one stops nobody for long.

``runs/<key>/_lease/0001.json`` names the owner and when it spoke last; the highest number counts. The owner
overwrites its own file every two minutes. Whoever takes over an expired lease creates the next number, which
only one of many can; the old owner then finds a higher number than its own and stops. Nothing but the store
is asked, and of a local run on this machine whether its process still lives: it need not expire then.

Pods of one execution share its lease. One that is told to end leaves a short one, in case it was the last;
the others look at it every five seconds, and renew a short one at once.

The clocks of machines may differ by ``TTL_S - RENEW_S``, eight minutes: beyond that an owner whose clock is
behind seems dead between two renewals. While one of its pods is told to end, ``LEFT_S - LOOK_S``, 25 s, are
enough for that. A second execution costs time and no results then: publications are written once.
"""

import _thread
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from core.errors import InterruptionError, LeaseError, StorageError
from core.storage.interface import Store, join_uri
from core.storage.owner import Owner
from core.untrusted import decode

TTL_S = 600.0
"""How long a lease holds after it was renewed."""
RENEW_S = 120.0
"""How often its owner renews it while it computes."""
LOOK_S = 5.0
"""How often it is looked at, by its owner and by one who waits."""
LEFT_S = 30.0
"""How long it holds once a pod of its owner was told to end: its other pods, or its next try, come first."""
_LEAVING_S = 2.0
"""Time to say so: some pods are killed three seconds after SIGTERM."""

FORMAT = 1
"""Of a lease. Whatever a newer format adds, these entries stay: versions must see each other's leases."""

_NUMBER = re.compile(r"[0-9]{4,9}\.json")
_NOBODY = Owner(job="unknown", host="unknown", machine="")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What stands in a file of ``_lease``."""

    number: int
    """Generation: how often the lease was taken over, from 1."""
    owner: Owner
    """Who holds it."""
    renewed_s: float
    """When the owner spoke last, in seconds since 1970 (UTC)."""
    ttl_s: float = TTL_S
    """How long it holds from then on."""

    @property
    def expires_s(self) -> float:
        """When it ends if it is not renewed, in seconds since 1970 (UTC)."""
        return self.renewed_s + self.ttl_s

    def is_live(self) -> bool:
        """Return whether it keeps others out: it has not expired, and its process is not known to be gone."""
        return time.time() < self.expires_s and not self.owner.is_gone()

    def is_leaving(self) -> bool:
        """Return whether who wrote it was told to end, so that it is no sign of life."""
        return self.ttl_s <= LEFT_S

    def to_json(self) -> bytes:
        """Return the file's content."""
        times = {"renewed": time_text(self.renewed_s), "renewed_s": self.renewed_s, "ttl_s": self.ttl_s}
        return (
            json.dumps({"format": FORMAT, **dataclasses.asdict(self.owner), **times}, indent=1) + "\n"
        ).encode()

    @classmethod
    def from_json(cls, number: int, content: bytes) -> "Lease":
        """Read a file; a damaged one has expired, as its owner would have written it again."""
        try:
            owner, times = decode(Owner, content, "a lease", ""), decode(_Times, content, "a lease", "")
            time_text(times.renewed_s), time_text(times.renewed_s + times.ttl_s)  # refuse what is not a time
        except (StorageError, ValueError, OverflowError, OSError):
            return cls(number=number, owner=_NOBODY, renewed_s=0.0, ttl_s=0.0)
        return cls(number=number, owner=owner, renewed_s=times.renewed_s, ttl_s=times.ttl_s)


@dataclass(frozen=True, kw_only=True)
class _Times:
    renewed_s: float
    ttl_s: float


def time_text(seconds: float) -> str:
    """Return seconds since 1970 as UTC in ISO 8601."""
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} is not a time")
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def lease_number(name: str) -> int | None:
    """Return the generation that a file ``name`` of ``_lease`` is for; None if it is none."""
    return int(name.removesuffix(".json")) if _NUMBER.fullmatch(name) else None


def read_lease(store: Store, run: str) -> Lease | None:
    """Return the lease that counts, live or not; None if nobody has taken any.

    Args:
        store: The store.
        run: The run's folder, ``runs/<key>``.
    """
    while numbers := _numbers(store, run):
        with contextlib.suppress(FileNotFoundError):  # it was released meanwhile
            return Lease.from_json(numbers[-1], store.read_bytes(_key(run, numbers[-1])))
    return None


def take_lease(store: Store, run: str, owner: Owner, *, ttl_s: float = TTL_S) -> Lease:
    """Take a lease, renew one's own, or take over one that has expired.

    Args:
        store: The store.
        run: The run's folder.
        owner: Who takes it; of equal ``job`` it is the same owner.
        ttl_s: How long it holds unless it is renewed.

    Raises:
        LeaseError: If another owner holds a live one.
        StorageError: If the store cannot be reached or written.
    """
    while True:
        before = read_lease(store, run)
        now = time.time()
        if before is not None and before.owner.job == owner.job:
            renewed = Lease(number=before.number, owner=owner, renewed_s=now, ttl_s=ttl_s)
            store.write_bytes(_key(run, renewed.number), renewed.to_json())
            return renewed
        if before is not None and before.is_live():
            raise LeaseError(
                f"{join_uri(store.uri, run)} is worked on by {before.owner}, which renewed its lease at "
                f"{time_text(before.renewed_s)} and holds it until {time_text(before.expires_s)}. Wait until "
                "then, or end that execution first."
            )
        number = before.number + 1 if before else 1
        taken = Lease(number=number, owner=owner, renewed_s=now, ttl_s=ttl_s)
        if not store.write_bytes(_key(run, number), taken.to_json(), if_absent=True):
            continue  # another one was quicker
        if _numbers(store, run)[-1:] != [number]:
            # It changed hands while it was looked for: a listing may miss the old file and the new one.
            store.delete(_key(run, number))
            continue
        if before is not None:
            log.info("taken over from %s, last heard of at %s", before.owner, time_text(before.renewed_s))
            _delete_up_to(store, run, before.number)
        return taken


def renew_lease(store: Store, run: str, owner: Owner) -> None:
    """Renew the lease if ``owner`` holds it, and leave another's alone.

    Raises:
        LeaseError: If another owner takes it over at this moment.
    """
    lease = read_lease(store, run)
    if lease is not None and lease.owner.job == owner.job:
        take_lease(store, run, owner)


def watch_lease(store: Store, run: str) -> Lease | None:
    """Wait until a lease is renewed, or nobody holds it: within ``TTL_S`` one or the other is so.

    Whoever writes it is alive, unless told to end.

    Returns:
        The lease, renewed or in the hands of another owner, who is alive in either case; None if it was
        released or has expired.
    """
    before = read_lease(store, run)
    if before is not None and before.is_live():
        until = time_text(before.expires_s)
        log.info("%s holds the lease until %s: waiting to see whether it is renewed", before.owner, until)
    while before is not None and before.is_live():
        time.sleep(LOOK_S)
        lease = read_lease(store, run)
        if lease is not None and lease != before and not lease.is_leaving():
            return lease
        before = lease
    return None


def release_lease(store: Store, run: str, job: str) -> None:
    """Remove the lease if ``job`` is its owner."""
    lease = read_lease(store, run)
    if lease is not None and lease.owner.job == job:
        _delete_up_to(store, run, lease.number)


@contextlib.contextmanager
def holding_lease(
    store: Store, run: str, owner: Owner, *, ttl_s: float = TTL_S, renew_s: float = RENEW_S
) -> Iterator[Callable[[], Lease]]:
    """Hold the lease while the block runs; it is not released afterwards.

    A thread renews it, at once if another pod that was told to end has shortened it. If another owner has
    taken it over, since this machine was asleep for example, the block is interrupted where it stands.
    SIGTERM ends the process as ever, but leaves a lease of ``LEFT_S``.

    Yields:
        A function that renews the lease at once, and so makes sure that it is still held.

    Raises:
        LeaseError: If another owner holds it, before the block or while it runs.
        StorageError: If the store cannot be reached at the start. Later on that is logged and tried again.
        InterruptionError: If somebody else sends SIGUSR1, as batch systems do before they end a job.
    """
    renew = functools.partial(take_lease, store, run, owner, ttl_s=ttl_s)
    first = renew()
    ended, writing, lost = threading.Event(), threading.Lock(), list[LeaseError]()

    def keep(held: Lease) -> None:
        due_s = time.monotonic() + renew_s
        while not ended.wait(min(LOOK_S, renew_s)):
            try:
                if not _is_cut(store, run, held) and time.monotonic() < due_s:
                    continue
                due_s = time.monotonic() + renew_s
                with writing:
                    if ended.is_set():
                        return
                    held = renew()
            except LeaseError as error:
                lost.append(error)
                if not ended.is_set():
                    interrupt()
                return
            except StorageError as error:
                log.warning("the lease was not renewed: %s", error)

    def leave() -> None:
        ended.set()
        with writing, contextlib.suppress(LeaseError, StorageError):  # after a renewal that is on its way
            renew(ttl_s=LEFT_S)

    try:
        with _interruptible() as interrupt, _leaving(leave):
            keeper = threading.Thread(target=keep, args=(first,), daemon=True)
            keeper.start()
            try:
                yield renew
            finally:
                ended.set()
                keeper.join()
    except _InterruptedError:
        if not lost:
            raise InterruptionError(
                "the signal SIGUSR1, which came from outside, has ended this step. Start the run "
                "again: it resumes."
            ) from None
    if lost:
        raise lost[0]


class _InterruptedError(BaseException):
    """Raised where the main thread stands, so that nothing but its own frame catches it."""


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Yield a function by which another thread ends the block, if that runs in the main thread.

    The block then raises an ``_InterruptedError``, as it does when SIGUSR1 comes from outside. Here no signal
    is sent: Python only acts as if one had come. SIGINT would do nothing in a job in the background or under
    nohup, where it is ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def stop(*_: object) -> None:
        raise _InterruptedError

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        yield functools.partial(_thread.interrupt_main, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def _leaving(leave: Callable[[], None]) -> Iterator[None]:
    """Have SIGTERM call ``leave`` within the block, before it ends this process as it would without.

    A pod of a run that was terminated is told so, and the next execution need not wait for ten minutes.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    process = os.getpid()

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() == process:  # not in a worker that was forked within the block
            # In a thread: the main one may have been interrupted while it held a lock.
            leaver = threading.Thread(target=leave, daemon=True)
            leaver.start()
            leaver.join(_LEAVING_S)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_cut(store: Store, run: str, held: Lease) -> bool:
    """Return whether a lease holds for less long than it was renewed for, or is gone, as far as is known."""
    try:
        return Lease.from_json(held.number, store.read_bytes(_key(run, held.number))).ttl_s < held.ttl_s
    except FileNotFoundError:
        return True  # taken over, as a rule
    except StorageError:
        return False


def _key(run: str, number: int) -> str:
    return f"{run}/_lease/{number:04d}.json"


def _numbers(store: Store, run: str) -> list[int]:
    prefix = f"{run}/_lease/"
    found = (lease_number(key.removeprefix(prefix)) for key in store.list(prefix))
    return sorted(number for number in found if number is not None)


def _delete_up_to(store: Store, run: str, number: int) -> None:
    for old in _numbers(store, run):
        if old <= number:  # upwards: an old one must never be the highest again
            store.delete(_key(run, old))
