"""Rotary embeddings for llama.cpp: keys of the file, and a tensor of factors for Llama 3's."""

import math
from typing import Any

import gguf
import torch
from torch import Tensor

from core.errors import ExportError
from core.model.config import head_dim

FACTORS = "rope_freqs.weight"
_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the keys of the rotary embedding; raise an ``ExportError`` if llama.cpp cannot compute it."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ExportError(
            f"partial_rotary_factor={rope['partial_rotary_factor']}: llama.cpp rotates whole heads in this "
            "model. It cannot be exported."
        )
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        _check_yarn(rope)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif kind not in ("default", "llama3"):
        raise ExportError(
            f"rope_type={kind!r} cannot be written for llama.cpp; default, linear, yarn and llama3 can."
        )


def _check_yarn(rope: dict[str, Any]) -> None:
    """Refuse a YaRN with parameters that GGUF has no keys for."""
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(name):
            raise ExportError(f"rope_type='yarn' with {name} of its own cannot be written for llama.cpp.")
    changed = [name for name, usual in _YARN_BETAS.items() if (rope.get(name) or usual) != usual]
    if changed or rope.get("truncate") is False or not rope.get("factor"):
        name = changed[0] if changed else "truncate=false" if rope.get("factor") else "no factor"
        raise ExportError(f"rope_type='yarn' with {name} cannot be written for llama.cpp.")


def frequency_factors(config: Any, architecture: str) -> Tensor | None:
    """Return llama.cpp's (A/2,) float32 divisors of the rotary frequencies; None unless scaled as in Llama 3.

    A frequency whose wave is short against the context of the first training stays, a long one is divided by
    ``factor``, with a smooth transition in between.

    Raises:
        ExportError: If the architecture reads no such factors.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    if architecture not in ("llama", "deci"):
        raise ExportError(
            f"rope_type='llama3' cannot be written: llama.cpp's architecture {architecture} does not read it."
        )
    width, context = head_dim(config), rope["original_max_position_embeddings"]
    frequencies = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    waves_in_context = context * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((waves_in_context - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / rope["factor"] + kept)).float()
