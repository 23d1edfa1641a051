"""The number format that ``precision: auto`` selects: the one a machine computes faster in.

Accelerators use bfloat16 if they compute in it natively. A CPU's instruction set does not decide it: some
CPUs with bfloat16 instructions are faster in float32. So a CPU is measured, for less than a second.

float16 is never chosen: it ends at 65,504, which activations of some models exceed, and training in it needs
loss scaling.
"""

import dataclasses
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from core.settings.calibration import CalibrationSettings
from core.settings.evaluation import EvaluationSettings
from core.settings.training import TrainingSettings

Precision = Literal["float32", "bfloat16"]
Section = TypeVar("Section", CalibrationSettings, TrainingSettings, EvaluationSettings)

SECTIONS = ("calibration", "training", "evaluation")
"""The sections of a recipe with their own precision."""

CLEARLY_FASTER = 1.2
"""Speedup over float32 at which bfloat16 is worth its rounding."""

_HIDDEN, _WIDTH = 576, 1536  # of SmolLM2-135M, the smallest model that this is for
_PROBE_ROWS, _LEAST_ROWS, _MOST_ROWS = 16, 32, 1024
_ROUND_S, _BUDGET_S = 0.05, 0.6
_BEYOND_DOUBT = 3.0  # a ratio this large needs no second measurement

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A number format, and why it was chosen."""

    precision: Precision
    """The format."""
    device: str
    """The device it was chosen for."""
    gflop_per_s: dict[str, float] = field(default_factory=dict)
    """Format to its measured rate; empty if not measured."""

    def __str__(self) -> str:
        """Return the text for a report."""
        if not self.gflop_per_s:
            return f"auto, for {self.device}"
        rates = " and ".join(f"{rate:.1f} GFLOP/s in {name}" for name, rate in self.gflop_per_s.items())
        return f"auto, for {self.device}: {rates}"


ACCELERATORS = Choice(precision="bfloat16", device="the accelerators of the cluster")
"""The format of tasks that get accelerators, which are not examined."""


def choose_precision(device: torch.device) -> Choice:
    """Return the format that a device computes faster in; float32 if in doubt."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if has_native_bfloat16():
            return Choice(precision="bfloat16", device=f"{name}, which computes in it natively")
        return Choice(precision="float32", device=f"{name}, which has no bfloat16 of its own")
    if device.type != "cpu":
        return Choice(precision="float32", device=device.type)
    rates = cpu_rates()
    faster = rates["bfloat16"] >= CLEARLY_FASTER * rates["float32"]
    precision: Precision = "bfloat16" if faster else "float32"
    return Choice(precision=precision, device=f"one thread of {_cpu_name()}", gflop_per_s=rates)


def resolved(settings: Section, choose: Callable[[], Choice]) -> Section:
    """Return settings whose precision is not ``auto``; ``choose`` is called if it is."""
    if settings.precision != "auto":
        return settings
    choice = choose()
    log.info("%s, %s", choice.precision, choice)
    return dataclasses.replace(settings, precision=choice.precision)


def has_native_bfloat16() -> bool:
    """Return whether the current GPU computes in bfloat16 itself, rather than in float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def warn_if_emulated(section: str, precision: str, device: torch.device) -> None:
    """Log a warning if a task computes in bfloat16 on a GPU that emulates it."""
    if precision == "bfloat16" and device.type == "cuda" and not has_native_bfloat16():
        log.warning(
            "%s.precision=bfloat16, but %s emulates bfloat16, which is slow. Set %s.precision to "
            "float32, which makes it another run.",
            section,
            torch.cuda.get_device_name(device),
            section,
        )


def cpu_rates(budget_s: float = _BUDGET_S) -> dict[str, float]:
    """Measure the rate of one thread in each format: the best of several rounds, in turn.

    A round is one forward and one backward pass of a gated MLP of ordinary sizes, with as many rows as take
    about 50 ms in float32. A first measurement with few rows finds that number and settles clear cases: with
    emulated bfloat16, more would take long. The thread's own CPU time counts, so other load hardly matters.

    Args:
        budget_s: Seconds after which no more rounds begin.

    Returns:
        Format to GFLOP/s.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _rates_of_this_thread(time.monotonic() + budget_s)
    finally:
        torch.set_num_threads(threads)


def _rates_of_this_thread(ended: float) -> dict[str, float]:
    passes = {name: _mlp_pass(getattr(torch, name)) for name in ("float32", "bfloat16")}
    for run in passes.values():
        run(_PROBE_ROWS)  # the first call prepares kernels
    rates = {name: run(_PROBE_ROWS) for name, run in passes.items()}
    if rates["float32"] > _BEYOND_DOUBT * rates["bfloat16"]:
        return rates
    rows = int(_ROUND_S * rates["float32"] * 1e9 / _flop(1))
    rows = min(max(rows, _LEAST_ROWS), _MOST_ROWS)
    rates = dict.fromkeys(passes, 0.0)
    while True:
        for name, run in passes.items():
            rates[name] = max(rates[name], run(rows))
        if time.monotonic() >= ended:
            return rates


def _mlp_pass(dtype: torch.dtype) -> Callable[[int], float]:
    """Return a function that runs a number of rows through an MLP and back, and returns the GFLOP/s."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> nn.Parameter:
        return nn.Parameter((torch.randn(shape, generator=generator) * 0.03).to(dtype))

    gate, up, down = weight(_WIDTH, _HIDDEN), weight(_WIDTH, _HIDDEN), weight(_HIDDEN, _WIDTH)
    inputs = torch.randn(_MOST_ROWS, _HIDDEN, generator=generator).to(dtype)

    def run(rows: int) -> float:
        x: Tensor = inputs[:rows].detach().requires_grad_()
        started = time.thread_time()
        with torch.enable_grad():
            output = (silu(x @ gate.T) * (x @ up.T)) @ down.T
            torch.autograd.grad(output.sum(), (x, gate, up, down))
        return _flop(rows) / (time.thread_time() - started) / 1e9

    return run


def _flop(rows: int) -> int:
    """Return the operations of a pass: per weight and row two forward, four backward."""
    return 6 * 3 * _HIDDEN * _WIDTH * rows


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0].isprintable() and names[0] else platform.machine()
