"""The memory that a step will take, estimated before it starts, and settings under which it would fit."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from core.errors import OutOfMemoryError
from core.machine.memory import available_bytes
from core.model.build import build_empty, dtype_of, model_shape
from core.model.config import head_dim
from core.model.families import family_of
from core.model.loss import chunk_positions
from core.model.simulation import simulate_head, simulate_inference, simulate_layer, simulate_training
from core.pruning.scoring.batching import fitting_micro_batch
from core.pruning.scoring.criteria import CRITERIA, squares_bytes
from core.pruning.scoring.kept_outputs import choose_outputs
from core.pruning.scoring.layer_inputs import held_bytes, share_out
from core.pruning.scoring.measurement import device_memory, state_memory
from core.training.adapters import add_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from core.model.shape import ModelShape
    from core.settings.calibration import CalibrationSettings
    from core.settings.evaluation import EvaluationSettings
    from core.settings.prune import PruneSettings
    from core.settings.training import TrainingSettings

log = logging.getLogger(__name__)

STATE_BYTES = 12
"""Of a saved state, for each trained parameter: the weight and two moments."""
LIBRARIES = 100_000_000
"""What torch's libraries take for themselves during the work: threads, kernels, packed weights."""
TOLERANCE = 0.85
"""A step is refused if this share of its estimate is not free."""
MOST_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens at once beyond which training gets no faster."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory that a step takes, in bytes.

    Attributes:
        parts: What on the device, by name: they add up.
        host_bytes: Host memory for weights on their way to an accelerator, and for layers' inputs.
        waiting_bytes: Host memory for what each rank of a training has no room for on its device.
        moments_bytes: Host memory that the moments of AdamW take where they wait there.
        disk_bytes: Scratch space on the local disk.
    """

    parts: Mapping[str, int]
    host_bytes: int = 0
    waiting_bytes: int = 0
    moments_bytes: int = 0
    disk_bytes: int = 0

    @property
    def device_bytes(self) -> int:
        """All that the step takes on its device."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        """Return the sum and its larger parts."""
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in self.parts.items() if size >= 10**7)
        return f"{gigabytes(self.device_bytes)} ({parts})"

    def or_else(self, other: "Footprint") -> "Footprint":
        """Return what two steps take of which one follows the other: the parts of the larger one."""
        return replace(
            max(self, other, key=lambda footprint: footprint.device_bytes),
            host_bytes=max(self.host_bytes, other.host_bytes),
            waiting_bytes=max(self.waiting_bytes, other.waiting_bytes),
            moments_bytes=max(self.moments_bytes, other.moments_bytes),
            disk_bytes=max(self.disk_bytes, other.disk_bytes),
        )


def training_footprint(
    config: "PreTrainedConfig",
    dense: "PreTrainedConfig | None",
    settings: "TrainingSettings",
    *,
    device: str,
    stored_bytes: int = 2,
) -> Footprint:
    """Estimate recovery training.

    Args:
        config: Of the model that is trained.
        dense: Of its teacher, if one is in memory beside it.
        settings: ``micro_batch`` is not 0.
        device: Type of the device.
        stored_bytes: Bytes a parameter of the checkpoints.
    """
    params, autocast = model_shape(config).num_params(), settings.precision == "bfloat16"
    weights, empty = 4 * params, build_empty(config)
    if settings.lora_rank:
        add_adapters(empty, settings.lora_rank)
    sizes = [parameter.numel() for parameter in empty.parameters() if parameter.requires_grad]
    trained = sum(sizes)
    if settings.lora_rank:
        weights += 4 * trained
    base_params = 0 if dense is None else model_shape(dense).num_params()
    stored = settings.teacher_logits == "stored"
    hidden: tuple[int, ...] = ()
    if settings.hidden_weight:
        hidden = settings.hidden_layers or tuple(range(config.num_hidden_layers))
    passes = simulate_training(
        config,
        settings.micro_batch,
        settings.sequence_length,
        autocast=autocast,
        checkpointing=settings.gradient_checkpointing,
        device=device,
        offload=settings.layer_inputs == "host",
        accumulate=settings.micro_batch < settings.global_batch,
        taught=None if dense is None and not stored else (settings.distillation_weight, settings.temperature),
        hidden_layers=hidden,
        top_k=settings.teacher_top_k if stored else 0,
        lora_rank=settings.lora_rank,
    )
    gradients, teacher = 4 * trained, base_params * (2 if autocast else 4)
    carried = 16 if settings.optimizer_state == "carry" else 0  # moments that come, and those that are left
    return Footprint(
        parts={
            "weights": weights,
            **({} if dense is None else {"base model": teacher}),
            "optimizer": 8 * trained,
            "gradients": gradients,
            "activations and logits": max(0, passes.peak - gradients),
            "libraries": LIBRARIES,
        },
        host_bytes=max(4 * params, teacher),
        moments_bytes=2 * sum(held_bytes(4 * size, crosses=device != "cpu") for size in sizes),
        waiting_bytes=sum(held_bytes(size, crosses=device != "cpu") for size in passes.handed_over),
        disk_bytes=stored_bytes * (2 * params + base_params) + STATE_BYTES * trained + carried * params,
    )


def scoring_footprint(
    config: "PreTrainedConfig",
    calibration: "CalibrationSettings",
    prune: "PruneSettings",
    *,
    device: str,
    free_bytes: int,
    stored_bytes: int = 2,
) -> Footprint:
    """Estimate a measurement of layers and groups.

    Args:
        config: Of the model that is measured.
        calibration: Size of the calibration set, and what it may take.
        prune: ``criterion`` counts.
        device: Type of the device.
        free_bytes: Memory that is free there, by which what is set to ``auto`` is chosen.
        stored_bytes: Bytes a parameter of the checkpoint.
    """
    dtype = dtype_of(calibration.precision) or torch.float32
    shape = model_shape(config)
    weights = weights_bytes(shape, calibration, dtype, free_bytes)
    tokens = (calibration.sequences, calibration.sequence_length)
    micro_batch = calibration.micro_batch or fitting_micro_batch(
        config, tokens, device=torch.device(device), free_bytes=free_bytes
    )
    states, crosses = tokens[0] * tokens[1] * config.hidden_size * dtype.itemsize, device != "cpu"
    observed = CRITERIA[prune.criterion].observed
    goes_back = observed in ("weight_gradients", "output_gradients")
    layers = len(shape.layers) * goes_back
    auto_here = calibration.state_memory == "auto" and not crosses
    host_bytes = free_bytes // 2 if auto_here else state_memory(calibration)
    room = share_out(
        layers,
        states,
        crosses=crosses,
        device_bytes=device_memory(free_bytes - weights) if crosses else host_bytes - states * layers,
        host_bytes=host_bytes,
    )
    kept = 0
    if goes_back:
        family, a_channel = family_of(config), tokens[0] * tokens[1] * dtype.itemsize
        modules = list(build_empty(config).get_submodule(family.layers).children())
        chosen = choose_outputs(family, modules, a_channel, room.left_bytes)
        kept = a_channel * sum(width for *_, width in chosen)
    micro_batch = min(micro_batch, tokens[0])
    passes = simulate_layer(
        config,
        dtype,
        micro_batch,
        tokens[1],
        of_weights=observed == "weight_gradients",
        backward=goes_back,
        add=CRITERIA[prune.criterion].add if observed in ("inputs", "output_gradients") else None,
    )
    head = simulate_head(config, dtype, micro_batch, tokens[1], device=device)
    squares = 0
    if CRITERIA[prune.criterion].squares:
        layer = max(shape.layers, key=shape.layer_num_params)
        squares = squares_bytes([layer.query_heads * head_dim(config), layer.mlp_width])
    in_host = held_bytes(states, crosses=crosses) * (room.in_host + (not room.stays))
    here = states * (room.on_device + room.stays) + in_host * (not crosses)
    return Footprint(
        parts={
            "weights": weights,
            "kept layer inputs": here,
            "kept layer outputs": kept,
            "a layer's passes": max(passes.peak, head.peak),
            **({"sums of products": squares} if squares else {}),
            "libraries": LIBRARIES,
        },
        host_bytes=max(in_host, weights) * crosses,
        disk_bytes=shape.num_params() * stored_bytes + states * (layers - room.on_device - room.in_host),
    )


def weights_bytes(
    shape: "ModelShape", calibration: "CalibrationSettings", dtype: torch.dtype, free_bytes: int
) -> int:
    """Return what the weights of a model take that is measured: all, or those of one layer at a time."""
    streamed = calibration.weights == "streamed"
    if calibration.weights == "auto":
        streamed = shape.num_params() * dtype.itemsize > free_bytes // 2
    largest = max(map(shape.layer_num_params, shape.layers))
    return (shape.outside_params + largest if streamed else shape.num_params()) * dtype.itemsize


def evaluation_footprint(
    config: "PreTrainedConfig", settings: "EvaluationSettings", *, device: str, stored_bytes: int = 2
) -> Footprint:
    """Estimate perplexity and benchmarks; the longest answer to a benchmark is not known.

    Args:
        config: Of the model that is measured.
        settings: ``batch_size`` is not 0.
        device: Type of the device.
        stored_bytes: Bytes a parameter of the checkpoint.
    """
    dtype = dtype_of(settings.precision) or torch.float32
    params = model_shape(config).num_params()
    batch, length = settings.batch_size, settings.perplexity_length
    if not settings.perplexity_stride:  # else there are more windows
        batch = min(batch, settings.perplexity_windows)
    passes = simulate_inference(config, dtype, batch, length)
    positions = min(chunk_positions(config.vocab_size, device), batch * length)
    if settings.tasks:
        positions = max(positions, 256 if device == "cpu" else 2048)
    # Logits, in float32 too if they are not, and their logarithms: when a pass is over.
    logits = positions * config.vocab_size * (8 if dtype == torch.float32 else 8 + dtype.itemsize)
    return Footprint(
        parts={
            "weights": params * dtype.itemsize,
            "activations, then logits": max(passes.peak, passes.kept + logits),
            "libraries": LIBRARIES,
        },
        host_bytes=params * dtype.itemsize,
        disk_bytes=2 * params * stored_bytes,
    )


def planned_evaluation(
    config: "PreTrainedConfig", settings: "EvaluationSettings", device: str
) -> "EvaluationSettings":
    """Return the settings with a batch that fits into the free memory; logs what will be taken.

    Args:
        config: Of the model that is measured.
        settings: ``batch_size`` 0 takes the largest power of 2 up to 64 that fits.
        device: Type of the device.

    Raises:
        OutOfMemoryError: If it cannot fit.
    """
    free = available_bytes(device) // (max(1, settings.ranks) if device == "cpu" else 1)
    sizes = [2**power for power in range(6, -1, -1)]
    if not settings.batch_size:
        longest = MOST_TOKENS.get(device, 32768) // settings.perplexity_length
        for size in [size for size in sizes if size <= longest] or [1]:
            settings = replace(settings, batch_size=size)
            if evaluation_footprint(config, settings, device=device).device_bytes <= 0.8 * free:
                break
        log.info("evaluation.batch_size=0: %d sequences at once", settings.batch_size)
    smaller = (replace(settings, batch_size=size) for size in sizes if size < settings.batch_size)
    alternatives = (
        (f"evaluation.batch_size={other.batch_size}", evaluation_footprint(config, other, device=device))
        for other in smaller
    )
    check_fit("evaluate", evaluation_footprint(config, settings, device=device), free, device, alternatives)
    return settings


def check_scoring(
    config: "PreTrainedConfig",
    calibration: "CalibrationSettings",
    prune: "PruneSettings",
    device: str,
) -> None:
    """Log what a measurement will take.

    Raises:
        OutOfMemoryError: If it cannot fit.
    """
    free = available_bytes(device)

    def footprint(settings: "CalibrationSettings") -> Footprint:
        return scoring_footprint(config, settings, prune, device=device, free_bytes=free)

    others = (
        ("calibration.micro_batch=1", replace(calibration, micro_batch=1)),
        ("calibration.weights=streamed", replace(calibration, weights="streamed")),
        (
            "calibration.weights=streamed, calibration.micro_batch=1, calibration.state_memory=1GB",
            replace(calibration, weights="streamed", micro_batch=1, state_memory="1GB"),
        ),
    )
    check_fit("scoring", footprint(calibration), free, device, ((text, footprint(s)) for text, s in others))


def check_fit(
    step: str,
    needed: Footprint,
    free: int,
    device: str,
    alternatives: Iterable[tuple[str, Footprint]],
    other_runs: Iterable[tuple[str, Footprint]] = (),
) -> None:
    """Log what a step will take.

    Args:
        step: Its name.
        needed: What it takes.
        free: Bytes that are free.
        device: Type of the device.
        alternatives: Settings under which it takes less.
        other_runs: Such that change the result, too.

    Raises:
        OutOfMemoryError: If it cannot fit.
    """
    where = "the GPU" if device != "cpu" else "this machine"
    log.info("memory: %s needs about %s; %s is free on %s", step, needed, gigabytes(free), where)
    if needed.device_bytes * TOLERANCE <= free:
        return
    fitting = [text for text, other in other_runs if other.device_bytes <= free]
    anew = f"Set {' or '.join(fitting)}, which begins another run"
    for text, other in alternatives:
        if other.device_bytes <= free:
            way = f"Set {text}: it takes about {gigabytes(other.device_bytes)}, and the same run resumes"
            if fitting and text.startswith("cluster."):
                way += f". {anew}, to stay on {where}"
            break
    else:
        way = "No setting makes it fit: take a machine with more memory, or end what else uses it"
        if fitting:
            way = f"{anew}, or take a machine with more memory"
    raise OutOfMemoryError(f"{step} needs about {needed} on {where}, where {gigabytes(free)} is free. {way}.")


@contextmanager
def explaining_memory(settings: str, *, resumes: bool = True) -> Iterator[None]:
    """Turn running out of memory into one line.

    Args:
        settings: What to lower, such as ``training.micro_batch``.
        resumes: Whether the run's key stays.

    Raises:
        OutOfMemoryError: If the device or the host refuses memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text
        if not known:
            raise
        then = ": the same run resumes" if resumes else ", which begins another run, or add memory"
        raise OutOfMemoryError(
            f"out of memory: {text.partition('. ')[0][:200]}. Set {settings}{then}."
        ) from error


def gigabytes(size: int) -> str:
    """Return a size as text."""
    return f"{size / 1e9:.1f} GB"
