"""How many sequences pass through a layer at once."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from core.machine.memory import available_bytes
from core.model.config import head_dim, layer_shapes

_MOST_TOKENS = {"cpu": 2048, "cuda": 16384}
"""More tokens at once make nothing faster."""


def fitting_micro_batch(
    config: PreTrainedConfig,
    shape: Sequence[int],
    *,
    device: torch.device,
    free_bytes: int | None = None,
) -> int:
    """Choose the micro-batch for scoring a model: as many sequences as help, in a quarter of the free memory.

    Args:
        config: The model's.
        shape: (S, T) of the calibration set; its sequences are shared out evenly.
        device: Where layers run.
        free_bytes: Memory that is free there; None looks.

    Returns:
        Sequences at once, at least 1.
    """
    free = available_bytes(device) if free_bytes is None else free_bytes
    sequences, length = shape
    layers = layer_shapes(config)
    heads, width = max(layer.query_heads for layer in layers), max(layer.mlp_width for layer in layers)
    # What autograd keeps of one layer, and what its backward pass adds, in float32: hidden states around
    # norms and residuals, the projections' outputs twice, the attention weights where no fused kernel serves.
    a_token = 4 * (16 * config.hidden_size + 8 * width + 8 * heads * head_dim(config) + 3 * heads * length)
    most = min(free // 4 // (a_token * length), _MOST_TOKENS.get(device.type, 16384) // length)
    batches = math.ceil(sequences / max(1, most))
    return math.ceil(sequences / batches)
