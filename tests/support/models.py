"""Tiny models of each family: pairwise distinct sizes, float64, random weights, biases that are not zero."""

import torch
from torch import Tensor
from torch.nn.functional import softmax
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from core.model.build import build_model
from core.model.config import config_with_layers
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

# Windows that 12 tokens overrun, beside layers that see everything.
SLIDING = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
# What turns with the frequency of each pair of rotated dimensions: 3 pairs, of 8 dimensions a head.
LONGROPE = dict(
    head_dim=8,
    original_max_position_embeddings=32,
    rope_parameters=dict(
        rope_type="longrope",
        rope_theta=10000.0,
        partial_rotary_factor=0.75,
        short_factor=[1.0, 1.1, 1.3],
        long_factor=[1.0, 2.0, 4.0],
    ),
)

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)

CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biased": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-output-biases": lambda: LlamaConfig(**SIZES, output_biases=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, use_sliding_window=True, attention_bias=True, **SLIDING),
    "gemma2": lambda: Gemma2Config(
        **SIZES,
        **SLIDING,
        query_pre_attn_scalar=7,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, **SLIDING, query_pre_attn_scalar=7, final_logit_softcapping=5.0
    ),
    "phi3": lambda: Phi3Config(**SIZES, sliding_window=5),
    "phi3-longrope": lambda: Phi3Config(**SIZES | LONGROPE),
    "olmo2": lambda: Olmo2Config(**SIZES, attention_bias=True),
    "smollm3": lambda: SmolLM3Config(
        **SIZES, **SLIDING, use_sliding_window=True, no_rope_layers=[1, 0, 1], mlp_bias=True
    ),
    "granite": lambda: GraniteConfig(
        **SIZES,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
    ),
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


class Float64Throughout(TorchFunctionMode):
    """Leaves float64 as it is where transformers rounds to float32 on the way: norms, eager attention.

    Two ways to the same value can then be compared to the last digits.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(args[0] if args else None, Tensor) and args[0].dtype == torch.float64:
            if function is Tensor.float:
                return args[0]
            if function in (Tensor.to, softmax):
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return function(*args, **kwargs)


def llama_similarities():
    """How alike input and output of Llama-3.1-8B's 32 layers may be: least in the first and the last."""
    return [0.6] + [0.85 + 0.06 * min(1, i / 20) for i in range(29)] + [0.9, 0.65]
