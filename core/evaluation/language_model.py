"""lm-eval's view of a model in memory: faster, with bounded memory, and shared out over processes.

Every process has the same model and asks the same questions. It computes its part of the answers, a whole
forward pass at a time, and gets the others' from the others: the passes are those of a single process, and so
is each answer.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from core.errors import CheckpointError
from core.evaluation.likelihoods import Request, can_share, log_likelihoods
from core.model.decoder import final_states
from core.model.loss import loss_sum
from core.progress import Progress
from core.training.parallel.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


def language_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    batch_size: int,
    stride: int = 0,
    ranks: Ranks = ALONE,
) -> Any:
    """Wrap a model for lm-eval; the softmax is in float32.

    Args:
        model: A causal language model.
        tokenizer: The model's.
        batch_size: Requests a forward pass.
        stride: Tokens of a whole document that each window predicts, the others being context; 0 as lm-eval
            does: windows follow each other.
        ranks: This process among those that share the work.
    """
    wrapped = _class()(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        softmax_dtype="float32",  # summed in bfloat16, log-likelihoods of answers tie
    )
    wrapped.stride, wrapped.ranks = stride, ranks
    return wrapped


@cache
def _class() -> type:
    """Define the class, as importing lm-eval takes half a second."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class LanguageModel(HFLM):
        """lm-eval's Hugging Face model, without progress bars."""

        stride: int
        ranks: Ranks

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            generate = super().generate_until
            if self.ranks.size == 1:
                return generate(requests, disable_tqdm=True)
            # As lm-eval sorts and cuts them, so that each is in the batch that it would be in.
            lengths = [len(self.tok_encode(request.args[0])) for request in requests]
            order = sorted(range(len(requests)), key=lambda n: (-lengths[n], requests[n].args[0]))
            kinds = dict[str, list[int]]()
            for number in order:
                kinds.setdefault(repr(requests[number].args[1]), []).append(number)
            size = self.batch_size
            batches = [kind[at : at + size] for kind in kinds.values() for at in range(0, len(kind), size)]

            def generated(batch: list[int]) -> list[tuple[int, str]]:
                texts = generate([requests[number] for number in batch], disable_tqdm=True)
                return list(zip(batch, texts, strict=True))

            answers = dict(pair for batch in _shared(batches, generated, self.ranks) for pair in batch)
            return [answers[number] for number in range(len(requests))]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            # lm-eval's own would hold the logits of a window of the model's maximum length: tens of GB.
            windows = [
                (number, *make_disjoint_window(window))
                for number, (text,) in enumerate(request.args for request in requests)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=max(1, self.max_length - self.stride + 1) if self.stride else 1,
                )
            ]
            scores = _shared(windows, lambda window: self._continuation(*window[1:]), self.ranks)
            found = [0.0] * len(requests)
            for (number, *_), score in zip(windows, scores, strict=True):
                found[number] += score
            for request, score in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
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
                answer = super()._loglikelihood_tokens
                size = self.batch_size
                batches = [requests[at : at + size] for at in range(0, len(requests), size)]
                if self.ranks.size == 1:
                    batches = [requests]
                found = _shared(
                    batches, lambda batch: answer(batch, **{**options, "disable_tqdm": True}), self.ranks
                )
                return [each for batch in found for each in batch]
            answers: list[Any] = [None] * len(requests)
            mine = log_likelihoods(
                self.model,
                wanted,
                batch_size=self.batch_size,
                part=(self.ranks.rank, self.ranks.size),
            )
            for number, *answer in mine:
                answers[number] = tuple(answer)
                if (asked := requests[number][0]) is not None:  # None: a window of a whole document
                    self.cache_hook.add_partial("loglikelihood", asked, answers[number])
            if self.ranks.size > 1:
                parts: list[Any] = [None] * self.ranks.size
                dist.all_gather_object(parts, answers)
                answers = [next(filter(None, of_all)) for of_all in zip(*parts, strict=True)]
            return answers

    return LanguageModel


def _shared(work: Sequence[Any], do: Callable[[Any], T], ranks: Ranks) -> list[T]:
    """Do every piece of work on one of the ranks; returns the results in order, on each of them."""
    mine = [do(piece) for piece in work[ranks.rank :: ranks.size]]
    if ranks.size == 1:
        return mine
    parts: list[Any] = [None] * ranks.size
    dist.all_gather_object(parts, mine)
    return [parts[number % ranks.size][number // ranks.size] for number in range(len(work))]


def _fitting(context: list[int], continuation: list[int], max_length: int) -> Request:
    """Cut a context from the left, as lm-eval does, so that both fit into the model's window."""
    assert 0 < len(continuation) <= max_length, "lm-eval requires it, too"
    return context[-(max_length + 1 - len(continuation)) :], continuation


class AnswerCounter:
    """Takes the place of lm-eval's cache of answers, and so sees each one.

    Attributes:
        task: lm-eval's task that is being answered.
    """

    task: Any

    def __init__(self, items: int, ranks: Ranks) -> None:
        """Count the items of all tasks, of which each rank answers its part."""
        self._ranks = ranks
        self._progress = Progress("benchmarks", items, "items")
        self._answers = self._items = 0

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """See an answer.

        Raises:
            CheckpointError: If it is not a number.
        """
        score = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(score, float) and math.isnan(score):  # lm-eval would accept it as an answer
            raise CheckpointError(
                "the benchmarks' log-likelihoods are not numbers, because the model's logits are not. Check "
                "the checkpoint for NaN, or train with a lower training.learning_rate."
            )
        self._answers += 1
        share = min(1.0, self._answers * self._ranks.size / len(self.task.instances))
        self._count(int(share * len(self.task.eval_docs)))

    def end_task(self) -> None:
        """Count what is left of the task, of which a rank may answer less than its part."""
        self._count(len(self.task.eval_docs))
        self._answers = self._items = 0

    def close(self) -> None:
        """End the progress."""
        self._progress.close()

    def _count(self, items: int) -> None:
        if items > self._items:
            self._progress.add(items - self._items)
            self._items = items
