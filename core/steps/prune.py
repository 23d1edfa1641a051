"""Steps of a phase that make the model smaller: calibrate, score-layers and prune-step."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.runs.run import Run
from core.steps.once import (
    Artifact,
    Workspace,
    compute_once,
    describe_checkpoint,
    digest_of,
    hand_over,
    provenance_of,
)
from core.storage.publication import fetch, read_published
from core.tracking.mlflow import ChildRun

if TYPE_CHECKING:
    from torch import Tensor

    from core.pruning.plan import LayerPlan
    from core.pruning.scoring.statistics import Statistics

log = logging.getLogger(__name__)

_STATISTICS, _PLAN = "statistics.safetensors", "plan.json"


def run_calibrate(
    *, run: Mapping[str, Any], phase: int, checkpoint_uri: str, data_uri: str, statistics: Artifact
) -> None:
    """Measure layer similarities and group scores of a checkpoint."""
    this = Run.load(run)

    def compute(work: Workspace) -> dict[str, Any]:
        measured = _measure(this, phase, checkpoint_uri, data_uri, work.scratch)
        measured.save(work.out / _STATISTICS)
        return {
            "calibration_loss": measured.loss,
            "calibration_tokens": measured.tokens,
            "similarities": measured.similarities.tolist(),
        }

    def track(child: ChildRun, report: dict[str, Any]) -> None:
        child.log_series("similarity", enumerate(report.get("similarities", ())))

    uri = this.phase_uri(phase, "calibrated")
    compute_once(this, uri, phase=phase, step="calibrate", compute=compute, track=track)
    hand_over(uri, _STATISTICS, statistics)


def run_score_layers(
    *, run: Mapping[str, Any], phase: int, checkpoint_uri: str, data_uri: str, plan: Artifact
) -> None:
    """Decide which groups stay in each layer, so that the phase ends at its size.

    The statistics are those that calibrate has published. With several steps a phase, what the steps so far
    leave of the checkpoint is measured before the next one.
    """
    this = Run.load(run)
    prune = this.settings.prune

    def compute(work: Workspace) -> dict[str, Any]:
        from core.model.build import layer_shapes, load_config
        from core.model.families import family_of
        from core.pruning.planning import plan_phase, settings_for
        from core.pruning.scoring.statistics import Statistics
        from core.storage.hashing import file_sha256

        def remeasure(layers: "tuple[LayerPlan, ...]", step: int) -> "Statistics":
            return _measure(this, phase, checkpoint_uri, data_uri, work.scratch, step=step, layers=layers)

        config = load_config(fetch(checkpoint_uri, work.scratch, only=["config.json"]))
        shapes = layer_shapes(config)
        before = read_published(this.phase_uri(phase - 1, "scored"), _PLAN) if phase > 1 else {}
        calibrated = this.phase_uri(phase, "calibrated")
        statistics = fetch(calibrated, work.scratch / "calibrated", only=[_STATISTICS]) / _STATISTICS
        decided = plan_phase(
            Statistics.load(statistics),
            dense=this.dense,
            current=this.dense.with_layers(shapes),
            sparsity=before.get("sparsity", (0.0,) * len(shapes)),
            target_params=this.phase_params[phase - 1],
            settings=settings_for(prune, family_of(config)),
            checkpoint=digest_of(checkpoint_uri),
            statistics_digest=file_sha256(statistics),
            remeasure=remeasure,
        )
        decided.save(work.out / _PLAN)
        left, whole = (
            sum(map(this.dense.attention_params, layers)) for layers in (decided.after, this.dense.layers)
        )
        log.info(
            "%s of %s parameters stay, and %.1f %% of the dense model's attention",
            f"{decided.params_after:,}",
            f"{decided.params_before:,}",
            100 * left / whole,
        )
        return {
            "params": decided.params_after,
            "target_params": decided.target_params,
            "attention_removed": 1 - left / whole,
        }

    def track(child: ChildRun, report: dict[str, Any]) -> None:
        decided = read_published(uri, _PLAN)
        for name in ("importance", "sparsity"):
            child.log_series(name, enumerate(decided[name]))

    uri = this.phase_uri(phase, "scored")
    compute_once(this, uri, phase=phase, step="score-layers", compute=compute, track=track)
    hand_over(uri, _PLAN, plan)


def run_prune_step(*, run: Mapping[str, Any], phase: int, checkpoint_uri: str, model: Artifact) -> str:
    """Remove the groups that the plan, which score-layers has published, leaves out, a layer at a time.

    Returns:
        URI of the smaller checkpoint.
    """
    this = Run.load(run)

    def compute(work: Workspace) -> dict[str, Any]:
        from core.model.build import dtype_of
        from core.pruning.plan import Plan
        from core.pruning.surgery import prune_checkpoint

        scored = this.phase_uri(phase, "scored")
        plan = Plan.load(fetch(scored, work.scratch / "scored", only=[_PLAN]) / _PLAN)
        digest = digest_of(checkpoint_uri)
        prune_checkpoint(
            fetch(checkpoint_uri, work.scratch),
            work.out,
            plan,
            digest=digest,
            dtype=dtype_of(this.settings.model.dtype),
            provenance=provenance_of(this, phase, digest, step="prune-step"),
        )
        return {"params": plan.params_after}

    uri = this.phase_uri(phase, "pruned")
    compute_once(this, uri, phase=phase, step="prune-step", compute=compute)
    describe_checkpoint(uri, model)
    return uri


def _draw(run: Run, phase: int, step: int, data_uri: str, scratch: Path) -> "Tensor":
    """Return the calibration set of a pruning step of a phase, both counted over the run."""
    from safetensors.torch import load_file

    from core.pruning.scoring.calibration import draw_calibration

    name = "calibration.safetensors"
    pool = load_file(fetch(data_uri, scratch, only=[name]) / name)["input_ids"]
    number = (phase - 1) * 1000 + step  # prune.steps_per_phase is at most 1000
    sequences = run.settings.calibration.sequences
    return draw_calibration(pool, sequences=sequences, seed=run.settings.seed, step=number)


def _measure(
    run: Run,
    phase: int,
    checkpoint_uri: str,
    data_uri: str,
    scratch: Path,
    *,
    step: int = 0,
    layers: "tuple[LayerPlan, ...] | None" = None,
) -> "Statistics":
    """Measure a checkpoint, or what ``layers`` leave of it, for a pruning step of a phase."""
    from core.machine.precision import warn_if_emulated
    from core.model.build import dtype_of, pick_device
    from core.pruning.scoring.measurement import measure_checkpoint

    settings = run.settings
    warn_if_emulated("calibration", settings.calibration.precision, pick_device())
    return measure_checkpoint(
        fetch(checkpoint_uri, scratch),
        _draw(run, phase, step, data_uri, scratch),
        settings.calibration,
        settings.prune,
        dtype=dtype_of(settings.calibration.precision),
        seed=settings.seed,
        layers=layers,
        scratch=scratch,
    )
