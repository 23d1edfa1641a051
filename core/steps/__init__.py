"""What the components call, one function a step: URIs and settings in, a publication and a report out.

A step that is published already computes nothing. Heavy libraries are imported by the step that needs them.
"""

from core.steps.evaluate import run_evaluate
from core.steps.finalize import run_finalize
from core.steps.prepare import run_needs_run, run_prepare_data, run_resolve_base
from core.steps.prune import run_calibrate, run_prune_step, run_score_layers
from core.steps.publish import run_publish
from core.steps.train import run_recover_train

__all__ = [
    "run_calibrate",
    "run_evaluate",
    "run_finalize",
    "run_needs_run",
    "run_prepare_data",
    "run_prune_step",
    "run_publish",
    "run_recover_train",
    "run_resolve_base",
    "run_score_layers",
]
