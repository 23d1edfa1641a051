"""Passes of a decoder: hidden states of rows that may hold several documents, and token after token."""

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from core.machine.memory import sent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLASH = "flash_attention_2"
"""What transformers calls the attention of the package flash-attn."""


class Documents(NamedTuple):
    """The documents in packed rows, each of which sees itself alone."""

    positions: Tensor
    """(B, T) int64; a document begins wherever they start again from 0."""
    edges: Tensor
    """(N + 1,) int32: where each of the N documents begins in the B * T tokens, and their number."""

    def to(self, device: torch.device) -> "Documents":
        """Return them on a device; a copy to an accelerator takes no time of the host."""
        return Documents(*(sent(tensor, device) for tensor in self))


def final_states(model: "PreTrainedModel", ids: Tensor, documents: Documents | None = None) -> Tensor:
    """Return the (B, T, D) hidden states that the output head reads.

    Args:
        model: Its decoder is used.
        ids: (B, T) token ids.
        documents: Those in the rows, on the model's device; None for one document a row.
    """
    about: dict[str, Any] = {}
    if documents is not None:
        # Without an attention mask and a cache, transformers makes a mask from such positions, which sliding
        # windows are part of. Its flash attention does so for a single row only, and is told the edges.
        about["position_ids"] = documents.positions
        if model.config._attn_implementation == FLASH:
            about |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), documents.edges)
            about |= dict.fromkeys(("max_length_q", "max_length_k"), ids.shape[1])  # at most
    states = model.get_decoder()(input_ids=ids, use_cache=False, **about).last_hidden_state
    assert isinstance(states, Tensor)
    return states


def empty_cache(model: "PreTrainedModel") -> dict[str, Any]:
    """Return the argument by which passes hand on keys and values: each adds those of its tokens."""
    from transformers import DynamicCache

    arguments = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in arguments else "past_key_values"  # until transformers 5.23
    return {name: DynamicCache(config=model.config)}
