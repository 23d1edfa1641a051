"""The speed of two checkpoints side by side: prompt processing, decoding, loading, memory.

Each checkpoint has its own process; they take turns, so that other load on the machine slows both down alike,
and a ratio is the median of the rounds' ratios.
"""

import multiprocessing
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from core.errors import AdaptPrunerError, CheckpointError
from core.evaluation.speed.engines import LlamaCpp, Torch
from core.evaluation.speed.workload import Kind, Runtime, Workload
from core.progress import tracked
from core.runs.record import SpeedRecord


def compare(
    runtime: Runtime, base: Path, checkpoint: Path, workload: Workload, *, device: str = "cpu"
) -> SpeedRecord:
    """Measure two checkpoints side by side.

    Args:
        runtime: ``torch`` (folders) or ``llama.cpp`` (GGUF files).
        base: What the other is compared with.
        checkpoint: The model of interest.
        workload: What is timed.
        device: ``cpu`` or ``cuda``; llama.cpp then takes the accelerator it was built for, which is recorded.

    Raises:
        CheckpointError: If one of them cannot be loaded or run.
    """
    with ExitStack() as stack:
        first = stack.enter_context(_running(runtime, base, workload, device))
        second = stack.enter_context(_running(runtime, checkpoint, workload, device))
        seconds: dict[str, list[tuple[float, float]]] = {}
        for turn in tracked(range(workload.rounds + 1), f"{runtime} on {first.device}", "rounds"):
            for kind, batch in workload.jobs():
                took = time_pair(first, second, kind, batch, reverse=bool(turn % 2))
                if turn:  # the first round warms up
                    seconds.setdefault(f"{kind} {batch}", []).append(took)
        memory = (first.finish(), second.finish())
    tokens = {f"{kind} {batch}": workload.tokens(kind, batch) for kind, batch in workload.jobs()}
    return SpeedRecord(
        runtime=runtime,
        device=first.device,
        tokens_per_s={job: median_rates(pairs, tokens[job]) for job, pairs in seconds.items()},
        speedups={job: median_speedup(pairs) for job, pairs in seconds.items()},
        load_s=(first.load_s, second.load_s),
        memory_bytes=memory,
    )


def median_rates(pairs: Sequence[tuple[float, float]], tokens: int) -> tuple[float, float]:
    """Return the tokens a second of base and checkpoint from (base, checkpoint) seconds of each round."""
    base, checkpoint = (statistics.median(side) for side in zip(*pairs, strict=True))
    return tokens / base, tokens / checkpoint


def median_speedup(pairs: Sequence[tuple[float, float]]) -> float:
    """Return how many times faster the checkpoint is: the median of the rounds' own ratios.

    A round in which the machine is slow is slow for both, so its ratio is as good as any.
    """
    return statistics.median(base / checkpoint for base, checkpoint in pairs)


def time_pair(
    first: "_Model", second: "_Model", kind: Kind, batch: int, *, reverse: bool
) -> tuple[float, float]:
    """Return the seconds of both; ``reverse`` times the second one first, so that none always comes first."""
    if reverse:
        seconds = second.time(kind, batch)
        return first.time(kind, batch), seconds
    return first.time(kind, batch), second.time(kind, batch)


@dataclass
class _Model:
    """The parent's end of a process that holds a model."""

    path: Path
    connection: Connection
    load_s: float = 0.0
    device: str = ""

    def ask(self, *request: Any) -> Any:
        try:
            self.connection.send(request)
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise CheckpointError(
                f"{self.path}: the process that measured it ended. Check that two models fit into memory."
            ) from error
        if isinstance(answer, str):
            raise CheckpointError(f"{self.path} cannot be measured: {answer}")
        return answer

    def time(self, kind: Kind, batch: int) -> float:
        return float(self.ask(kind, batch))

    def finish(self) -> int:
        return int(self.ask("memory"))


@contextmanager
def _running(runtime: Runtime, path: Path, workload: Workload, device: str) -> Iterator[_Model]:
    context = multiprocessing.get_context("spawn")  # a fork would share memory, and so hide it
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, runtime, path, workload, device), daemon=True)
    process.start()
    there.close()
    model = _Model(path, here)
    try:
        model.load_s, model.device = model.ask("load")
        yield model
    finally:
        here.close()
        process.join(timeout=10)
        process.kill()


def _serve(connection: Connection, runtime: Runtime, path: Path, workload: Workload, device: str) -> None:
    """Answer the parent until it hangs up."""
    engine: Any = None
    while True:
        try:
            request = connection.recv()
        except EOFError:
            os._exit(0)  # without waiting for a server's threads
        try:
            if request[0] == "load":
                engine = (Torch if runtime == "torch" else LlamaCpp)(path, workload, device)
                connection.send((engine.load_s, engine.device))
            elif request[0] == "memory":
                connection.send(engine.peak_bytes())
            else:
                connection.send(engine.time(*request))
        except Exception as error:  # the parent raises it
            text = str(error) if isinstance(error, AdaptPrunerError) else f"{type(error).__name__} {error}"
            connection.send(" ".join(text.split())[:400])
