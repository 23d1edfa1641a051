"""Perplexity of a causal language model on windows of tokens."""

import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.errors import CheckpointError, DataError
from core.evaluation.cache import AnswerCache
from core.evaluation.items import ItemResults, MetricItems, numbered
from core.evaluation.results import TaskAnswers
from core.model.decoder import final_states
from core.model.loss import loss_sum
from core.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def perplexity(model: "PreTrainedModel", windows: Tensor, *, batch_size: int) -> float:
    """Compute exp of the mean next-token negative log-likelihood; see ``measure_windows``.

    Returns:
        The perplexity, at least 1; infinite if the mean exceeds 709 nats.
    """
    return measure_windows(model, windows, batch_size=batch_size).metrics["perplexity"].over_all()


def measure_text(
    model: Callable[[], "PreTrainedModel"], file: Path, *, batch_size: int, cache: AnswerCache | None = None
) -> ItemResults:
    """Compute the negative log-likelihood of each window of a text; see ``measure_windows``.

    Args:
        model: Gives the model; it is called only if there is something to compute.
        file: What ``write_perplexity_windows`` has written.
        batch_size: Windows per forward pass.
        cache: Where results are looked up first, and kept.
    """
    from safetensors.torch import load_file

    columns = load_file(file)
    key = cache.key_of_text(columns) if cache else ""
    if cache and (kept := cache.find(key)) is not None:
        log.info("perplexity is known from before")
        return kept.items
    found = measure_windows(
        model(), columns["input_ids"], batch_size=batch_size, trained=columns.get("trained")
    )
    if cache:
        cache.keep(key, TaskAnswers(metrics={}, items=found))
    return found


def measure_windows(
    model: "PreTrainedModel", windows: Tensor, *, batch_size: int, trained: Tensor | None = None
) -> ItemResults:
    """Compute the negative log-likelihood of each window.

    Log-probabilities are float32, a chunk of positions at a time, and their sums are float64.

    Args:
        model: A causal language model; left in its mode (training or evaluation).
        windows: (S, T) integer token ids. Each window stands alone and gives T - 1 predictions.
        batch_size: Windows per forward pass.
        trained: (S, T), nonzero for the tokens to predict; None for all. The first of a window never is.

    Returns:
        The metric ``perplexity``, of each window.

    Raises:
        DataError: If there is no prediction to make, or a token is outside the vocabulary.
        CheckpointError: If the model's logits are not numbers.
    """
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    vocabulary = embedding.num_embeddings
    _check(windows, vocabulary)
    count, length = windows.shape
    counted = torch.ones(windows.shape, dtype=torch.uint8) if trained is None else trained
    was_training = model.training
    losses: list[float] = []
    model.eval()
    try:
        with Progress("perplexity", count, "windows") as progress, torch.no_grad():
            for batch, targets in zip(windows.split(batch_size), counted.split(batch_size), strict=True):
                tokens = batch.to(model.device, torch.long)
                rows = zip(
                    final_states(model, tokens).split(1), tokens.split(1), targets.split(1), strict=True
                )
                losses += [loss_sum(model, states, ids, trained=of_row) for states, ids, of_row in rows]
                progress.add(len(batch))
    finally:
        model.train(was_training)
    if math.isnan(sum(losses)):
        raise CheckpointError(
            "perplexity is not a number, because the model's logits are not. Check the checkpoint for NaN, "
            "or train with a lower training.learning_rate."
        )
    weights = tuple(counted[:, 1:].ne(0).sum(dim=1).double().tolist())
    metric = MetricItems(kind="perplexity", values=tuple(losses), weights=weights)
    log.info("perplexity %.4g on %d windows of %d tokens", metric.over_all(), count, length)
    asked = [windows.int().cpu()] if trained is None else [windows.int().cpu(), trained.byte().cpu()]
    contents = [b"".join(part.numpy().tobytes() for part in row) for row in zip(*asked, strict=True)]
    names = [hashlib.sha256(content).hexdigest()[:16] for content in contents]
    return ItemResults(items=numbered(names), metrics={"perplexity": metric})


def _check(windows: Tensor, vocabulary: int) -> None:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise DataError(
            f"perplexity needs at least one window of at least 2 tokens, not shape {tuple(windows.shape)}. "
            "Give evaluation.perplexity more text."
        )
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise DataError(
            f"a window holds token {high if high >= vocabulary else low}, but the model's vocabulary has "
            f"{vocabulary} tokens. Use the model's own tokenizer."
        )
