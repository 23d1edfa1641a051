"""The search for a phase's widths, a part of score-layers: its model, its tokens, its memory."""

from pathlib import Path
from typing import TYPE_CHECKING

from core.runs.run import Run
from core.steps.measuring import draw
from core.storage.publication import Publication

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from core.pruning.planning import DecideStep, Step, StepRequest
    from core.settings.calibration import CalibrationSettings
    from core.steps.footprint import Footprint

_DRAW = 998
"""Number of the draw within a phase: neither a step's nor the repair's."""


def open_search(
    run: Run, phase: int, checkpoint: Publication, data: Publication, scratch: Path
) -> "DecideStep":
    """Fetch and open a phase's checkpoint; return what decides its step by searching widths.

    Args:
        run: The run.
        phase: The phase.
        checkpoint: What is cut.
        data: Holds the calibration pool.
        scratch: Where both are fetched to.

    Raises:
        OutOfMemoryError: If the search would not fit into the memory.
    """
    from core.machine.memory import available_bytes
    from core.model.build import dtype_of, load_model, pick_device
    from core.model.checkpoint import Checkpoint
    from core.pruning.widths.search import WidthSearch
    from core.steps.footprint import check_fit, explaining_memory

    opened, device, calibration = (
        Checkpoint(checkpoint.fetch(scratch)),
        pick_device(),
        run.settings.calibration,
    )
    wanted = search_sequences(calibration)
    tokens = draw(run, phase, _DRAW, data, scratch, sequences=wanted, or_all=True)
    free = available_bytes(device)

    def footprint(batch: int) -> "Footprint":
        return search_footprint(opened.config, calibration, device=device.type, batch=batch)

    batch = min(calibration.micro_batch or 8, len(tokens))
    while not calibration.micro_batch and batch > 1 and footprint(batch).device_bytes > 0.8 * free:
        batch //= 2
    others = [("calibration.micro_batch=1", footprint(1))]
    check_fit("the width search", footprint(batch), free, device.type, others)
    model = load_model(opened, dtype=dtype_of(calibration.precision), device=device)
    search = WidthSearch(model, tokens, batch_size=batch)

    def step(given: "StepRequest") -> "Step":
        with explaining_memory("calibration.micro_batch=1"):
            return search.step(given)

    return step


def search_sequences(calibration: "CalibrationSettings") -> int:
    """Return the sequences that a search measures on."""
    from core.pruning.widths.search import SEARCH_TOKENS

    return -(-SEARCH_TOKENS // calibration.sequence_length)


def search_footprint(
    config: "PreTrainedConfig",
    calibration: "CalibrationSettings",
    *,
    device: str,
    batch: int,
    stored_bytes: int = 2,
) -> "Footprint":
    """Estimate a search.

    Args:
        config: Of the model that is cut.
        calibration: Number format, and the length of sequences.
        device: Type of the device.
        batch: Sequences at once.
        stored_bytes: Bytes a parameter of the checkpoint.
    """
    import torch

    from core.model.build import dtype_of, model_shape
    from core.model.loss import chunk_positions
    from core.model.simulation import simulate_inference
    from core.steps.footprint import LIBRARIES, Footprint

    dtype, length = dtype_of(calibration.precision) or torch.float32, calibration.sequence_length
    params, layers = model_shape(config).num_params(), config.num_hidden_layers
    passes = simulate_inference(config, dtype, batch, length)
    a_state = length * config.hidden_size * dtype.itemsize
    positions = min(chunk_positions(config.vocab_size, device), batch * length)
    return Footprint(
        parts={
            "weights": params * dtype.itemsize,
            "hidden states": a_state * (search_sequences(calibration) + layers * batch),
            # Of both models: as computed, in float32 where they are not, their logarithms; and a probability.
            "activations, then logits": max(
                passes.peak, passes.kept + positions * config.vocab_size * (20 + 2 * dtype.itemsize)
            ),
            "libraries": LIBRARIES,
        },
        host_bytes=params * dtype.itemsize,
        disk_bytes=params * stored_bytes,
    )
