"""Speed of a checkpoint against its base, in every runtime that is there."""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from core.errors import ExportError, SettingsError, UnsupportedModelError
from core.evaluation.speed.comparison import compare
from core.evaluation.speed.workload import Runtime, Workload
from core.export.gguf import export_gguf
from core.export.gguf_quantization import GgufDtype
from core.model.checkpoint import Checkpoint
from core.runs.record import SpeedRecord
from core.scratch import scratch_folder

log = logging.getLogger(__name__)

BRIEF = Workload(prompt_tokens=64, new_tokens=16, rounds=3)
"""What publish takes the time for."""


def installed_runtimes() -> tuple[Runtime, ...]:
    """Return PyTorch, and llama.cpp where its Python package is installed."""
    return ("torch", "llama.cpp") if importlib.util.find_spec("xllamacpp") else ("torch",)


def compare_speed(
    base: Path,
    checkpoint: Path,
    workload: Workload,
    *,
    runtimes: Sequence[Runtime] = (),
    gguf_dtype: GgufDtype = "f16",
    device: str = "cpu",
) -> tuple[SpeedRecord, ...]:
    """Measure two checkpoints side by side.

    Args:
        base: Folder of the model that the other is compared with.
        checkpoint: Folder of the model of interest.
        workload: What is timed.
        runtimes: Where; empty takes all that are installed and can read such models.
        gguf_dtype: Number format of the weights in llama.cpp.
        device: ``cpu`` or ``cuda``.

    Raises:
        ExportError: If a runtime that was asked for cannot read such models.
        SettingsError: If one of them is not installed, or prompt and answer are longer than a model can see.
    """
    if "llama.cpp" in runtimes and "llama.cpp" not in installed_runtimes():
        raise SettingsError(
            ["llama.cpp takes the package xllamacpp. Run: pip install 'adapt-pruner[llamacpp]'"]
        )
    for folder in (base, checkpoint):
        _check_length(folder, workload)
    found = []
    for runtime in runtimes or installed_runtimes():
        if runtime == "torch":
            found.append(compare(runtime, base, checkpoint, workload, device=device))
            continue
        with scratch_folder() as scratch:
            base_file, file = scratch / "base.gguf", scratch / "checkpoint.gguf"
            try:
                export_gguf(base, base_file, dtype=gguf_dtype)
                export_gguf(checkpoint, file, dtype=gguf_dtype)
            except (ExportError, UnsupportedModelError) as error:
                if runtimes:
                    raise
                log.info("not measured in llama.cpp: %s", error)
                continue
            found.append(compare(runtime, base_file, file, workload, device=device))
    return tuple(found)


def _check_length(folder: Path, workload: Workload) -> None:
    positions = getattr(Checkpoint(folder).config, "max_position_embeddings", None)
    length = workload.prompt_tokens + workload.new_tokens + 1
    if positions is not None and length > positions:
        raise SettingsError(
            [
                f"prompts of {workload.prompt_tokens} tokens and answers of {workload.new_tokens} need "
                f"{length:,} positions, but {folder} has {positions:,}. Shorten one of them."
            ]
        )
