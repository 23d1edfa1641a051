"""The file that lets stock transformers load a checkpoint of unequal or sliced layers."""

import copy
from pathlib import Path
from typing import Any

MODULE = "modeling_unequal_layers"
"""The module beside this one that such a checkpoint contains; transformers runs it if trusted."""

_CLASSES = {
    "AutoConfig": "UnequalLayersConfig",
    "AutoModel": "UnequalLayersModel",
    "AutoModelForCausalLM": "UnequalLayersForCausalLM",
}


def stock_classes(config: Any) -> dict[str, str]:
    """Return the names of transformers' own classes for a config, by their auto class."""
    stem = type(config).__name__.removesuffix("Config")
    return {
        "AutoConfig": f"{stem}Config",
        "AutoModel": f"{stem}Model",
        "AutoModelForCausalLM": f"{stem.removesuffix('Text')}ForCausalLM",  # Gemma3TextConfig alone has it
    }


def needs_code(config: Any) -> bool:
    """Return whether transformers builds a model only with the file beside the weights."""
    ours = ("output_biases", "sliced_hidden_size")
    return bool(config.is_heterogeneous or any(getattr(config, name, None) for name in ours))


def write_config(config: Any, directory: Path) -> None:
    """Write ``config.json``, and for unequal or sliced layers or output biases the code that builds them.

    Any other model is a plain checkpoint of its family, without code.

    Args:
        config: The transformers config; stays as it is.
        directory: The checkpoint's folder.
    """
    config = copy.deepcopy(config)
    stock = stock_classes(config)
    config.architectures = [stock["AutoModelForCausalLM"]]
    if needs_code(config):
        # Names unknown to any runtime: one that knew them would build all layers alike.
        config.architectures = [_CLASSES["AutoModelForCausalLM"]]
        config.auto_map = {auto: f"{MODULE}.{name}" for auto, name in _CLASSES.items()}
        source = Path(__file__).with_name(f"{MODULE}.py").read_text()
        for name, llama in zip(stock.values(), ("Config", "Model", "ForCausalLM"), strict=True):
            source = source.replace(f"import Llama{llama} as", f"import {name} as")
        (directory / f"{MODULE}.py").write_text(source)
    config.save_pretrained(directory)
