"""Settings of the section ``model``: which model is pruned."""

from dataclasses import dataclass, field
from typing import Literal

from core.settings.identity import PLACE, formerly


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model is pruned."""

    base: str = field(default="", metadata=PLACE)
    """A local directory, a ``.gguf`` file, ``s3://bucket/prefix``, ``package:NAME/path`` (a file or folder
    inside an installed Python package) or a Hugging Face repository id (also ``hf://owner/name@revision``).
    Looked up again by every run: ``models:/name@alias`` or ``models:/name/3`` in MLflow's registry, and a
    file named HEAD (``s3://bucket/prefix/HEAD``, ``folder/HEAD``) whose one line names the checkpoint."""
    revision: str = field(default="", metadata=PLACE)
    """Branch, tag or commit of a Hugging Face repository; empty for its default branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the final checkpoint; ``auto`` is the base model's."""
    dtype_between_phases: Literal["float32", "same"] = field(default="float32", metadata=formerly("same"))
    """Number format of the checkpoints before it. ``same`` (earlier versions) takes half the storage, and
    rounds away part of what each phase learns and repairs."""
