"""Log-likelihoods of answers; the answers to a question share the question's forward pass.

The requests of a pass form a single sequence without padding: a context once, then all its continuations. The
attention mask lets each token see only its own context and its own continuation, and each continuation's
positions continue from the end of the context: to the model it is as if the others were not there. Logits are
computed only where they predict a continuation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PASS_TOKENS = {"cpu": 256}
_ACCELERATOR_PASS_TOKENS = 2048

_CONTEXT = -1  # in place of a continuation's number

Request = tuple[list[int], list[int]]
"""Token ids of a context and of the continuation whose log-likelihood is wanted; neither is empty."""


@dataclass(kw_only=True)
class _Pass:
    """A sequence for one forward pass: each list has one entry per token."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)
    continuations: list[int] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    predicting: list[list[int]] = field(default_factory=list)
    """For each request, the places in the sequence whose logits predict its continuation."""

    def append(self, tokens: Sequence[int], *, start: int, context: int, continuation: int) -> range:
        """Add tokens at the positions from ``start``; returns their places in the sequence."""
        before = len(self.tokens)
        self.tokens += tokens
        self.positions += range(start, start + len(tokens))
        self.contexts += [context] * len(tokens)
        self.continuations += [continuation] * len(tokens)
        return range(before, len(self.tokens))

    def mask(self) -> Tensor:
        """Return (T, T) bool: whether the token of the row sees that of the column."""
        contexts, continuations = torch.tensor(self.contexts), torch.tensor(self.continuations)
        same = continuations[:, None] == continuations
        shared = contexts[:, None] == contexts
        return (shared & (same | (continuations == _CONTEXT))).tril()


def can_share(model: "PreTrainedModel", requests: Sequence[Request]) -> bool:
    """Return whether the model supports such masks, and sees each request whole in every layer."""
    longest = max((len(context) + len(continuation) for context, continuation in requests), default=0)
    window = getattr(model.config, "sliding_window", None)
    implementation = model.config._attn_implementation
    return implementation in ("sdpa", "eager") and (window is None or longest <= window)


@torch.no_grad()
def log_likelihoods(
    model: "PreTrainedModel",
    requests: Sequence[Request],
    *,
    batch_size: int,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, float, bool]]:
    """Compute the log-likelihood of each continuation, given its context.

    Args:
        model: A causal language model that ``can_share``, in evaluation mode.
        requests: None is longer than the model can read.
        batch_size: Requests per forward pass.
        part: Of how many parts of the passes to compute which one.

    Yields:
        The request's number, the sum of its continuation's log-probabilities (float32), and whether each of
        its tokens is the likeliest. Requests with the same context follow each other.
    """
    limit = _PASS_TOKENS.get(model.device.type, _ACCELERATOR_PASS_TOKENS)
    for batch in islice(_passes(requests, batch_size, limit), part[0], None, part[1]):
        places = sorted({place for places in batch.predicting for place in places})
        rows = {place: row for row, place in enumerate(places)}
        logits = _logits(model, batch, places)
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        likeliest = log_probabilities.argmax(dim=-1)
        for number, predicting in zip(batch.requests, batch.predicting, strict=True):
            at = torch.tensor([rows[place] for place in predicting], device=logits.device)
            wanted = torch.tensor(requests[number][1], device=logits.device)
            score = log_probabilities[at].gather(1, wanted[:, None]).sum()
            yield number, float(score), bool((likeliest[at] == wanted).all())


def _logits(model: "PreTrainedModel", batch: _Pass, places: list[int]) -> Tensor:
    """Return (P, V) logits at P places of the sequence."""
    device = model.device
    mask = batch.mask().to(device)
    if model.config._attn_implementation == "eager":  # adds it to the scores
        mask = torch.zeros(mask.shape, device=device, dtype=model.dtype).masked_fill_(
            ~mask, torch.finfo(model.dtype).min
        )
    return model(
        torch.tensor([batch.tokens], device=device),
        attention_mask=mask[None, None],
        position_ids=torch.tensor([batch.positions], device=device),
        use_cache=False,
        logits_to_keep=torch.tensor(places, device=device),
    ).logits[0]


def _passes(requests: Sequence[Request], batch_size: int, limit: int) -> Iterator[_Pass]:
    """Split requests into passes of at most ``batch_size`` requests and, if over one, ``limit`` tokens."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(requests):
        groups.setdefault(tuple(context), []).append(number)
    batch = _Pass()
    for index, (shared, numbers) in enumerate(groups.items()):
        last: int | None = None  # where the context ends in this pass
        for number in numbers:
            # The last token predicts nothing of interest.
            continuation = requests[number][1][:-1]
            more = len(continuation) + (len(shared) if last is None else 0)
            if batch.requests and (len(batch.requests) == batch_size or len(batch.tokens) + more > limit):
                yield batch
                batch, last = _Pass(), None
            if last is None:
                last = batch.append(shared, start=0, context=index, continuation=_CONTEXT)[-1]
            own = batch.append(continuation, start=len(shared), context=index, continuation=number)
            batch.requests.append(number)
            batch.predicting.append([last, *own])
    if batch.requests:
        yield batch
