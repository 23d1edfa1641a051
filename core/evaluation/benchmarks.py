"""Zero-shot benchmarks through lm-eval, on data from the hub or from files on this machine."""

import logging
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from core.errors import CheckpointError
from core.evaluation.likelihoods import Request, can_share, log_likelihoods
from core.evaluation.task_data import load_tasks
from core.model.loss import final_states, loss_sum
from core.progress import Progress
from core.settings.evaluation import EvaluationSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_SEED = 1234  # lm-eval's own for few-shot examples
_BOOTSTRAP_DRAWS = 1000  # for metrics whose standard error has no formula; accuracies have one


def evaluate_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: EvaluationSettings,
) -> dict[str, dict[str, float]]:
    """Evaluate a model in memory on lm-eval tasks.

    Log-likelihoods are computed as in lm-eval, with the softmax in float32. Python's, NumPy's and torch's
    random generators are seeded, because tasks may draw from them.

    Args:
        model: A causal language model; left in its mode (training or evaluation).
        tokenizer: The model's tokenizer.
        settings: Tasks, their data, number of items and batch size.

    Returns:
        Task name to metric name to value, such as ``{"arc_easy": {"acc": 0.49, "acc_stderr": 0.02, ...}}``. A
        group (``mmlu``) gives its average; a tag, or a group without an average, gives its members.

    Raises:
        DataError: If a task is unknown, or its data cannot be read or does not fit it.
        CheckpointError: If the model's logits are not numbers.
    """
    if not settings.tasks:
        return {}
    started = time.monotonic()
    was_training, pad_token = model.training, tokenizer.pad_token
    try:
        with _quiet(), TemporaryDirectory() as folder:
            loaded = load_tasks(settings, Path(folder))
            ready = time.monotonic()
            results = _run(model, tokenizer, list(loaded.values()), settings)
    finally:
        model.train(was_training)
        tokenizer.pad_token = pad_token  # lm-eval gives it one
    log.info("benchmarks: %.1f s to load, %.1f s to answer", ready - started, time.monotonic() - ready)
    return _select(results, loaded)


def _run(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    loaded: list[dict[str, Any]],
    settings: EvaluationSettings,
) -> dict[str, dict[str, Any]]:
    """Do what lm-eval's ``simple_evaluate`` does, except for describing the machine, which takes 1 s."""
    from lm_eval.evaluator import evaluate

    tasks = {name: task for part in loaded for name, task in part["tasks"].items()}
    groups = {name: group for part in loaded for name, group in part["groups"].items()}
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    language_model = _language_model()(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=settings.batch_size,
        softmax_dtype="float32",  # summed in bfloat16, log-likelihoods of answers tie
    )
    counter = _AnswerCounter(tasks.values())
    language_model.set_cache_hook(counter)
    try:
        results = evaluate(
            lm=language_model,
            task_dict={"tasks": tasks, "groups": groups},
            limit=settings.limit or None,
            bootstrap_iters=_BOOTSTRAP_DRAWS,
            log_samples=False,
        )
    finally:
        counter.close()
    assert results is not None  # only ranks above 0 get None, and this is one process
    return results["results"]


@cache
def _language_model() -> type:
    """Define the class, as importing lm-eval takes half a second."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class LanguageModel(HFLM):
        """lm-eval's Hugging Face model without progress bars, and with bounded memory for whole documents."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            return super().generate_until(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            # lm-eval's own would hold the logits of a window of the model's maximum length: tens of GB.
            found = []
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                found.append(sum(self._continuation(*make_disjoint_window(window)) for window in windows))
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
            return found

        def _continuation(self, context: list[int], continuation: list[int]) -> float:
            ids = torch.tensor([context + continuation], device=self.device)
            with torch.no_grad():
                states = final_states(self.model, ids[:, :-1])
                states = torch.cat([states, states[:, -1:]], dim=1)  # the last token predicts nothing
                first = len(context) - 1
                return -loss_sum(self.model, states[:, first:], ids[:, first:])

        def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[Any]:
            wanted = [_fitting(request[1], request[2], self.max_length) for request in requests]
            if not can_share(self.model, wanted):
                return super()._loglikelihood_tokens(requests, **{**options, "disable_tqdm": True})
            answers: list[Any] = [None] * len(requests)
            for number, *answer in log_likelihoods(self.model, wanted, batch_size=self.batch_size):
                answers[number] = tuple(answer)
                if (asked := requests[number][0]) is not None:  # None: a window of a whole document
                    self.cache_hook.add_partial("loglikelihood", asked, answers[number])
            return answers

    return LanguageModel


def _fitting(context: list[int], continuation: list[int], max_length: int) -> Request:
    """Cut a context from the left, as lm-eval does, so that both fit into the model's window."""
    assert 0 < len(continuation) <= max_length, "lm-eval requires it, too"
    return context[-(max_length + 1 - len(continuation)) :], continuation


class _AnswerCounter:
    """Takes the place of lm-eval's cache of answers, and so sees each one."""

    def __init__(self, tasks: Iterable[Any]) -> None:
        self._tasks = tasks
        self._progress: Progress | None = None

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        score = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(score, float) and math.isnan(score):  # lm-eval would accept it as an answer
            raise CheckpointError(
                "the benchmarks' log-likelihoods are not numbers, because the model's logits are not. Check "
                "the checkpoint for NaN, or train with a lower training.learning_rate."
            )
        if self._progress is None:  # lm-eval has built all requests only now
            self._progress = Progress("benchmarks", sum(len(t.instances) for t in self._tasks), "answers")
        self._progress.add()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()


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


def _select(
    results: Mapping[str, Mapping[str, Any]], loaded: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Keep the figures of the requested tasks, and drop the filter ``none`` from the metrics' names."""
    selected = {}
    for name, part in loaded.items():
        averaged = name in part["groups"] and part["groups"][name].has_aggregation
        for member in [name] if averaged else part["tasks"]:
            selected[member] = {
                metric if kind == "none" else f"{metric}_{kind}": float(value)
                for key, value in results[member].items()
                for metric, comma, kind in [key.partition(",")]
                if comma and isinstance(value, int | float)
            }
    return selected
