"""The nodes that train together: each is a process that starts ranks, and all of them meet at node 0.

Node 0 keeps a store of torch.distributed, by which the nodes agree on what to do, see that the others live,
and learn why one has failed. A node that ends early ends all: each then fails, and whoever starts them again
lets them resume from the last saved state.
"""

import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from core.errors import AdaptPrunerError, LostRankError, SettingsError, TrainingError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from transformers import PreTrainedModel

    from core.training.resume import SavedStates
    from core.training.state import TrainingState

log = logging.getLogger(__name__)

BEAT_S = 2.0
"""How often a node says that it lives."""
SILENT_S = 30.0
"""How long it may say nothing."""
MEET_S = 1800.0
"""How long the nodes wait for each other at the start: machines and images take their time."""
_LOOK_S = 0.2
_LEAVE_S = 30.0
_RESUMES = "Rerunning the step resumes from the last saved state."


@dataclass(frozen=True, kw_only=True)
class Place:
    """This node among those that train together; without arguments it is alone.

    Attributes:
        node: Its number, from 0.
        nodes: How many there are.
        host: Where node 0 is.
        port: Its port.
        meeting: Names this meeting of theirs; empty before they have met.
    """

    node: int = 0
    nodes: int = 1
    host: str = ""
    port: int = 0
    meeting: str = ""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Place":
        """Return the place that the torch runtime of Kubeflow Trainer, or a launcher like it, names.

        Args:
            environment: Variables, ``PET_NNODES`` and so on; ``NNODES`` where that is missing.

        Raises:
            SettingsError: If one is missing or makes no sense.
        """
        names = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
        found = [environment.get(f"PET_{name}", environment.get(name, "")) for name in names]
        try:
            nodes, node, port = (int(found[i]) for i in (0, 1, 3))
        except ValueError:
            nodes = node = port = -1
        if not (0 <= node < nodes and 0 < port < 2**16 and found[2]):
            given = ", ".join(f"PET_{name}={value}" for name, value in zip(names, found, strict=True))
            raise SettingsError([f"{given} name no node. Start it by a runtime for torch, which sets them."])
        return cls(node=node, nodes=nodes, host=found[2], port=port)

    def connect(self) -> "TCPStore":
        """Return the store of the meeting, for a process of this node."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host = self.host if self.node else "localhost"
        return TCPStore(host, self.port, is_master=False, timeout=timedelta(seconds=MEET_S))


class MeetingOverError(Exception):
    """What the nodes would meet for is done."""


class Meeting:
    """Nodes that have met, from the beginning to the end of a ``with`` block; a node that is alone has, too.

    A block that ends well ends so on all nodes, when node 0 has left it. One that an error ends fails on all.
    """

    def __init__(self, place: Place, is_over: Callable[[], bool] = lambda: False) -> None:
        """Be at a place.

        Args:
            place: Of this node.
            is_over: Whether there is nothing left to meet for. A node that is started again late asks this.
        """
        self.place, self._is_over = place, is_over
        self._ended = threading.Event()
        self._heard: dict[int, tuple[int, float]] = {}

    def __enter__(self) -> "Meeting":
        """Wait for all nodes.

        Raises:
            MeetingOverError: If it is over before it has begun.
            TrainingError: If not all come.
        """
        if self.place.nodes == 1:
            return self
        if self.place.node == 0 and self._is_over():
            raise MeetingOverError  # started again after it has published: nobody would come
        deadline = time.monotonic() + MEET_S
        self._store = self._open() if self.place.node == 0 else self._join(deadline)
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            self._wait_for_all(deadline)
        except BaseException:
            self._ended.set()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Leave together, or tell the others of an error.

        Raises:
            TrainingError: If the error is no more than what the end of another node has caused.
        """
        if self.place.nodes == 1:
            return
        try:
            if error is None:
                self._leave()
            elif isinstance(error, LostRankError):
                raise self._cause_of(error) from None
            elif isinstance(error, Exception):
                self._tell(error)
        finally:
            self._ended.set()

    def share(self, name: str, value: str) -> list[str]:
        """Return what each node has to say about something."""
        if self.place.nodes == 1:
            return [value]
        self._set(f"{name}/{self.place.node}", value)
        return [self._wait_for(f"{name}/{node}") for node in range(self.place.nodes)]

    def hear(self, name: str, value: str) -> str:
        """Return what node 0 has to say about something."""
        if self.place.nodes == 1:
            return value
        if self.place.node == 0:
            self._set(name, value)
        return self._wait_for(name)

    def check(self) -> None:
        """Look after the other nodes; node 0 does so for all.

        Raises:
            TrainingError: If one has failed, or has not been heard of for long.
        """
        if self.place.nodes == 1:
            return
        if failure := self._get("failure/1"):
            told = json.loads(failure)
            if told["node"] != self.place.node:
                raise TrainingError(told["text"])
        now = time.monotonic()
        for node in range(1, self.place.nodes) if self.place.node == 0 else (0,):
            beats = self._count(f"beats/{node}")
            heard, when = self._heard.get(node, (-1, now))
            if beats != heard:
                self._heard[node] = beats, now
            elif now - when > SILENT_S:
                raise TrainingError(
                    f"node {node} of {self.place.nodes} has not been heard of for {SILENT_S:.0f} s: its "
                    f"process was killed, or its machine is gone. {_RESUMES}"
                )
            if self.place.node == 0 and self._count(f"joined/{node}") > 1:
                raise TrainingError(
                    f"node {node} of {self.place.nodes} has ended and was started again. {_RESUMES}"
                )

    def _open(self) -> "TCPStore":
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore(
            "localhost",
            self.place.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=MEET_S),
        )
        store.set("meeting", uuid.uuid4().hex[:8])
        return store

    def _join(self, deadline: float) -> "TCPStore":
        """Reach node 0, as soon as it is there and does not take this node for one that has joined before."""
        where = f"node 0 at {self.place.host}:{self.place.port}"
        log.info("node %d of %d: waiting for %s", self.place.node, self.place.nodes, where)
        while time.monotonic() < deadline:
            if self._is_over():
                raise MeetingOverError
            try:
                socket.create_connection((self.place.host, self.place.port), timeout=5).close()
                store = self.place.connect()
                if store.add(f"joined/{self.place.node}", 1) == 1:
                    return store
            except (OSError, RuntimeError) as error:
                log.debug("%s is not there yet: %s", where, error)
            time.sleep(1)
        raise TrainingError(f"{where} cannot be reached within {MEET_S / 60:.0f} minutes. {_RESUMES}")

    def _wait_for_all(self, deadline: float) -> None:
        if self.place.node == 0:
            missing = list(range(1, self.place.nodes))
            while missing := [node for node in missing if not self._count(f"joined/{node}")]:
                if time.monotonic() > deadline:
                    names = ", ".join(map(str, missing))
                    raise TrainingError(
                        f"node {names} of {self.place.nodes} has not come within {MEET_S / 60:.0f} minutes. "
                        f"{_RESUMES}"
                    )
                time.sleep(_LOOK_S)
        self.hear("met", "met")
        self.place = replace(self.place, meeting=self._wait_for("meeting"))
        log.info("%d nodes have met; this is node %d", self.place.nodes, self.place.node)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self._store.add(f"beats/{self.place.node}", 1)
            except RuntimeError:
                return  # whoever waits for something sees it, too

    def _leave(self) -> None:
        """Wait for node 0, which waits until all know."""
        self.hear("done", "done")
        self._set(f"left/{self.place.node}", "left")
        if self.place.node == 0:
            deadline = time.monotonic() + _LEAVE_S
            left = [f"left/{node}" for node in range(self.place.nodes)]
            while time.monotonic() < deadline and not self._store.check(left):
                time.sleep(_LOOK_S)

    def _tell(self, error: Exception) -> None:
        ours = isinstance(error, AdaptPrunerError)
        text = str(error) if ours else f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        name = f"node {self.place.node} of {self.place.nodes}"
        told = text if text.startswith("node ") else f"{name} has failed: {text}"
        try:
            number = self._store.add("failures", 1)
            self._store.set(f"failure/{number}", json.dumps({"node": self.place.node, "text": told}))
            if self.place.node == 0:
                time.sleep(2 * BEAT_S)  # the store ends with this node
        except RuntimeError:
            log.debug("node 0 is gone")

    def _cause_of(self, error: LostRankError) -> TrainingError:
        """Return why a rank has lost others: what another node tells, or that it says nothing any more."""
        deadline = time.monotonic() + SILENT_S + 4 * BEAT_S
        while time.monotonic() < deadline:
            try:
                self.check()
            except TrainingError as cause:
                self._tell(cause)
                return cause
            time.sleep(_LOOK_S)
        self._tell(error)
        return error

    def _wait_for(self, key: str) -> str:
        while (value := self._get(key)) is None:
            self.check()
            time.sleep(_LOOK_S)
        return value

    def _get(self, key: str) -> str | None:
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError:
            raise self._lost() from None

    def _count(self, key: str) -> int:
        try:
            return self._store.add(key, 0)
        except RuntimeError:
            raise self._lost() from None

    def _set(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError:
            raise self._lost() from None

    def _lost(self) -> TrainingError:
        return TrainingError(f"node 0 of {self.place.nodes} has ended, and with it all others. {_RESUMES}")


def newest_of_all(
    meeting: Meeting, states: "SavedStates", model: "PreTrainedModel", *, first_step: int
) -> "TrainingState | None":
    """Return the state that node 0 resumes from, on each node; see ``SavedStates.newest``."""
    first = meeting.place.node == 0
    found = states.newest(model, first_step=first_step) if first else None
    step = int(meeting.hear("state", str(found.progress.next_step if found else -1)))
    return found if first or step < 0 else states.fetch(step, model, first_step)
