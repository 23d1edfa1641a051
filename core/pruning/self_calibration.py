"""Self-calibration: text that a model writes itself beside that of a corpus (Williams et al., 2410.17170)."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


def _between_documents(tokenizer: PreTrainedTokenizerBase) -> int:
    known = tokenizer.get_vocab().get(_BETWEEN_DOCUMENTS)
    return end_id(tokenizer) if known is None else int(known)


def _drawn(logits: Tensor, chance: Tensor) -> Tensor:
    """Return (B, 1) tokens: where the sum of what (B, V) logits expect passes a (B,) share of it."""
    sums = logits.double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(sums, chance[:, None] * sums[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
