"""Which llama.cpp architecture fits a checkpoint, and the tensors of its file.

From llama.cpp's sources (``src/models/*.cpp``): ``llama``, ``qwen2`` and ``qwen3`` take one size for all
layers; ``deci`` takes heads, KV heads and MLP width of each layer, with or without biases; ``openelm`` too,
with norms over queries and keys, and tied embeddings only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from core.errors import ExportError
from core.export.exported import refuse_sliced_export
from core.model.checkpoint import CheckpointReader
from core.model.config import head_dim
from core.model.shape import LayerShape

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_TURNS_NEIGHBOURS = ("llama", "deci")
"""Architectures whose rotary embedding rotates dimensions 2i and 2i+1 of a head, not i and i + A/2."""
_PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_READS_BIASES: dict[str, tuple[str, ...]] = {
    "llama": tuple(_PROJECTIONS),
    "deci": tuple(_PROJECTIONS),
    "qwen2": ("attn_q", "attn_k", "attn_v"),
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of the file."""

    name: str
    """Its name there."""
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    """Names and shapes of the tensors of the checkpoint whose rows it holds, one after the other."""
    heads: int = 0
    """Number of heads of its rows, if they are put in the order of neighbouring pairs; else 0."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in torch's order."""
        return (sum(shape[0] for _, shape in self.sources), *self.sources[0][1][1:])

    @property
    def params(self) -> int:
        """Number of its elements."""
        return prod(self.shape)

    def read(self, reader: CheckpointReader) -> Tensor:
        """Return the tensor of the file; raise an ``ExportError`` if weights and config do not fit."""
        tensors = []
        for name, shape in self.sources:
            tensors.append(reader.tensor(name))
            if tensors[-1].shape != shape:
                raise ExportError(
                    f"{name} is {tuple(tensors[-1].shape)} where config.json says {shape}. "
                    "Fetch the checkpoint again."
                )
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return neighbouring_pairs(tensor, self.heads) if self.heads else tensor


def neighbouring_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Make the two dimensions of a head that a rotary embedding rotates together adjacent.

    Args:
        tensor: (H*A, D) weight or (H*A,) bias of a query or key projection, which rotates dimensions i and
            i + A/2 of a head together.
        heads: H.

    Returns:
        The same shape; those two are 2i and 2i + 1.
    """
    pairs = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, pairs, -1).transpose(1, 2).reshape(tensor.shape)


def architecture_of(config: Any, layers: Sequence[LayerShape]) -> str:
    """Return the llama.cpp architecture for a model; raise an ``ExportError`` if none computes the same."""
    refuse_sliced_export(config, "GGUF")
    family, unequal = config.model_type, len(set(layers)) > 1
    if family not in _FAMILIES:
        raise ExportError(
            f"a {family} whose layers differ cannot be exported: no llama.cpp architecture reads sizes of "
            "each layer together with what this family computes. Llama, Mistral, Qwen2 and Qwen3 can."
            if unequal
            else f"model family {family!r} is not exported here; as its layers are equal, llama.cpp's own "
            "convert_hf_to_gguf.py reads it."
        )
    _check_layers(layers)
    if config.hidden_act != "silu":
        raise ExportError(
            f"hidden_act={config.hidden_act!r}: llama.cpp computes silu in this model. It cannot be exported."
        )
    _check_windows(config)
    if family == "qwen3":
        if unequal and not config.tie_word_embeddings:
            raise ExportError(
                "a Qwen3 whose layers differ and whose embeddings are not tied cannot be exported: llama.cpp "
                "has norms of queries together with sizes of each layer only in openelm, which has no output "
                "head. Export a model of equal layers, or one with tied embeddings."
            )
        return "openelm" if unequal else "qwen3"
    if family == "qwen2":
        # qwen2 assumes that all heads together are as wide as the hidden size.
        fits = layers[0].query_heads * head_dim(config) == config.hidden_size
        return "qwen2" if fits and not unequal else "deci"
    return "deci" if unequal else "llama"


def _check_layers(layers: Sequence[LayerShape]) -> None:
    for index, layer in enumerate(layers):
        if not (layer.query_heads and layer.kv_heads and layer.mlp_width):
            raise ExportError(
                f"layer {index} has no attention heads or no MLP channels; llama.cpp drops the rest of such "
                "a layer, or cannot read it. Keep one head and one channel a layer."
            )


def _check_windows(config: Any) -> None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds is not None else config.model_type == "mistral"
    if window and slides and window < config.max_position_embeddings:
        raise ExportError(
            f"sliding_window={window} is shorter than the context of {config.max_position_embeddings} "
            "tokens, but llama.cpp's architectures for this family attend to all: it cannot be exported."
        )


def parts_of(
    config: Any, layers: Sequence[LayerShape], architecture: str, names: Iterable[str]
) -> tuple[Part, ...]:
    """Return the tensors of the file in order, for a checkpoint with the tensors ``names``.

    Raises:
        ExportError: If the checkpoint has tensors that the architecture does not read, or lacks some.
    """
    present = set(names)
    hidden, vocabulary = config.hidden_size, config.vocab_size
    parts = [_whole("token_embd.weight", "model.embed_tokens.weight", vocabulary, hidden)]
    for index, layer in enumerate(layers):
        parts += _layer_parts(config, architecture, index, layer, present)
    parts.append(_whole("output_norm.weight", "model.norm.weight", hidden))
    if config.tie_word_embeddings:
        present.discard("lm_head.weight")
    else:
        parts.append(_whole("output.weight", "lm_head.weight", vocabulary, hidden))
    wanted = {source for part in parts for source, _ in part.sources}
    if wanted - present:
        raise ExportError(f"the checkpoint lacks {', '.join(sorted(wanted - present)[:3])}. Fetch it again.")
    if present - wanted:
        raise ExportError(
            f"llama.cpp's architecture {architecture} does not read "
            f"{', '.join(sorted(present - wanted)[:3])}: the file would compute something else."
        )
    return tuple(parts)


def _whole(name: str, source: str, *shape: int) -> Part:
    return Part(name=name, sources=((source, shape),))


def _layer_parts(
    config: Any, architecture: str, index: int, layer: LayerShape, present: set[str]
) -> list[Part]:
    hidden, width, ours = config.hidden_size, head_dim(config), f"model.layers.{index}."
    heads = {"attn_q": layer.query_heads, "attn_k": layer.kv_heads, "attn_v": layer.kv_heads}
    rows = {name: count * width for name, count in heads.items()}
    rows |= dict.fromkeys(("attn_output", "ffn_down"), hidden)
    rows |= dict.fromkeys(("ffn_gate", "ffn_up"), layer.mlp_width)
    columns = {"attn_output": layer.query_heads * width, "ffn_down": layer.mlp_width}
    prefix = f"blk.{index}."
    parts = [
        _whole(f"{prefix}{name}.weight", f"{ours}{norm}.weight", hidden) for name, norm in _NORMS.items()
    ]
    if architecture in ("qwen3", "openelm"):
        parts += [
            _whole(f"{prefix}{name}.weight", f"{ours}{norm}.weight", width)
            for name, norm in _HEAD_NORMS.items()
        ]
    for name, projection in _PROJECTIONS.items():
        turned = heads[name] if architecture in _TURNS_NEIGHBOURS and name in ("attn_q", "attn_k") else 0
        shapes = {"weight": (rows[name], columns.get(name, hidden)), "bias": (rows[name],)}
        for kind, shape in shapes.items():
            source = f"{ours}{projection}.{kind}"
            if kind == "weight" or (source in present and name in _READS_BIASES.get(architecture, ())):
                parts.append(Part(name=f"{prefix}{name}.{kind}", sources=((source, shape),), heads=turned))
    return _fused(parts, prefix) if architecture == "openelm" else parts


def _fused(parts: list[Part], prefix: str) -> list[Part]:
    """Put the projections to queries, keys and values into one tensor."""
    split = [part for part in parts if part.name in {f"{prefix}attn_{kind}.weight" for kind in "qkv"}]
    fused = Part(
        name=f"{prefix}attn_qkv.weight", sources=tuple(source for part in split for source in part.sources)
    )
    return [*(part for part in parts if part not in split), fused]
