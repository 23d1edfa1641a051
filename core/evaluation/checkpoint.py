"""Benchmarks of a checkpoint's files, by one process or several."""

from functools import partial
from pathlib import Path

import torch

from core.errors import SettingsError
from core.evaluation.benchmarks import Asking, Model, answer_in_rank, measure_tasks
from core.evaluation.cache import AnswerCache
from core.evaluation.results import TaskAnswers, TaskResults
from core.machine.memory import free_unused
from core.model.build import dtype_of, load_model, load_tokenizer, pick_device
from core.model.checkpoint import Checkpoint
from core.settings.calibration import Precision
from core.settings.evaluation import EvaluationSettings
from core.training.parallel.launch import run_ranks


def measure_checkpoint(
    directory: Path,
    settings: EvaluationSettings,
    *,
    seed: int,
    cache: AnswerCache | None = None,
    model: "LoadedOnce | None" = None,
) -> TaskResults:
    """Evaluate a checkpoint on the benchmarks; several ranks give the numbers that one does.

    Args:
        directory: The checkpoint.
        settings: With a batch size, and a number format.
        seed: Of the choice of items.
        cache: Where results are looked up first, and kept.
        model: The checkpoint's, where others use it, too. Several ranks load their own: it is let go before.

    Raises:
        SettingsError: If there are fewer GPUs than ``settings.ranks``.
        DataError: If a task is unknown, or its data cannot be read or does not fit it.
        CheckpointError: If the model's logits are not numbers.
    """
    load = partial(load_measured, directory, settings.precision)
    size = number_of_ranks(settings)
    if size == 1:
        return measure_tasks(model or load, settings, seed=seed, cache=cache)
    if model is not None:
        model.let_go()

    def answer(asking: Asking) -> dict[str, TaskAnswers]:
        work = partial(answer_in_rank, size=size, load=load, asking=asking)
        return run_ranks(work, size, pick_device().type)

    return measure_tasks(load, settings, seed=seed, cache=cache, answer=answer)


class LoadedOnce:
    """A checkpoint's model and tokenizer, loaded when they are first asked for."""

    def __init__(self, directory: Path, precision: Precision) -> None:
        """Load nothing yet.

        Args:
            directory: The checkpoint.
            precision: Number format of the weights.
        """
        self._directory, self._precision = directory, precision
        self._loaded: Model | None = None

    def __call__(self) -> Model:
        """Return them."""
        if self._loaded is None:
            self._loaded = load_measured(self._directory, self._precision)
        return self._loaded

    def let_go(self) -> None:
        """Make room for another model; who asks again loads them again."""
        self._loaded = None
        free_unused()


def load_measured(directory: Path, precision: Precision) -> Model:
    """Load a checkpoint's model onto this process's device, and its tokenizer."""
    checkpoint = Checkpoint(directory)
    model = load_model(checkpoint, dtype=dtype_of(precision), device=pick_device())
    return model, load_tokenizer(checkpoint)


def number_of_ranks(settings: EvaluationSettings) -> int:
    """Return how many processes answer the benchmarks' questions, one a GPU where there are any.

    Raises:
        SettingsError: If there are fewer GPUs than ``settings.ranks``.
    """
    if pick_device().type != "cuda":
        return settings.ranks or 1
    gpus = torch.cuda.device_count()
    if settings.ranks > gpus:
        raise SettingsError(
            [
                f"evaluation.ranks={settings.ranks}, but the task has {gpus} GPUs. Request more with "
                f"cluster.components.evaluate.gpus={settings.ranks}, or leave ranks at 0: all there are."
            ]
        )
    return settings.ranks or gpus
