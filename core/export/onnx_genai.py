"""The description that ONNX Runtime GenAI reads beside an ONNX graph."""

from typing import Any

from core.export.generation import end_ids
from core.model.checkpoint import Checkpoint
from core.model.config import head_dim

_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
"""What generation_config.json and genai_config.json call by the same name."""


def genai_config(checkpoint: Checkpoint, graph: str) -> dict[str, Any]:
    """Return the content of ``genai_config.json``.

    It knows one number of KV heads; where layers differ, the runtime takes each layer's from the graph.

    Args:
        checkpoint: The checkpoint, whose generation config gives the end tokens and the sampling.
        graph: File name of the graph.

    Raises:
        CheckpointError: If the generation config is damaged.
    """
    config, layers, generation = checkpoint.config, checkpoint.layers, checkpoint.generation_config
    decoder = {
        "filename": graph,
        "session_options": {"provider_options": []},
        "head_size": head_dim(config),
        "hidden_size": config.hidden_size,
        "num_attention_heads": max(layer.query_heads for layer in layers),
        "num_key_value_heads": max(layer.kv_heads for layer in layers),
        "num_hidden_layers": len(layers),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return {
        "model": {
            # Any model. Under a family's name the runtime expects the graph of its own exporter.
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "decoder": decoder,
            **_special_tokens(generation, config),
        },
        "search": {
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": False,  # the graph returns a cache that has grown
            **{name: generation[name] for name in _SEARCH if generation.get(name) is not None},
        },
    }


def _special_tokens(generation: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the tokens that begin, end and pad a text; without one to pad, an end token does it."""
    ends = end_ids(generation, config)
    tokens: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    for name in ("bos_token_id", "pad_token_id"):
        token = generation.get(name, getattr(config, name, None))
        if token is not None:
            tokens[name] = token
    if ends:
        tokens.setdefault("pad_token_id", ends[0])
    return tokens
