"""Limits on the sizes in a config.json, checked before anything is built from it."""

from collections.abc import Iterator, Mapping
from typing import Any

_MAX = {
    "hidden_size": 2**18,
    "sliced_hidden_size": 2**18,
    "intermediate_size": 2**21,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "vocab_size": 2**23,
    "max_position_embeddings": 2**40,
}
"""The largest value of each size; models of 2025 have at most a tenth of it."""

_OF_A_LAYER = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_OF_THE_WHOLE = ("hidden_size", "num_hidden_layers", "vocab_size")


def check_sizes(data: Mapping[str, Any]) -> None:
    """Check the sizes given in a config.json; those left out have defaults.

    Raises:
        ValueError: If one is not a whole number, or is out of range.
    """
    _check(data, _MAX, "")
    layers = data.get("num_hidden_layers")
    lists = {name: value for name, value in data.items() if isinstance(value, list)}
    for name in ("layer_types", "no_rope_layers"):
        if name in lists and layers is not None and len(lists[name]) != layers:
            raise ValueError(f"{name} has {len(lists[name]):,} entries for {layers:,} layers")
    for name, layer in _layers(data.get("per_layer_config")):
        _check(layer, _OF_A_LAYER, f"per_layer_config.{name}.")


def check_complete(config: Any) -> None:
    """Check the sizes of a config that transformers has read, including those of each layer.

    Raises:
        ValueError: If one is missing or out of range, or KV heads do not divide query heads.
    """
    for name in _OF_THE_WHOLE:
        _check_size(name, getattr(config, name, None), _MAX[name])
    if (width := getattr(config, "sliced_hidden_size", None)) is not None:
        _check_size("sliced_hidden_size", width, config.hidden_size)
        if config.tie_word_embeddings:
            raise ValueError("a sliced model's embeddings cannot be tied")
    for index, layer in enumerate(config.per_layer_config):
        for name in _OF_A_LAYER[:3]:
            _check_size(f"layer {index}: {name}", getattr(layer, name, None), _MAX[name])
        if layer.num_attention_heads % layer.num_key_value_heads:
            raise ValueError(f"layer {index}: num_attention_heads is not a multiple of num_key_value_heads")


def _layers(per_layer: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if per_layer is None:
        return
    if not isinstance(per_layer, dict) or not all(isinstance(layer, dict) for layer in per_layer.values()):
        raise ValueError("per_layer_config must be an object with one object per layer")
    for name, layer in per_layer.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 5):
            raise ValueError(f"per_layer_config.{name} does not name a layer")
        yield name, layer


def _check(data: Mapping[str, Any], names: Any, prefix: str) -> None:
    for name in names:
        if data.get(name) is not None:
            _check_size(f"{prefix}{name}", data[name], _MAX[name])


def _check_size(name: str, value: Any, limit: int) -> None:
    if type(value) is not int or not 1 <= value <= limit:
        raise ValueError(f"{name}={str(value)[:40]} must be a whole number from 1 to {limit:,}")
