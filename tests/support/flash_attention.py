"""The package flash-attn, as far as training calls it, computed by a loop: it runs on GPUs alone.

The parameters are those of flash-attn 2.8. It takes float64 too, for comparisons, and nothing that training
has no use for.
"""

import itertools
import sys
from types import ModuleType

import torch
from transformers import PreTrainedModel, modeling_flash_attention_utils


@torch.compiler.disable
def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention of (tokens, heads, head size), each stretch between two edges by itself."""
    assert q.ndim == k.ndim == v.ndim == 3
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    edges = cu_seqlens_q.tolist()
    assert edges[0] == 0
    assert edges[-1] == len(q) == len(k)
    assert isinstance(max_seqlen_q, int)
    assert max_seqlen_q == max_seqlen_k
    assert (causal, dropout_p, alibi_slopes, block_table) == (True, 0.0, None, None)
    parts = []
    for first, last in itertools.pairwise(edges):
        assert 0 < last - first <= max_seqlen_q
        part = slice(first, last)
        parts.append(_attention(q[part], k[part], v[part], softmax_scale, window_size, softcap))
    return torch.cat(parts)


def flash_attn_func(q, k, v, **options):
    """Attention of (rows, tokens, heads, head size), each row by itself."""
    rows, length = q.shape[:2]
    edges = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    flat = (part.flatten(0, 1) for part in (q, k, v))
    return flash_attn_varlen_func(*flat, edges, edges, length, length, **options).view(q.shape)


def _attention(q, k, v, scale, window, softcap):
    q, k, v = (part.transpose(0, 1) for part in (q, k, v))
    k, v = (part.repeat_interleave(len(q) // len(k), dim=0) for part in (k, v))
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    back = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    unseen = (back < 0) if window[0] < 0 else (back < 0) | (back > window[0])
    return (scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def install(monkeypatch):
    """Let transformers find it, on a CPU too."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = padding.pad_input = padding.unpad_input = None
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda **_: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
