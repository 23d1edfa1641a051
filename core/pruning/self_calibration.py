"""Self-calibration: text that a model writes itself beside that of a corpus (Williams et al., 2410.17170)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from core.data.packing import body_length, end_id, opening_ids
from core.model.decoder import empty_cache
from core.progress import Progress

_BETWEEN_DOCUMENTS = "<|endoftext|>"
"""What stands between documents in the training of many models, chat models whose texts end otherwise too."""


@torch.no_grad()
def write_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int,
    length: int,
    batch: int,
    seed: int,
    written: Tensor | None = None,
    keep: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Let a model write: each token is drawn from what it expects next, at temperature 1.

    A text may end and another begin within a sequence, as in packed rows. The draws do not depend on how many
    sequences are written at once.

    Args:
        model: Writes.
        tokenizer: The model's.
        sequences: S.
        length: T.
        batch: How many are written at once.
        seed: Of the draws.
        written: The first sequences, if another attempt has written them.
        keep: Gets the sequences so far, each time that more are written and some are left.

    Returns:
        (S, T) int64 token ids, in host memory. Each sequence opens as calibration texts do.

    Raises:
        DataError: If the sequences leave no room for text, or the tokenizer has no end-of-text token.
    """
    opening = opening_ids(tokenizer)
    start = torch.tensor(opening or [_between_documents(tokenizer)], device=model.device)
    chances = torch.rand(
        sequences,
        body_length(length, opening),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    written = torch.empty(0, length, dtype=torch.long) if written is None else written
    with Progress("text of the base model", sequences, "sequences", done=len(written)) as progress:
        while len(written) < sequences:
            part = chances[len(written) :][:batch].to(model.device)
            tokens, cache = start.expand(len(part), -1), empty_cache(model)
            for each in cache.values():
                _reserve(each, length)
            drawn = [tokens] if opening else []
            for chance in part.unbind(dim=1):
                logits = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **cache).logits
                tokens = _drawn(logits[:, -1], chance)
                drawn.append(tokens)
            written = torch.cat([written, torch.cat(drawn, dim=1).cpu()])
            progress.add(len(part))
            if keep is not None and len(written) < sequences:
                keep(written)
    return written


class _ReservedLayer(DynamicLayer):
    """Keys and values of a layer in arrays with room for all; the library copies them for each token."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._arrays: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add (B, H, T, D) keys and values; return all there are."""
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self._arrays = tuple(each.new_empty(*each.shape[:2], self._room, each.shape[3]) for each in new)
        known = self.get_seq_length()
        end = known + key_states.shape[2]
        for array, states in zip(self._arrays, new, strict=True):
            array[:, :, known:end] = states
        self.keys, self.values = (array[:, :, :end] for array in self._arrays)
        return self.keys, self.values


def _reserve(cache: DynamicCache, room: int) -> None:
    """Give the layers of an empty cache that keep every token room for so many."""
    cache.layers = [_ReservedLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]


def _between_documents(tokenizer: PreTrainedTokenizerBase) -> int:
    known = tokenizer.get_vocab().get(_BETWEEN_DOCUMENTS)
    return end_id(tokenizer) if known is None else int(known)


def _drawn(logits: Tensor, chance: Tensor) -> Tensor:
    """Return (B, 1) tokens: where the sum of what (B, V) logits expect passes a (B,) share of it."""
    sums = logits.double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(sums, chance[:, None] * sums[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
