"""The number of sequences that pass through a layer at a time."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from core.machine.memory import available_bytes
from core.model.config import head_dim, layer_shapes

_MOST_TOKENS = {"cpu": 2048, "cuda": 16384}
"""More tokens at a time are not faster."""


def fitting_micro_batch(
    config: PreTrainedConfig,
    shape: Sequence[int],
    *,
    device: torch.device,
    free_bytes: int | None = None,
) -> int:
    """Choose the micro-batch for scoring a model, within a quarter of the free memory.

    Args:
        config: The model's config.
        shape: (S, T) of the calibration set; micro-batches are of even size.
        device: Where layers run.
        free_bytes: Memory that is free there; None looks.

    Returns:
        Sequences per micro-batch, at least 1.
    """
    free = available_bytes(device) if free_bytes is None else free_bytes
    sequences, length = shape
    layers = layer_shapes(config)
    heads, width = max(layer.query_heads for layer in layers), max(layer.mlp_width for layer in layers)
    # Kept by autograd for one layer, plus its backward pass, in float32: hidden states around norms and
    # residuals, the projections' outputs twice, the attention weights if there is no fused kernel.
    a_token = 4 * (16 * config.hidden_size + 8 * width + 8 * heads * head_dim(config) + 3 * heads * length)
    most = min(free // 4 // (a_token * length), _MOST_TOKENS.get(device.type, 16384) // length)
    batches = math.ceil(sequences / max(1, most))
    return math.ceil(sequences / batches)
