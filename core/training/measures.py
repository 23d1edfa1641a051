"""What a training measures at each step: kept over attempts, stored with its states, shown as curves."""

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from core.errors import TrainingError
from core.machine.memory import peak_bytes
from core.training.rows import Rows
from core.training.state import TrainingProgress

_MEDIAN_OF = 100
_AT_LEAST = 20
"""Losses that a median is of, at most and at least."""
_PATIENCE = 20
"""Steps in a row above the limit after which a training has diverged."""

_BFLOAT16_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
}
"""Words of an accelerator's name to its dense bfloat16 operations a second, by its data sheet."""


def peak_flops(accelerator: str) -> float | None:
    """Return the dense bfloat16 operations a second of an accelerator; None if they are not known.

    Args:
        accelerator: Its name by CUDA: NVIDIA H100 80GB HBM3. NVL cards are slower than their namesakes.
    """
    if "NVL" in accelerator:
        return None
    known = (flops for name, flops in _BFLOAT16_FLOPS.items() if re.search(rf"\b{name}\b", accelerator))
    return next(known, None)


class Measures:
    """The curves of a training, a point at each optimizer step.

    Attributes:
        losses: (global step, loss, learning rate) of each step that is done.
        series: Name of each other curve to its (global step, value).
        trained_tokens: Tokens that counted in the loss.
    """

    def __init__(
        self, model: PreTrainedModel, done: TrainingProgress, *, precision: str, ranks: int = 1
    ) -> None:
        """Go on where an earlier attempt has stopped; ``ranks`` accelerators do the work."""
        self.losses = list(done.losses)
        self.series = {name: list(points) for name, points in done.series.items()}
        self.trained_tokens = done.trained_tokens
        self._model = model
        name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else ""
        peak = peak_flops(name) if precision == "bfloat16" else None
        self._peak_flops = ranks * peak if peak else None

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Return all curves so far."""
        return curves_of(self.losses, self.series)

    def add_step(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        batch: Rows,
        rate: float,
        seconds: float,
        left_s: float,
    ) -> None:
        """Add what a step has measured.

        Args:
            step: Global step.
            values: ``loss``, and whatever else has a curve.
            batch: The global batch.
            rate: Learning rate.
            seconds: Time of the step.
            left_s: Time that the other steps of the phase will take.
        """
        counted, tokens = batch.trained_tokens, batch.input_ids.numel()
        self.losses.append((step, values["loss"], rate))
        self.trained_tokens += counted
        flops = step_flops(self._model, batch.input_ids.shape, counted) / seconds
        points = {name: value for name, value in values.items() if name != "loss"} | {
            "step_tokens_per_s": tokens / seconds,
            "peak_memory_bytes": peak_bytes(self._model.device),
            "model_flops_per_s": flops,
            "time_left_s": left_s,
        }
        if self._peak_flops is not None:
            points["model_flop_utilisation"] = flops / self._peak_flops
        self.add(step, points)

    def add(self, step: int, points: Mapping[str, float]) -> None:
        """Add a point to each of some curves."""
        for name, value in points.items():
            self.series.setdefault(name, []).append((step, value))

    def progress(self, seconds: float) -> TrainingProgress:
        """Return how far the training has come in so many seconds of all attempts."""
        return TrainingProgress(
            losses=self.losses, trained_tokens=self.trained_tokens, seconds=seconds, series=self.series
        )


def curves_of(
    losses: Sequence[tuple[int, float, float]], series: Mapping[str, Sequence[tuple[int, float]]]
) -> dict[str, list[tuple[int, float]]]:
    """Return the name of each curve of a training to its (global step, value); see ``TrainingReport``."""
    return {
        "loss": [(step, loss) for step, loss, _ in losses],
        "learning_rate": [(step, rate) for step, _, rate in losses],
        **{name: [(step, value) for step, value in points] for name, points in [*series.items()]},
    }


def step_flops(model: PreTrainedModel, batch: Sequence[int], counted: int) -> int:
    """Return the floating-point operations of the products in one forward and backward pass.

    6 a weight and token (4 if it is frozen), and 12 * T for each of a head's dimensions in attention, masked
    or not. The output head counts at trained positions; what gradient checkpointing computes again, and a
    teacher, do not.

    Args:
        model: Has been built; nothing is run.
        batch: S and T, sequences and tokens of each.
        counted: Trained tokens.
    """
    sequences, length = batch
    a_token = attention = 0
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.Linear):
            a_token += _passes(module.weight) * module.weight.numel()
            if name.removesuffix(".base_layer").endswith("self_attn.o_proj"):  # beneath an adapter
                attention += module.in_features  # H * A
    head = model.get_output_embeddings().weight
    of_head = _passes(head) * head.numel() * counted
    return a_token * sequences * length + of_head + 12 * attention * sequences * length**2


def _passes(weight: Tensor) -> int:
    return 6 if weight.requires_grad else 4


class DivergenceWatch:
    """Stops a training whose loss has left the level that it had.

    Attributes:
        steps_above: For how many steps, up to the last one, the loss has been above the limit.
    """

    def __init__(self, most: float, losses: Sequence[tuple[int, float, float]]) -> None:
        """Look at the losses of earlier attempts.

        Args:
            most: Largest loss, as a multiple of the running median; 0 for no limit.
            losses: As in ``TrainingProgress``.
        """
        self.steps_above = 0
        self._most = most
        self._usual: deque[float] = deque(maxlen=_MEDIAN_OF)
        for step, loss, _ in losses:
            self.see(step, loss)

    def see(self, step: int, loss: float) -> None:
        """Take the loss of another step; those above the limit are not part of the median.

        Raises:
            TrainingError: If it has been too high for too long.
        """
        # The first loss is the cut model's, before it has learnt.
        usual = median(self._usual) if len(self._usual) >= _AT_LEAST else next(iter(self._usual), math.inf)
        if not self._most or loss <= self._most * usual:
            self.steps_above = 0
            self._usual.append(loss)
            return
        self.steps_above += 1
        if self.steps_above == _PATIENCE:
            raise TrainingError(
                f"training has stopped at step {step + 1}: for {_PATIENCE} steps the loss, now {loss:.3g}, "
                f"has been above training.max_loss_rise={self._most:g} times its level of {usual:.3g}. "
                "Lower training.learning_rate, which makes it another run. Rerunning this one resumes from "
                "the last state before the rise; it goes beyond with a higher max_loss_rise."
            )
