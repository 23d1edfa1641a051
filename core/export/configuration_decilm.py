"""Reads the config of a DeciLM (nemotron-nas) checkpoint: a Llama whose layers are described one by one.

It is copied beside the weights: transformers has no model of this type, so runtimes that read configs through
it run this file (with trust_remote_code).
"""

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A mapping whose entries are attributes too, and so on for mappings in it."""

    def __init__(self, entries: dict[str, Any]) -> None:
        """Take over ``entries``."""
        super().__init__({k: Block(v) if isinstance(v, dict) else v for k, v in entries.items()})

    def __getattr__(self, name: str) -> Any:
        """Return an entry."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """A Llama config with ``block_configs``: for each layer its ``attention`` and its ``ffn``."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **entries: Any) -> None:
        """Take over the entries of config.json."""
        super().__init__(**entries)
        self.block_configs = [Block(block) for block in block_configs]
