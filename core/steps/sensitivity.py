"""A study of the sensitivity of all layers: texts into tokens, the losses, a page and a file of numbers."""

import functools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from core.data.samples import write_calibration_pool, write_perplexity_windows
from core.errors import DataError
from core.machine.precision import choose_precision, resolved
from core.model.build import dtype_of, load_model, load_tokenizer, pick_device
from core.model.checkpoint import Checkpoint
from core.pruning.planning import settings_for
from core.pruning.scoring.calibration import draw_calibration
from core.pruning.scoring.measurement import MeasuredCheckpoint
from core.pruning.sensitivity import Part, Sensitivity, layer_sensitivity
from core.report.drawing import inline_svg
from core.report.figures import sensitivity_figure
from core.report.templates import render
from core.runs.record import perplexity_text
from core.scratch import scratch_folder
from core.settings.calibration import CalibrationSettings
from core.settings.evaluation import EvaluationSettings
from core.settings.prune import PruneSettings
from core.settings.schema import Settings
from core.settings.texts import TextSource
from core.steps.footprint import planned_evaluation
from core.storage.store import replacing

_SEQUENCES, _LENGTH = 16, 256
"""Where no recipe says how much to calibrate and to measure on."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is studied.

    Attributes:
        model: The checkpoint, as the user names it.
        sparsity: Share of each layer that goes, in (0, 1).
        part: What the layers lose.
        settings: A recipe: its texts, its sizes, and all that it says of how scores and similarities are
            measured. Without one they are measured in the number format that this machine computes faster in.
        text: Path of the text to measure on; None takes the recipe's. Without a recipe, half of it is
            calibrated on.
        sequences: Sequences to calibrate on and to measure on; None takes the recipe's.
    """

    model: str
    sparsity: float
    part: Part
    settings: Settings | None
    text: str | None
    sequences: int | None

    def run(self, directory: Path) -> Sensitivity:
        """Study the checkpoint in ``directory``.

        Raises:
            DataError: If a text cannot be read or is too short.
            CheckpointError: If the checkpoint cannot be loaded, or what it computes is not finite.
            TargetError: If no layer has a whole group to lose.
            UnsupportedModelError: If the recipe asks for heads of a family that can lose none.
        """
        checkpoint = Checkpoint(directory)
        tokens, held_out = self._tokens(load_tokenizer(checkpoint))
        given, here = self.settings, functools.cache(lambda: choose_precision(pick_device()))
        calibration = resolved(given.calibration if given else CalibrationSettings(), here)
        evaluation = resolved(given.evaluation if given else EvaluationSettings(), here)
        evaluation = planned_evaluation(checkpoint.config, evaluation, pick_device().type)
        prune = settings_for(given.prune if given else PruneSettings(), checkpoint.family)
        statistics = MeasuredCheckpoint(
            checkpoint,
            calibration,
            prune,
            dtype=dtype_of(calibration.precision),
            seed=given.seed if given else 0,
        ).measure(tokens)
        # The losses need all layers at once, so this is loaded only when what was measured on is gone.
        model = load_model(checkpoint, dtype=dtype_of(evaluation.precision), device=pick_device())
        return layer_sensitivity(
            model,
            held_out,
            statistics,
            sparsity=self.sparsity,
            part=self.part,
            attention_unit=prune.attention_unit,
            batch_size=evaluation.batch_size,
        )

    def _tokens(self, tokenizer: Any) -> tuple[Tensor, Tensor]:
        """Return what is calibrated on and what is measured on, (S, T) each."""
        with scratch_folder() as scratch:
            path = scratch / "tokens.safetensors"
            if self.settings is None:
                assert self.text is not None, "checked by the command"
                wanted = 2 * (self.sequences or _SEQUENCES)
                source = TextSource(path=self.text)
                found = write_perplexity_windows(source, tokenizer, windows=wanted, length=_LENGTH, path=path)
                if found < 2:
                    raise DataError(
                        f"{self.text} fills only one sequence of {_LENGTH} tokens, but one is calibrated on "
                        "and another measured on. Name a longer text."
                    )
                first, second = load_file(path)["input_ids"].long().split([found // 2, found - found // 2])
                return first, second
            return self._calibration(self.settings, tokenizer, path), self._held_out(
                self.settings, tokenizer, path
            )

    def _calibration(self, settings: Settings, tokenizer: Any, path: Path) -> Tensor:
        wanted = settings.calibration
        assert wanted.source is not None, "settings are checked"
        sequences = self.sequences or wanted.sequences
        write_calibration_pool(
            wanted.source,
            tokenizer,
            sequence_length=wanted.sequence_length,
            packing=wanted.packing,
            documents=max(wanted.pool_documents, sequences),
            at_least=sequences,
            seed=settings.seed,
            path=path,
        )
        pool = load_file(path)["input_ids"]
        return draw_calibration(pool, sequences=sequences, seed=settings.seed, step=0)

    def _held_out(self, settings: Settings, tokenizer: Any, path: Path) -> Tensor:
        wanted = settings.evaluation
        source = TextSource(path=self.text) if self.text else wanted.perplexity
        assert source is not None, "checked by the command"
        write_perplexity_windows(
            source,
            tokenizer,
            windows=self.sequences or wanted.perplexity_windows,
            length=wanted.perplexity_length,
            path=path,
        )
        return load_file(path)["input_ids"].long()

    def write(self, result: Sensitivity, folder: Path) -> None:
        """Write ``sensitivity.html``, and last ``sensitivity.json``, whole or not at all."""
        numbers = {
            "model": self.model,
            "sparsity": self.sparsity,
            "part": self.part,
            "loss": result.loss,
            "perplexity": _finite(_perplexity(result.loss)),
            "rank_correlation": result.rank_correlation(),
            "layers": [
                {"layer": index, **asdict(layer), "perplexity": _finite(_perplexity(layer.loss))}
                for index, layer in enumerate(result.layers)
            ],
        }
        (folder / "sensitivity.html").write_text(self._page(result))
        with replacing(folder / "sensitivity.json") as path:
            path.write_text(json.dumps(numbers, indent=1) + "\n")

    def _page(self, result: Sensitivity) -> str:
        figure = sensitivity_figure(
            [layer.loss_increase for layer in result.layers], [layer.importance for layer in result.layers]
        )
        picture = inline_svg(figure, name="sensitivity", label="loss increase and importance of each layer")
        worst = max(range(len(result.layers)), key=lambda i: result.layers[i].loss_increase)
        boxes = [
            ("loss as it is", [f"{result.loss:.3f}"], "nats a token"),
            (
                "the layer that matters most",
                [str(worst)],
                f"pruned alone, it lifts the loss by {result.layers[worst].loss_increase:.3f}",
            ),
            ("rank correlation", [_correlation(result)], "of importance with loss increase"),
        ]
        header, *rows = self.rows(result)
        return render(
            "sensitivity.html",
            title="Sensitivity of the layers",
            subtitle=f"{self.model}, {self.what()}",
            cards=boxes,
            picture=picture,
            columns=dict(zip(header, zip(*rows, strict=True), strict=True)),
        )

    def what(self) -> str:
        """Return what was pruned, for a heading."""
        lost = {"both": "MLP channels and attention", "mlp": "MLP channels", "attention": "attention"}
        return f"{100 * self.sparsity:g} % of one layer's {lost[self.part]} pruned (whole groups only)"

    def rows(self, result: Sensitivity) -> list[list[str]]:
        """Return the table: its header, the model as it is, one row a layer."""
        header = ["layer", "importance", "removed", "loss increase", "perplexity"]
        dense = ["none", "", "", "", perplexity_text(_perplexity(result.loss))]
        return [
            header,
            dense,
            *(
                [
                    str(index),
                    f"{layer.importance:.4f}",
                    f"{100 * layer.removed:.1f} %",
                    f"{layer.loss_increase:+.4f}",
                    perplexity_text(_perplexity(layer.loss)),
                ]
                for index, layer in enumerate(result.layers)
            ),
        ]

    def correlation(self, result: Sensitivity) -> str:
        """Return how well importance ranks the layers, in words."""
        return f"rank correlation of importance with loss increase: {_correlation(result)}"


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _finite(value: float) -> float | None:
    """Return what JSON can hold."""
    return value if math.isfinite(value) else None


def _correlation(result: Sensitivity) -> str:
    value = result.rank_correlation()
    return "-" if value is None else f"{value:.2f}"
