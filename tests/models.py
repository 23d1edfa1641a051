"""Tiny models of each family: pairwise distinct sizes, float64, random weights, biases that are not zero."""

import torch
from transformers import LlamaConfig, Qwen2Config

from core.model.build import build_model, config_with_layers
from core.model.shape import LayerShape

SIZES = dict(
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=10,
    vocab_size=101,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)

CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biased": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
}

UNEQUAL = (
    LayerShape(query_heads=6, kv_heads=3, mlp_width=31),
    LayerShape(query_heads=4, kv_heads=2, mlp_width=40),
    LayerShape(query_heads=5, kv_heads=1, mlp_width=7),
)


def tiny(name, layers=None, *, dtype=torch.float64, seed=0):
    """A random model; ``layers`` gives each its own size."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    if layers is not None:
        config = config_with_layers(config, layers)
    model = build_model(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases too: what is 1 or 0 everywhere hides mistakes.
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    return model


def random_tokens(rows=4, length=12, seed=1):
    return torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(seed))
