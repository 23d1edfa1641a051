"""Perplexity of a causal language model on windows of tokens."""

import logging
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import CheckpointError, DataError
from core.evaluation.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_BATCH_LOGITS = 2**28  # of one forward pass: 1 GiB in float32
_CHUNK_LOGITS = 2**24  # that are float32 at once: 64 MiB


def perplexity(
    model: "PreTrainedModel",
    windows: Tensor,
    *,
    batch_size: int,
    device: torch.device | str | None = None,
    precision: torch.dtype | None = None,
) -> float:
    """Compute exp of the mean next-token negative log-likelihood.

    The logits come from the model's own forward pass, not from its output embedding, because some families
    scale or cap them on the way. They stay in the model's number format; log-probabilities are float32, a
    slice of positions at a time, and their sum is float64.

    Args:
        model: A causal language model; left in the mode (training or not) that it came in.
        windows: (S, T) integer token ids. Each window stands alone and gives T - 1 predictions.
        batch_size: Windows a forward pass; fewer are taken where the logits would need over 1 GiB.
        device: Where the model is moved first; None leaves it where it is.
        precision: Arithmetic of the forward pass (autocast); None takes the weights' own.

    Returns:
        The perplexity, at least 1; infinite where the mean is over 709 nats.

    Raises:
        DataError: If there is no window, or no prediction in it, or a token is outside the vocabulary.
        CheckpointError: If the model's logits are not numbers.
    """
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    vocabulary = embedding.num_embeddings
    _check(windows, vocabulary)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]  # transformers wraps nn.Module.to without its types
    count, length = windows.shape
    rows = max(1, min(batch_size, _BATCH_LOGITS // (length * vocabulary)))
    progress = Progress("perplexity", count, "windows")
    was_training = model.training
    total = 0.0
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, precision, enabled=precision is not None):
            for batch in windows.split(rows):
                tokens = batch.to(model.device, torch.long)
                logits = model(input_ids=tokens, use_cache=False).logits
                total += sum(_negative_log_likelihood(*window) for window in zip(logits, tokens, strict=True))
                progress.add(len(batch))
    finally:
        progress.close()
        model.train(was_training)
    result = _exp(total / (count * (length - 1)))
    log.info("perplexity %.4g on %d windows of %d tokens", result, count, length)
    return result


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


def _negative_log_likelihood(logits: Tensor, tokens: Tensor) -> float:
    """Sum -log p of the tokens after the first.

    Args:
        logits: (T, V) logits in any float format; the last position predicts nothing.
        tokens: (T,) int64 token ids.
    """
    chunk = max(1, _CHUNK_LOGITS // logits.shape[1])
    total = 0.0
    for predictions, targets in zip(logits[:-1].split(chunk), tokens[1:].split(chunk), strict=True):
        losses = F.cross_entropy(predictions.float(), targets, reduction="none")
        total += losses.cpu().double().sum().item()
    return total


def _exp(mean: float) -> float:
    if math.isnan(mean):
        raise CheckpointError(
            "perplexity is not a number, because the model's logits are not. Check the checkpoint for NaN, "
            "or train with a lower training.learning_rate."
        )
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
