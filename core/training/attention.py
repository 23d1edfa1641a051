"""Which kernels compute the attention of what is trained.

torch's own need a mask of the documents in a row, B * T * T numbers, and Gemma 2's caps are beyond them. The
package flash-attn is told where documents begin; it works in bfloat16, on GPUs.
"""

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from transformers.utils.import_utils import is_flash_attn_2_available

from core.errors import SettingsError
from core.machine.precision import has_native_bfloat16
from core.model.decoder import FLASH

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from core.settings.training import TrainingSettings

log = logging.getLogger(__name__)


@contextlib.contextmanager
def attention_of(settings: "TrainingSettings", *models: "PreTrainedModel | None") -> Iterator[None]:
    """Let models compute their attention as the settings say, while the ``with`` block lasts.

    Args:
        settings: ``attention`` and ``precision`` of the training.
        models: On one device; None is passed over.

    Raises:
        SettingsError: If flash-attn is asked for and cannot be had.
    """
    present = [model for model in models if model is not None]
    obstacle = _obstacle(settings, present)
    if settings.attention == "flash" and obstacle:
        raise SettingsError(
            [
                f"training.attention=flash, but {obstacle}. Set training.attention to auto or torch: the "
                "same run resumes."
            ]
        )
    if settings.attention == "torch" or obstacle:
        if settings.attention == "auto" and is_flash_attn_2_available():
            log.info("attention by torch, not by flash-attn: %s", obstacle)
        yield
        return
    before = [model.config._attn_implementation for model in present]
    try:
        for model in present:
            model.set_attn_implementation(FLASH)
        log.info("attention by flash-attn")
        yield
    finally:
        for model, way in zip(present, before, strict=True):
            model.set_attn_implementation(way)


def _obstacle(settings: "TrainingSettings", models: list["PreTrainedModel"]) -> str:
    """Return why flash-attn cannot be had, if it cannot."""
    if any(model.device.type != "cuda" for model in models):
        return "it needs a GPU"
    if not is_flash_attn_2_available():
        return "the package flash-attn is not installed"
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:  # such as one that was built for another torch
        return f"the package flash-attn cannot be imported ({error})"
    if not has_native_bfloat16():
        return "it needs a GPU that computes in bfloat16 itself"
    if settings.precision != "bfloat16":
        return f"training.precision is {settings.precision}"
    beyond = [model.config.model_type for model in models if not model._supports_flash_attn]
    return f"transformers has none for {beyond[0]}" if beyond else ""
