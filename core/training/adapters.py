"""Low-rank adapters (LoRA): recovery training of few parameters beside frozen weights, by peft."""

from typing import TYPE_CHECKING

from torch import nn

from core.model.families import family_of

if TYPE_CHECKING:
    from peft import LoraModel
    from transformers import PreTrainedModel

_SCALE = 2
"""Factor on what the adapters add (lora_alpha / rank), as LLM-Pruner has it."""


def add_adapters(model: "PreTrainedModel", rank: int) -> "LoraModel":
    """Give each projection of a model's layers an adapter, in place, and freeze all else.

    A projection W of any size becomes W + 2 B A, where A has ``rank`` rows, drawn from torch's generator, and
    B ``rank`` columns of zeros: at first the model computes what it did.

    Args:
        model: Its layers may differ in size.
        rank: Of the adapters.

    Returns:
        Its ``merge_and_unload`` adds the adapters to the weights, in their number format, and removes them.
        The model keeps its own methods.
    """
    from peft import LoraConfig, LoraModel

    layers = family_of(model.config).layers
    projections = [
        f"{layers}.{name}"
        for name, module in model.get_submodule(layers).named_modules()
        if isinstance(module, nn.Linear)
    ]
    config = LoraConfig(r=rank, lora_alpha=_SCALE * rank, target_modules=projections)
    return LoraModel(model, config, "default")
