"""Decisions that need the phase's checkpoint itself, a part of score-layers: its model, tokens and memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.runs.run import Run
from core.settings.methods import WHOLE_LAYERS
from core.settings.prune import slices_or_ranks
from core.steps.frame import Workspace, provenance_of
from core.steps.measuring import REPAIR_DRAW, draw, opened_for_repair
from core.storage.interface import join_uri
from core.storage.layout import RESUME
from core.storage.publication import Publication

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from core.model.checkpoint import Checkpoint
    from core.model.layerwise import LayerwiseModel
    from core.pruning.methods.opened import OpenedModel, Parts
    from core.settings.calibration import CalibrationSettings
    from core.steps.footprint import Footprint

_SEARCH_DRAW, _MASK_DRAW = REPAIR_DRAW - 1, REPAIR_DRAW - 2
"""Numbers of draws within a phase: of no step, nor of the repair."""


def open_for_decision(
    run: Run, phase: int, checkpoint: Publication, data: Publication, work: Workspace, figures: dict[str, Any]
) -> "OpenedModel":
    """Fetch and open a phase's checkpoint for a decision that its statistics do not give.

    What a method makes of it is written to ``work.out``, and what that took to ``figures``.

    Raises:
        OutOfMemoryError: If the decision would not fit into the memory.
    """
    import torch

    from core.model.checkpoint import Checkpoint, write_checkpoint
    from core.pruning.methods.opened import OpenedModel
    from core.steps.kept_training import kept_states

    opened, prune, calibration = (
        Checkpoint(checkpoint.fetch(work.scratch)),
        run.settings.prune,
        run.settings.calibration,
    )
    provenance = provenance_of(run, phase, checkpoint.digest, step="score-layers")

    def remake(config: "PreTrainedConfig", parts: "Parts") -> None:
        # Rounded by prune-step, when all is done.
        config.dtype = dtype = torch.promote_types(opened.dtype, torch.float32)
        write_checkpoint(
            work.out,
            config,
            ({name: tensor.to(dtype) for name, tensor in part.items()} for part in parts),
            len(opened.layers) + 1,
            companions=opened.directory,
            provenance=provenance,
        )

    if prune.method == "sheared-llama":
        model, tokens, micro_batch = _opened_for_masks(run, phase, opened, data, work.scratch)
    elif slices_or_ranks(prune):
        what = "the ranking of embedding channels" if prune.narrows else "the slicing"
        model, tokens = opened_for_repair(run, phase, opened, data, work.scratch, what=what)
        micro_batch = calibration.micro_batch
    else:
        model, tokens, micro_batch = _opened_for_search(run, phase, opened, data, work.scratch)
    return OpenedModel(
        model=model,
        tokens=tokens,
        micro_batch=micro_batch,
        autocast=calibration.precision == "bfloat16",
        seed=run.settings.seed + phase,
        remake=remake,
        kept=kept_states(
            join_uri(run.phase_uri(phase, "scored"), RESUME, "training"),
            work.scratch / "states",
            run.inputs(checkpoint.digest, data.digest),
        ),
        figures=figures,
    )


def _opened_for_masks(
    run: Run, phase: int, checkpoint: "Checkpoint", data: Publication, scratch: Path
) -> "tuple[LayerwiseModel, torch.Tensor, int]":
    """Return a checkpoint in float32, calibration tokens, and the sequences that pass through it at once."""
    import torch

    from core.model.build import load_model, pick_device
    from core.model.layerwise import LayerwiseModel
    from core.steps.prune_footprint import distill_batch, planned_masks

    prune, calibration, device = run.settings.prune, run.settings.calibration, pick_device()
    wanted = prune.mask_steps * distill_batch(calibration, prune)
    tokens = draw(run, phase, _MASK_DRAW, data, scratch, sequences=wanted, or_all=True)
    micro_batch = planned_masks(checkpoint.config, calibration, prune, device.type)
    model = load_model(checkpoint, dtype=torch.float32, device=device)
    return LayerwiseModel(model), tokens, micro_batch


def _opened_for_search(
    run: Run, phase: int, checkpoint: "Checkpoint", data: Publication, scratch: Path
) -> "tuple[LayerwiseModel, torch.Tensor, int]":
    """Return a checkpoint, the tokens that a search measures on, and the sequences of a pass."""
    from core.machine.memory import available_bytes
    from core.model.build import dtype_of, load_model, pick_device
    from core.model.layerwise import LayerwiseModel
    from core.steps.footprint import check_fit

    device, calibration = pick_device(), run.settings.calibration
    wanted = search_sequences(calibration)
    tokens = draw(run, phase, _SEARCH_DRAW, data, scratch, sequences=wanted, or_all=True)
    free = available_bytes(device)

    def footprint(batch: int) -> "Footprint":
        return search_footprint(checkpoint.config, calibration, device=device.type, batch=batch)

    batch = min(calibration.micro_batch or 8, len(tokens))
    while not calibration.micro_batch and batch > 1 and footprint(batch).device_bytes > 0.8 * free:
        batch //= 2
    others = [("calibration.micro_batch=1", footprint(1))]
    what = "the choice of layers" if run.settings.prune.method in WHOLE_LAYERS else "the width search"
    check_fit(what, footprint(batch), free, device.type, others)
    model = load_model(checkpoint, dtype=dtype_of(calibration.precision), device=device)
    return LayerwiseModel(model), tokens, batch


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
    """Estimate a search, or the choice of the layers that go.

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
