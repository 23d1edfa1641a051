"""The memory that cutting will take: masks that are learnt before, the repair, the distillation after it."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from core.machine.memory import available_bytes
from core.model.build import dtype_of, model_shape
from core.model.config import head_dim
from core.model.simulation import simulate_inference, simulate_layer, simulate_training
from core.pruning.scoring.batching import fitting_micro_batch
from core.pruning.scoring.measurement import state_memory
from core.quantities import parse_count
from core.settings.prune import makes_model
from core.steps.footprint import LIBRARIES, MOST_TOKENS, STATE_BYTES, Footprint, check_fit, weights_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from core.settings.calibration import CalibrationSettings
    from core.settings.prune import PruneSettings

_WRITTEN_FOR_EACH_SCORED = 8
"""Sequences that are written at once for each of ``calibration.micro_batch``: no backward pass follows."""

log = logging.getLogger(__name__)


def cut_footprint(
    config: "PreTrainedConfig", prune: "PruneSettings", *, device: str, stored_bytes: int = 2
) -> Footprint:
    """Estimate a cut without a repair: a layer at a time is read and written.

    Args:
        config: Of the model before the cut.
        prune: Tells whether what is cut is a model that score-layers has made, in float32.
        device: Type of the device.
        stored_bytes: Bytes a parameter of the checkpoints.
    """
    shape, here = model_shape(config), device == "cpu"
    made = 4 * makes_model(prune)
    layer_bytes = 2 * max(*map(shape.layer_num_params, shape.layers), shape.outside_params)
    layer_bytes *= max(stored_bytes, made)
    return Footprint(
        parts={"a layer's tensors": layer_bytes * here, "libraries": LIBRARIES},
        host_bytes=layer_bytes * (not here),
        disk_bytes=(2 * stored_bytes + made) * shape.num_params(),
    )


def repair_footprint(
    config: "PreTrainedConfig",
    calibration: "CalibrationSettings",
    prune: "PruneSettings",
    *,
    device: str,
    free_bytes: int,
    stored_bytes: int = 2,
) -> Footprint:
    """Estimate a cut with its repair, of any share of the model.

    Args:
        config: Of the model before the cut.
        calibration: Number format, and what may be kept.
        prune: ``repair_tokens`` and ``generated_tokens`` count.
        device: Type of the device.
        free_bytes: Memory that is free there.
        stored_bytes: Bytes a parameter of the checkpoints.
    """
    dtype, length = dtype_of(calibration.precision) or torch.float32, calibration.sequence_length
    shape, hidden = model_shape(config), config.hidden_size
    sequences = min(-(-parse_count(prune.repair_tokens) // length), calibration.pool_documents)
    sequences += written_sequences(calibration, prune)
    states = sequences * length * hidden * dtype.itemsize
    inputs = max(max(layer.mlp_width, layer.query_heads * head_dim(config)) for layer in shape.layers)
    here = device == "cpu"
    state_bytes = free_bytes // 2 if calibration.state_memory == "auto" else state_memory(calibration)
    room = max(0, state_bytes - states) if here else free_bytes // 4
    micro_batch = calibration.micro_batch or fitting_micro_batch(
        config, (sequences, length), device=torch.device(device), free_bytes=free_bytes
    )
    micro_batch = min(micro_batch, sequences)
    passes = simulate_layer(config, dtype, micro_batch, length, of_weights=False, backward=False)
    largest = max(map(shape.layer_num_params, shape.layers))
    layer_bytes = 2 * max(largest, shape.outside_params) * stored_bytes  # as read, and as written
    weights = weights_bytes(shape, calibration, dtype, free_bytes)
    return Footprint(
        parts={
            "weights": weights,
            "hidden states": states * here,
            "kept activations": min(room, sequences * length * (inputs + hidden) * dtype.itemsize),
            # In float32, then in float64 beside a factor and a solution.
            "sums": 20 * inputs**2 + 28 * inputs * hidden,
            "a layer's passes": passes.peak + 4 * micro_batch * length * (2 * inputs + hidden),
            "a layer's tensors": layer_bytes * here,
            "libraries": LIBRARIES,
        },
        host_bytes=max(weights, states + layer_bytes) * (not here),
        # What is repaired or written by a method that makes a model is float32.
        disk_bytes=shape.num_params() * (2 * stored_bytes + 4 * makes_model(prune)),
    )


def written_sequences(calibration: "CalibrationSettings", prune: "PruneSettings") -> int:
    """Return how many sequences the base model writes for its own calibration."""
    return -(-parse_count(prune.generated_tokens) // calibration.sequence_length)


def most_at_once(calibration: "CalibrationSettings", prune: "PruneSettings") -> int:
    """Return how many sequences a set micro-batch lets the base model write at once; 0 if it is not set."""
    return min(written_sequences(calibration, prune), _WRITTEN_FOR_EACH_SCORED * calibration.micro_batch)


def writing_footprint(
    config: "PreTrainedConfig", calibration: "CalibrationSettings", batch: int, *, device: str
) -> Footprint:
    """Estimate the writing of text by the base model.

    Args:
        config: Of the base model.
        calibration: Number format, and length of the sequences.
        batch: Sequences at once.
        device: Type of the device.
    """
    dtype, shape = dtype_of(calibration.precision) or torch.float32, model_shape(config)
    heads = [layer.kv_heads for layer in shape.layers]
    of_a_head = 2 * batch * calibration.sequence_length * head_dim(config) * dtype.itemsize
    passes = simulate_inference(config, dtype, batch, 1)
    weights = shape.num_params() * dtype.itemsize
    return Footprint(
        parts={
            "weights": weights,
            "keys and values": of_a_head * (sum(heads) + max(heads)),  # those of a layer are copied
            # What is expected: the logits, their softmax and its sums in float64.
            "activations and logits": passes.peak + batch * config.vocab_size * (24 + dtype.itemsize),
            "libraries": LIBRARIES,
        },
        host_bytes=weights * (device != "cpu"),
        disk_bytes=weights,
    )


def distillation_footprint(
    config: "PreTrainedConfig",
    dense: "PreTrainedConfig",
    calibration: "CalibrationSettings",
    prune: "PruneSettings",
    *,
    device: str,
    stored_bytes: int = 2,
) -> Footprint:
    """Estimate a distillation.

    Args:
        config: Of the model that is trained.
        dense: Of its teacher.
        calibration: Number format, and the sequences at once: ``micro_batch`` is not 0.
        prune: Tokens of an update.
        device: Type of the device.
        stored_bytes: Bytes a parameter of the checkpoints.
    """
    params, of_dense = (model_shape(of).num_params() for of in (config, dense))
    autocast = calibration.precision == "bfloat16"
    batch = distill_batch(calibration, prune)
    micro_batch = min(calibration.micro_batch, batch)
    passes = simulate_training(
        config,
        micro_batch,
        calibration.sequence_length,
        autocast=autocast,
        checkpointing=False,
        device=device,
        accumulate=micro_batch < batch,
        taught=(1.0, 1.0),
    )
    gradients, teacher = 4 * params, of_dense * (2 if autocast else 4)
    return Footprint(
        parts={
            "weights": 4 * params,
            "base model": teacher,
            "optimizer": 8 * params,
            "gradients": gradients,
            "activations and logits": max(0, passes.peak - gradients),
            "libraries": LIBRARIES,
        },
        host_bytes=max(4 * params, teacher),
        disk_bytes=(stored_bytes * 2 + 4 * makes_model(prune)) * of_dense
        + (stored_bytes + 4 + STATE_BYTES) * params,
    )


def masks_footprint(
    config: "PreTrainedConfig",
    calibration: "CalibrationSettings",
    prune: "PruneSettings",
    *,
    device: str,
    stored_bytes: int = 2,
) -> Footprint:
    """Estimate the learning of masks beside the weights.

    Args:
        config: Of the model before the cut.
        calibration: Number format, and the sequences at once: ``micro_batch`` is not 0.
        prune: Tokens of an update.
        device: Type of the device.
        stored_bytes: Bytes a parameter of the checkpoint.
    """
    shape, autocast = model_shape(config), calibration.precision == "bfloat16"
    params, batch = shape.num_params(), distill_batch(calibration, prune)
    micro_batch, length = min(calibration.micro_batch, batch), calibration.sequence_length
    passes = simulate_training(
        config,
        micro_batch,
        length,
        autocast=autocast,
        checkpointing=False,
        device=device,
        accumulate=micro_batch < batch,
    )
    gradients = 4 * params
    masked = sum(layer.mlp_width + layer.query_heads * head_dim(config) for layer in shape.layers)
    if prune.narrows:  # the input and the output of each norm
        masked += 2 * config.hidden_size * (2 * len(shape.layers) + 1)
    if prune.layers != "auto":  # the outputs of attention and MLP
        masked += 2 * config.hidden_size * len(shape.layers)
    return Footprint(
        parts={
            "weights": 4 * params,
            "optimizer": 8 * params,
            "gradients": gradients,
            "activations and logits": max(0, passes.peak - gradients),
            # Of each input that a mask multiplies, what it was before; the masks themselves are small.
            "masked activations": micro_batch * length * masked * (2 if autocast else 4),
            "libraries": LIBRARIES,
        },
        host_bytes=4 * params,
        disk_bytes=(stored_bytes + 4 + STATE_BYTES) * params,
    )


def distill_batch(calibration: "CalibrationSettings", prune: "PruneSettings") -> int:
    """Return the sequences of an update."""
    return -(-parse_count(prune.distill_batch_tokens) // calibration.sequence_length)


def check_repair(
    config: "PreTrainedConfig",
    calibration: "CalibrationSettings",
    prune: "PruneSettings",
    device: str,
    *,
    what: str = "the repair",
) -> None:
    """Log what a cut with its repair will take, or ``what`` else takes as much.

    Raises:
        OutOfMemoryError: If it cannot fit.
    """
    free = available_bytes(device)

    def footprint(settings: "CalibrationSettings") -> Footprint:
        return repair_footprint(config, settings, prune, device=device, free_bytes=free)

    memory = ", calibration.state_memory=0" if device == "cpu" else ""
    others = (
        ("calibration.micro_batch=1", replace(calibration, micro_batch=1)),
        (
            f"calibration.weights=streamed, calibration.micro_batch=1{memory}",
            replace(calibration, weights="streamed", micro_batch=1, state_memory="0"),
        ),
    )
    check_fit(what, footprint(calibration), free, device, ((text, footprint(s)) for text, s in others))


def planned_distillation(
    config: "PreTrainedConfig",
    dense: "PreTrainedConfig",
    calibration: "CalibrationSettings",
    prune: "PruneSettings",
    device: str,
) -> int:
    """Return how many sequences pass through the models at once; logs what will be taken.

    Args:
        config: Of the model that is trained.
        dense: Of its teacher.
        calibration: ``micro_batch`` 0 takes as many as fit, with a fifth of the memory to spare, and as still
            make it faster.
        prune: Tokens of an update.
        device: Type of the device.

    Raises:
        OutOfMemoryError: If it cannot fit.
    """

    def footprint(size: int) -> Footprint:
        return distillation_footprint(
            config, dense, replace(calibration, micro_batch=size), prune, device=device
        )

    return _planned("the distillation", calibration, prune, device, footprint)


def planned_masks(
    config: "PreTrainedConfig", calibration: "CalibrationSettings", prune: "PruneSettings", device: str
) -> int:
    """Return how many sequences pass through a model at once whose masks are learnt; see above."""

    def footprint(size: int) -> Footprint:
        return masks_footprint(config, replace(calibration, micro_batch=size), prune, device=device)

    return _planned("the learning of masks", calibration, prune, device, footprint)


def _planned(
    what: str,
    calibration: "CalibrationSettings",
    prune: "PruneSettings",
    device: str,
    footprint: Callable[[int], Footprint],
) -> int:
    free, batch = available_bytes(device), distill_batch(calibration, prune)
    most = max(1, min(batch, MOST_TOKENS.get(device, 32768) // calibration.sequence_length))
    sizes = sorted({-(-batch // 2**halvings) for halvings in range(batch.bit_length() + 1)}, reverse=True)
    sizes = [size for size in sizes if size <= most] or [1]
    chosen = min(calibration.micro_batch, batch)
    if not chosen:
        fitting = (size for size in sizes if footprint(size).device_bytes <= 0.8 * free)
        chosen = next(fitting, 1)
    others = ((f"calibration.micro_batch={size}", footprint(size)) for size in sizes if size < chosen)
    check_fit(what, footprint(chosen), free, device, others)
    return chosen
