"""The step that decides which groups stay: score-layers."""

import hashlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core.runs.run import Run
from core.settings.prune import slices_or_ranks
from core.steps.deciding import open_for_decision
from core.steps.frame import Artifact, Workspace, compute_once, hand_over
from core.steps.measuring import PhaseMeasurement
from core.storage.interface import join_uri
from core.storage.layout import PLAN, RESUME, STATISTICS
from core.storage.publication import Publication, find_publication, open_publication
from core.tracking.mlflow import ChildRun
from core.training.resume import remove_states

if TYPE_CHECKING:
    from core.pruning.plan import LayerPlan
    from core.pruning.scoring.statistics import Statistics

log = logging.getLogger(__name__)


def run_score_layers(
    *, run: Mapping[str, Any], phase: int, checkpoint_uri: str, data_uri: str, plan: Artifact
) -> None:
    """Decide which groups stay in each layer, so that the phase ends at its size.

    The statistics are those that calibrate has published. With several steps a phase, the checkpoint is
    opened once, and cut and measured again for each step after the first; a task that was killed and is
    started again goes on after what it has measured. Where statistics do not decide, it is opened for that.
    If the method makes a model of its own, that is published beside the plan.
    """
    this = Run.load(run)
    uri = this.phase_uri(phase, "scored")

    def compute(work: Workspace) -> dict[str, Any]:
        from core.model.checkpoint import Checkpoint
        from core.pruning.methods.method import decision_of
        from core.pruning.planning import plan_phase, settings_for, shape_under
        from core.pruning.scoring.statistics import Statistics
        from core.steps.footprint import explaining_memory
        from core.storage.hashing import file_sha256

        source, data = open_publication(checkpoint_uri), open_publication(data_uri)
        calibrated = open_publication(this.phase_uri(phase, "calibrated"))
        before = open_publication(this.phase_uri(phase - 1, "scored")).read_json(PLAN) if phase > 1 else {}

        measurement = PhaseMeasurement(this, phase, source, data, work.scratch)

        def remeasure(layers: "tuple[LayerPlan, ...]", step: int) -> "Statistics":
            measurement.cut(layers)
            made_of = {"statistics": digest, "cut": hashlib.sha256(repr(layers).encode()).hexdigest()}
            with measurement.stages(join_uri(uri, RESUME, f"{step:04d}"), **made_of) as stages:
                found = stages.result()
                if found is None:
                    found = measurement.measure(step, stages)
                    stages.finish(found)
            return found

        checkpoint = Checkpoint(source.fetch(work.scratch, only=["config.json"]))
        statistics = calibrated.fetch(work.scratch / "calibrated", only=[STATISTICS]) / STATISTICS
        digest = file_sha256(statistics)
        prune = settings_for(this.settings.prune, checkpoint.family)
        dense = shape_under(prune, this.dense, checkpoint.config)
        figures: dict[str, Any] = {}
        with explaining_memory("calibration.micro_batch=1"):
            decided = plan_phase(
                Statistics.load(statistics),
                dense=dense,
                current=dense.with_layers(checkpoint.layers),
                sparsity=before.get("sparsity", (0.0,) * len(checkpoint.layers)),
                target_params=this.phase_params[phase - 1],
                settings=prune,
                checkpoint=source.digest,
                statistics_digest=digest,
                remeasure=remeasure,
                decide=decision_of(
                    prune, lambda: open_for_decision(this, phase, source, data, work, figures)
                ),
            )
        decided.save(work.out / PLAN)
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
            **figures,
        }

    def track(child: ChildRun, report: dict[str, Any], published: Publication) -> None:
        child.log_series("mask_loss", list(enumerate(report.get("mask_losses", ()), start=1)))
        decided = published.read_json(PLAN)
        for name in ("importance", "sparsity"):
            child.log_series(name, enumerate(decided[name]))

    prune = this.settings.prune
    if prune.generates and slices_or_ranks(prune) and find_publication(uri) is None:
        from core.steps.self_text import write_own_text

        write_own_text(this)
    published = compute_once(this, uri, phase=phase, step="score-layers", compute=compute, track=track)
    remove_states(join_uri(uri, RESUME))
    hand_over(published, PLAN, plan)
