"""Starting ranks within this process's task, and ending with them.

They are spawned by ``multiprocessing``, not by ``torch.distributed.run``: its agent restarts ranks and meets
other nodes' agents, which the cluster does for tasks, and its report of an error is a table. Here the first
cause is one line, and a rank lives no longer than the process that has started it, however that ends.
"""

import contextlib
import logging
import logging.handlers
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from core.errors import AdaptPrunerError, LostRankError, TrainingError
from core.scratch import scratch_folder
from core.training.parallel.nodes import Place

T = TypeVar("T")


class _Failure(NamedTuple):
    """What a rank tells of its end."""

    error: Exception
    where: str
    """The traceback of an error that is not meant for users."""


log = logging.getLogger(__name__)

_ALONE = Place()
_GRACE_S = 10.0
"""How long the other ranks may take to end once one has failed."""
_LOST = re.compile(r"gloo|nccl|connection|socket|broken pipe|timed out|TCPStore", re.IGNORECASE)
_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others; one that has ended is noticed at once, by its process."""


def run_ranks(
    work: Callable[[int], T],
    size: int,
    device: str,
    *,
    method: str = "spawn",
    place: Place = _ALONE,
    check: Callable[[], None] | None = None,
) -> T:
    """Run a function on several ranks, which have a process group while it runs.

    Their log lines of INFO and above (warnings of the ranks other than 0) go to the loggers of this process.

    Args:
        work: Gets the rank's number. It can be pickled, as what rank 0 returns, which holds no tensors.
        size: Number of ranks on this node.
        device: Type of the device: ranks meet by NCCL on ``cuda``, by gloo on ``cpu``.
        method: How processes start. CUDA needs those that share nothing with this one.
        place: This node among those whose ranks form one group.
        check: Called every second; what it raises ends all.

    Returns:
        What the first rank here returns.

    Raises:
        AdaptPrunerError: As a rank raised it.
        LostRankError: If a rank has lost another one.
        TrainingError: If a rank ends otherwise before it is done. The others have ended when this is raised.
    """
    context: Any = multiprocessing.get_context(method)
    with scratch_folder() as folder, contextlib.ExitStack() as stack:
        processes: list[BaseProcess] = []
        connections: list[Connection] = []
        stack.callback(_end, processes)
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            stack.callback(ours.close)
            process = context.Process(
                target=_main,
                args=(work, rank, size, device, folder / "meet", theirs, place),
                daemon=True,
            )
            process.start()
            theirs.close()  # so that the end of the process ends the pipe
            processes.append(process)
            connections.append(ours)
        return _follow(processes, connections, place, check)


def _follow(
    processes: list[BaseProcess],
    connections: list[Connection],
    place: Place,
    check: Callable[[], None] | None,
) -> Any:
    """Wait for all ranks, pass on what they log, and return what the first one returns."""
    results: dict[int, Any] = {}
    errors: list[tuple[int, Exception, str]] = []
    ended: list[int] = []
    open_: dict[Any, int] = {connection: rank for rank, connection in enumerate(connections)}
    deadline = None
    while open_ and (deadline is None or time.monotonic() < deadline):
        if check is not None and deadline is None:
            check()
        ready: list[Any] = wait(list(open_), timeout=1.0 if check or deadline is not None else None)
        for connection in ready:
            rank = open_[connection]
            try:
                message = connection.recv()
            except (EOFError, OSError):  # or in the middle of a message
                del open_[connection]
                ended.append(rank)
                processes[rank].join()
            else:
                if isinstance(message, logging.LogRecord):
                    logging.getLogger(message.name).handle(message)
                elif isinstance(message, _Failure):
                    errors.append((rank, *message))
                else:
                    results[rank] = message[0]
        if deadline is None and (errors or any(rank not in results for rank in ended)):
            deadline = time.monotonic() + _GRACE_S
    # What the others then say is that they have lost those that have ended without a word.
    told = {rank for rank, *_ in errors} | results.keys()
    for rank in ended:
        if rank not in told or (processes[rank].exitcode or 0) < 0:
            size = len(processes)
            raise _ended(place.node * size + rank, processes[rank].exitcode or 0, place.nodes * size)
    if errors:
        _, error, where = errors[0]
        if where:
            log.error("%s", where)
        raise error
    return results[0]


def _ended(rank: int, code: int, size: int) -> TrainingError:
    how = f"with status {code}. Its last lines say why"
    if code < 0:
        how = f"by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        how += ", as the system does when memory runs out: give the task more"
    return TrainingError(
        f"rank {rank} of {size} was ended {how}. Rerunning the step resumes from the last saved state."
    )


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _main(
    work: Callable[[int], Any],
    local: int,
    size: int,
    device: str,
    meet: Path,
    pipe: Connection,
    place: Place,
) -> None:
    """Be a rank, one of ``size`` on this node."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    lock = threading.Lock()
    rank, ranks = place.node * size + local, place.nodes * size

    def send(message: Any) -> None:
        with lock:
            pipe.send(message)

    _log_to(send, logging.INFO if rank == 0 else logging.WARNING)
    if rank:
        os.environ["TQDM_DISABLE"] = "1"
    try:
        with _process_group(local, size, device, meet, place):
            result = work(rank)
            send((result if local == 0 else None,))
    except Exception as error:
        where = ""
        if not isinstance(error, AdaptPrunerError):
            where, text = traceback.format_exc(), " ".join(str(error).split())[:500]
            kind = TrainingError
            if place.nodes > 1 and _LOST.search(text):
                kind, where = LostRankError, ""  # the cause is elsewhere
            error = kind(f"rank {rank} of {ranks} has failed: {type(error).__name__}: {text}.")
        send(_Failure(error, where))
        os._exit(1)  # at once: what is left of the process group may wait for the others


@contextlib.contextmanager
def _process_group(local: int, size: int, device: str, meet: Path, place: Place) -> Iterator[None]:
    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    met: dict[str, Any] = {"init_method": f"file://{meet}"}
    if place.nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    else:
        met = {"store": dist.PrefixStore("ranks", place.connect())}  # type: ignore[attr-defined]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        rank=place.node * size + local,
        world_size=place.nodes * size,
        timeout=_TIMEOUT,
        **met,
    )
    yield
    dist.destroy_process_group()  # not after an error: it may wait for the others


def _log_to(send: Callable[[Any], None], level: int) -> None:
    class Sender(logging.handlers.QueueHandler):
        def enqueue(self, record: logging.LogRecord) -> None:
            send(record)

    logger = logging.getLogger("core")
    logger.addHandler(Sender(None))  # type: ignore[arg-type]
    logger.setLevel(level)
    logger.propagate = False


def end_with_parent() -> None:
    """Wait for the process that has started this one, and end this one when that ends, however it does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
