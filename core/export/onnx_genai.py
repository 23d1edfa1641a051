"""The description that ONNX Runtime GenAI reads beside an ONNX graph."""

from typing import Any

from core.export.generation import end_ids
from core.model.checkpoint import Checkpoint
from core.model.config import head_dim

_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
"""Entries with the same name in generation_config.json and genai_config.json."""


def genai_config(checkpoint: Checkpoint, graph: str) -> dict[str, Any]:
    """Return ``genai_config.json`` for a graph file; its sampling is that of the generation config.

    It has one number of KV heads; where layers differ, the runtime takes each layer's from the graph.
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
    """Return the tokens that begin, end and pad a text; without one for padding, an end token serves."""
    ends = end_ids(generation, config)
    named = ("bos_token_id", "pad_token_id")
    tokens = {name: generation.get(name, getattr(config, name, None)) for name in named}
    if tokens["pad_token_id"] is None and ends:
        tokens["pad_token_id"] = ends[0]
    tokens["eos_token_id"] = ends or None
    return {name: token for name, token in tokens.items() if token is not None}
