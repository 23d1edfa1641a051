"""Perplexity of a causal language model on windows of tokens."""

import logging
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.errors import CheckpointError, DataError
from core.model.loss import final_states, loss_sum
from core.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def perplexity(model: "PreTrainedModel", windows: Tensor, *, batch_size: int) -> float:
    """Compute exp of the mean next-token negative log-likelihood.

    Log-probabilities are float32, a chunk of positions at a time, and their sum is float64.

    Args:
        model: A causal language model; left in its mode (training or evaluation).
        windows: (S, T) integer token ids. Each window stands alone and gives T - 1 predictions.
        batch_size: Windows per forward pass.

    Returns:
        The perplexity, at least 1; infinite if the mean exceeds 709 nats.

    Raises:
        DataError: If there is no prediction to make, or a token is outside the vocabulary.
        CheckpointError: If the model's logits are not numbers.
    """
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    vocabulary = embedding.num_embeddings
    _check(windows, vocabulary)
    count, length = windows.shape
    was_training = model.training
    total = 0.0
    model.eval()
    try:
        with Progress("perplexity", count, "windows") as progress, torch.no_grad():
            for batch in windows.split(batch_size):
                tokens = batch.to(model.device, torch.long)
                total += loss_sum(model, final_states(model, tokens), tokens)
                progress.add(len(batch))
    finally:
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
