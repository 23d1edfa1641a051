"""A run's measurements as plain data: written by the steps, read by the report and the tables."""

import dataclasses
import functools
import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.errors import StorageError
from core.redaction import without_password
from core.untrusted import check_format

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT = 1
"""Of ``record.json``."""
ACCURACIES = ("acc_norm", "acc", "exact_match")
"""Metrics that stand for a task, the best one first."""
AVERAGE = "average"
"""The metric of a preset: the mean over its tasks, each counting once."""
CHANCE = "chance"
"""Beside the metrics of a task: what guessing gives."""


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Widths of one decoder layer."""

    query_heads: int
    """H."""
    kv_heads: int
    """K."""
    mlp_width: int
    """F."""


@dataclass(frozen=True, kw_only=True)
class DistillationRecord:
    """What the distillation of a phase cost and brought."""

    seconds: float
    """Time of all updates."""
    tokens: int
    """Tokens that it trained on, repetitions counted."""
    before: float
    """Divergence from the dense model on calibration texts that it does not train on, in nats a token."""
    after: float
    """The same when it is done."""


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """One phase, or the dense model as phase 0."""

    phase: int
    """0 is the dense model."""
    params: int
    """Parameters at the end of the phase; tied weights count once."""
    target_params: int
    """Parameters that the schedule asked for."""
    layers: tuple[LayerSizes, ...]
    """L entries."""
    importance: tuple[float, ...] = ()
    """L normalised layer importances in [-1, 1], as last measured in the phase; empty for phase 0."""
    sparsity: tuple[float, ...] = ()
    """L cumulative sparsities in [0, 1], shares of the dense layer's width; empty for phase 0."""
    perplexity_pruned: float | None = None
    """Perplexity after pruning, before recovery."""
    perplexity: float | None = None
    """Perplexity at the end of the phase."""
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    """Task to metric to value."""
    mask_s: float = 0.0
    """Seconds in which masks were learnt before the cut (``sheared-llama``); 0 if none were."""
    mask_tokens: int = 0
    """Tokens that they were learnt on, repetitions counted."""
    repair_s: float = 0.0
    """Seconds of the cut with its repair; 0 without one."""
    distillation: DistillationRecord | None = None
    """The distillation after it."""
    teacher_tokens: int = 0
    """Tokens that the teacher was trained on, before this phase; 0 in all but the first."""
    tokens: int = 0
    """Training tokens of this phase."""
    losses: tuple[tuple[int, float, float], ...] = ()
    """(global step, training loss, learning rate), in order."""
    held_out: tuple[tuple[int, float], ...] = ()
    """(global step, loss on the part of the mixture that is set aside), in order."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Step name to wall-clock seconds."""
    accelerators: dict[str, int] = field(default_factory=dict)
    """Step name to how many accelerators its last attempt took; older versions do not say."""

    @property
    def gpu_seconds(self) -> float | None:
        """Seconds of each step times the accelerators that it took, summed; None if that is not known."""
        if self.seconds.keys() - self.accelerators.keys():
            return None
        return sum(seconds * self.accelerators[step] for step, seconds in self.seconds.items())


@dataclass(frozen=True, kw_only=True)
class SpeedRecord:
    """How fast a checkpoint is in one runtime, measured side by side with its base."""

    runtime: str
    """``torch`` or ``llama.cpp``."""
    device: str
    """What it ran on: ``cpu``, ``cuda``, or what else llama.cpp was built for."""
    tokens_per_s: dict[str, tuple[float, float]]
    """Job (``decode 1``: kind and batch size) to the median rates of base and checkpoint."""
    speedups: dict[str, float]
    """Job to how many times faster the checkpoint is, the median over the rounds."""
    load_s: tuple[float, float]
    """Seconds from the files to a model that can run: base, checkpoint."""
    memory_bytes: tuple[int, int]
    """Peak memory of the model: base, checkpoint."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return dataclasses.asdict(self)

    def figures(self) -> dict[str, float]:
        """Return the ratios under the names that MLflow shows; above 1 is better for the checkpoint."""
        runtime = self.runtime.replace(".", "_")
        ratios = {f"speedup/{runtime}/{job.replace(' ', '_batch_')}": x for job, x in self.speedups.items()}
        ratios[f"speedup/{runtime}/load"] = self.load_s[0] / self.load_s[1]
        ratios[f"memory_saving/{runtime}"] = self.memory_bytes[0] / self.memory_bytes[1]
        return ratios


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run: what was asked for, what came out of every phase, and where it lies."""

    key: str
    """Run key."""
    name: str
    """The run's name in tables and in MLflow."""
    base: str
    """Base model."""
    revision: str = ""
    """Resolved revision of the base model."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings, as a recipe holds them."""
    chosen: dict[str, str] = field(default_factory=dict)
    """Section whose precision was ``auto`` to what its number format follows from."""
    phases: tuple[PhaseRecord, ...] = ()
    """Phase 0 (dense) first, then those that are done, in order."""
    checkpoint_uri: str = ""
    """The last phase's checkpoint."""
    tracking_uri: str = ""
    """MLflow tracking URI; empty without tracking."""
    tracking_run: str = ""
    """Id of the MLflow parent run; empty without tracking."""
    speed: tuple[SpeedRecord, ...] = ()
    """The result against the base model, in each runtime; empty if it was not measured."""

    @property
    def mask_tokens(self) -> int:
        """Tokens that masks were learnt on, in all phases."""
        return sum(phase.mask_tokens for phase in self.phases)

    @property
    def distilled_tokens(self) -> int:
        """Tokens of all distillations."""
        return sum(phase.distillation.tokens for phase in self.phases if phase.distillation)

    @property
    def teacher_tokens(self) -> int:
        """Tokens that the teacher was trained on before it taught."""
        return sum(phase.teacher_tokens for phase in self.phases)

    @property
    def trained(self) -> bool:
        """Whether any phase has trained."""
        return any(phase.tokens for phase in self.phases)

    @property
    def taught(self) -> bool:
        """Whether the base model taught in training."""
        return self.trained and self.settings.get("training", {}).get("teacher") == "base"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {"format": FORMAT} | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RunRecord":
        """Read what ``to_dict`` returned, also after a trip through JSON.

        Raises:
            StorageError: If an entry is missing, or of another type; if a later version wrote it.
        """
        check_format(data, FORMAT, "the record")
        from pydantic import ValidationError

        try:
            return _reader().validate_python(data)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:3]]
            raise StorageError(
                f"the record of a run of {data.get('base')} is not one that this version reads: "
                f"{'; '.join(wrong)}. Read it with the version that wrote it, or run its recipe again."
            ) from None


@functools.cache
def _reader() -> "TypeAdapter[RunRecord]":
    from pydantic import TypeAdapter

    return TypeAdapter(RunRecord)


def headline_metric(metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """Return the one metric that stands for a task in a table, and its value.

    Length-normalised accuracy where the task has it, else accuracy, exact match, perplexity (as in Table 6).
    """
    values = {name.split(",")[0]: value for name, value in metrics.items()}  # lm-eval: "acc_norm,none"
    for name in (best_accuracy(values), "word_perplexity", "perplexity"):
        if name in values:
            return name, values[name]
    return next(((name, value) for name, value in values.items() if not is_error(name)), None)


def best_accuracy(names: Iterable[str]) -> str:
    """Return the first of ``ACCURACIES`` among names of metrics, by the first filter; "" for none."""
    known = sorted(name for name in names if not is_error(name))
    return next((name for own in ACCURACIES for name in known if f"{name}_".startswith(f"{own}_")), "")


def standard_error(metrics: Mapping[str, float], metric: str) -> float | None:
    """Return the standard error of a metric; None if it is not known."""
    values = {name.split(",")[0]: value for name, value in metrics.items()}
    return values.get(_error_of(metric, values))


def is_error(name: str) -> bool:
    """Return whether a name is that of a metric's standard error, by any filter."""
    return re.search("_stderr(_|,|$)", name) is not None


def _error_of(metric: str, names: Container[str]) -> str:
    """Return the name of a metric's standard error: lm-eval puts it before the name of the filter."""
    head, filter_ = metric, ""
    while f"{head}_stderr{filter_}" not in names and "_" in head:
        head, _, more = head.rpartition("_")
        filter_ = f"_{more}{filter_}"
    return f"{head}_stderr{filter_}"


def score_text(metrics: Mapping[str, float], metric: str, *, unit: str = "", error: bool = True) -> str:
    """Write a share as percent, with ``unit`` and ± its standard error, and any other value as it is."""
    values = {name.split(",")[0]: value for name, value in metrics.items()}
    value, deviation = values.get(metric), standard_error(values, metric)
    if value is None:
        return "-"
    if not is_share(metric):
        return perplexity_text(value)
    return f"{100 * value:.1f}{unit}" + (f" ± {100 * deviation:.1f}" if error and deviation else "")


def chance_text(metrics: Mapping[str, float], before: str) -> str:
    """Write what guessing gives, after ``before``; "" where that is not known."""
    return f"{before}chance {100 * metrics[CHANCE]:.0f} %" if CHANCE in metrics else ""


def accuracies(phase: PhaseRecord) -> dict[str, float]:
    """Return the headline accuracy in [0, 1] of every task that has one; no preset, which averages tasks."""
    tasks = {task: metrics for task, metrics in phase.tasks.items() if AVERAGE not in metrics}
    best = {task: headline_metric(metrics) for task, metrics in tasks.items()}
    return {task: found[1] for task, found in best.items() if found is not None and is_accuracy(found[0])}


def is_accuracy(metric: str) -> bool:
    """Return whether a metric is a share of right answers: one of ``ACCURACIES``, by any filter."""
    return best_accuracy([metric]) == metric


def is_share(metric: str) -> bool:
    """Return whether a metric is a share, which is shown in percent."""
    return is_accuracy(metric) or metric in (AVERAGE, CHANCE)


def perplexity_text(value: float | None) -> str:
    """Write a perplexity with three or four digits: 24.1, 153, 4.2e+05; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "infinite"
    return f"{value:.2f}" if value < 99.995 else f"{value:.0f}" if value < 99_999.5 else f"{value:.1e}"


def public_path(path: str) -> str:
    """Return the public part of a path: the last part of an address or of a path from the root.

    Anything else, such as an id on the hub or ``package:NAME/path``, stays as it is.
    """
    if "://" in path or path.startswith(("/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", path):
        return re.split(r"[/\\]", path.rstrip("/\\"))[-1].partition("?")[0]
    return without_password(path)
