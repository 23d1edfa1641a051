"""Benchmarks through lm-eval, on data from the hub or from files on this machine."""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from core.evaluation.cache import AnswerCache
from core.evaluation.items import Items
from core.evaluation.language_model import AnswerCounter, language_model
from core.evaluation.results import TaskAnswers, TaskResults, answers_of, collect_results
from core.evaluation.task_data import load_tasks
from core.scratch import scratch_folder
from core.settings.evaluation import EvaluationSettings
from core.settings.presets import PRESETS
from core.training.parallel.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_SEED = 1234  # lm-eval's own for few-shot examples
_BOOTSTRAP_DRAWS = 1000  # for metrics whose standard error has no formula; accuracies have one

Model = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Tasks that are to be answered; a rank gets it from another process."""

    settings: EvaluationSettings
    """Tasks, their data, number of items and batch size."""
    seed: int
    """Of the choice of items."""
    keys: Mapping[str, str]
    """The lm-eval tasks whose answers are not known, in order, to what they are kept under."""
    cache: AnswerCache | None = None
    """Where the answers to a task are kept as soon as all of them are there."""

    def keep(self, task: str, answers: TaskAnswers) -> None:
        """Keep the answers to a task."""
        if self.cache is not None:
            self.cache.keep(self.keys[task], answers)


Answer = Callable[[Asking], dict[str, TaskAnswers]]
"""Answers tasks, here or in other processes."""


def evaluate_tasks(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", settings: EvaluationSettings
) -> dict[str, dict[str, float]]:
    """Evaluate a model in memory on lm-eval tasks; see ``measure_tasks``."""
    return measure_tasks(lambda: (model, tokenizer), settings).figures


def measure_tasks(
    model: Callable[[], Model],
    settings: EvaluationSettings,
    *,
    seed: int = 0,
    cache: AnswerCache | None = None,
    answer: Answer | None = None,
) -> TaskResults:
    """Evaluate a model on lm-eval tasks, one after the other; what was answered before it is killed is kept.

    Log-likelihoods are computed as in lm-eval, with the softmax in float32. Python's, NumPy's and torch's
    random generators are seeded, because tasks may draw from them.

    Args:
        model: Gives a causal language model, which is left in its mode (training or evaluation), and its
            tokenizer. It is called only if there is something to answer.
        settings: Tasks, their data, number of items and batch size.
        seed: Of the choice of items where ``settings.limit`` asks for fewer than there are.
        cache: Where results are looked up first, and kept.
        answer: Takes the place of ``model``.

    Raises:
        DataError: If a task is unknown, or its data cannot be read or does not fit it.
        CheckpointError: If the model's logits are not numbers.
    """
    if not settings.tasks:
        return TaskResults(figures={}, items=Items())
    started = time.monotonic()
    with _quiet(), scratch_folder() as folder:
        loaded = _load(settings, seed, folder)
        tasks = {name: task for part in loaded.values() for name, task in part["tasks"].items()}
        keys = {
            name: cache.key(task, stride=settings.stride) if cache else "" for name, task in tasks.items()
        }
        found = {name: cache.find(key) for name, key in keys.items()} if cache else {}
        answers = {name: kept for name, kept in found.items() if kept is not None}
        if answers:
            log.info("benchmarks: %d of %d tasks are known from before", len(answers), len(tasks))
        ready = time.monotonic()
        if wanted := {name: key for name, key in keys.items() if name not in answers}:
            asking = Asking(settings=settings, seed=seed, keys=wanted, cache=cache)
            answers |= _answer(*model(), tasks, asking) if answer is None else answer(asking)
            log.info(
                "benchmarks: %.1f s to load, %.1f s to answer", ready - started, time.monotonic() - ready
            )
        return collect_results(loaded, answers, [task for task in settings.tasks if task in PRESETS])


def answer_in_rank(
    rank: int, *, size: int, load: Callable[[], Model], asking: Asking
) -> dict[str, TaskAnswers]:
    """Answer tasks as one of several processes, which have a process group.

    Args:
        rank: This one.
        size: How many there are.
        load: Gives the model, on this rank's device, and its tokenizer.
        asking: What is to be answered.

    Returns:
        All answers, the same on each rank.
    """
    with _quiet(), scratch_folder() as folder:
        loaded = _load(asking.settings, asking.seed, folder)
        tasks = {name: task for part in loaded.values() for name, task in part["tasks"].items()}
        return _answer(*load(), tasks, asking, Ranks(rank=rank, size=size))


def _load(settings: EvaluationSettings, seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Load the tasks and choose their items."""
    loaded = load_tasks(settings, folder)
    for part in loaded.values():
        for name, task in part["tasks"].items():
            task.set_fewshot_seed(seed=_SEED)
            _choose_items(task, chosen_items(name, len(task.task_docs), limit=settings.limit, seed=seed))
    return loaded


def chosen_items(task: str, count: int, *, limit: int, seed: int) -> list[int]:
    """Choose items of a task at random; of a lower limit, some of those of a higher one.

    Args:
        task: Its name: each task draws its own.
        count: How many there are.
        limit: How many are wanted; 0 for all.
        seed: Of the choice.

    Returns:
        Their numbers in ascending order.
    """
    numbers = list(range(count))
    if not limit or limit >= count:
        return numbers
    random.Random(f"{seed} {task}").shuffle(numbers)
    return sorted(numbers[:limit])


def _choose_items(task: Any, numbers: list[int]) -> None:
    """Let a task evaluate these items alone, prepared once: lm-eval asks for them again and again."""
    docs = task.task_docs
    chosen = docs.select(numbers) if hasattr(docs, "select") else [docs[number] for number in numbers]
    setattr(task, "test_docs" if task.has_test_docs() else "validation_docs", lambda: chosen)


def _answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Mapping[str, Any],
    asking: Asking,
    ranks: Ranks = ALONE,
) -> dict[str, TaskAnswers]:
    """Do what lm-eval's ``simple_evaluate`` does, except for describing the machine, which takes 1 s."""
    from lm_eval.evaluator import evaluate

    settings, found = asking.settings, dict[str, TaskAnswers]()
    was_training, pad_token = model.training, tokenizer.pad_token
    counter = AnswerCounter(sum(len(tasks[name].eval_docs) for name in asking.keys), ranks)
    try:
        wrapped = language_model(
            model, tokenizer, batch_size=settings.batch_size, stride=settings.stride, ranks=ranks
        )
        wrapped.set_cache_hook(counter)
        for name in asking.keys:
            task = counter.task = tasks[name]
            random.seed(_SEED)
            np.random.seed(_SEED)
            torch.manual_seed(_SEED)
            results = evaluate(
                lm=wrapped,
                task_dict={"tasks": {name: task}, "groups": {}},
                bootstrap_iters=_BOOTSTRAP_DRAWS,
                log_samples=True,
            )
            assert results is not None  # only what lm-eval takes for ranks above 0 gets None
            found[name] = answers_of(task, results["results"][name], results["samples"][name])
            counter.end_task()
            if ranks.rank == 0:
                asking.keep(name, found[name])
    finally:
        counter.close()
        model.train(was_training)
        tokenizer.pad_token = pad_token  # lm-eval gives it one
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's log and progress bars off the terminal."""
    import datasets
    import lm_eval.api.task

    logger, module = logging.getLogger("lm_eval"), lm_eval.api.task
    level, bar = logger.level, getattr(module, "tqdm", None)
    logger.setLevel(logging.ERROR)
    module.tqdm = lambda items, **options: items  # a bar per task that no option turns off
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        module.tqdm = bar
