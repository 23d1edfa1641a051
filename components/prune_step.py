"""Component prune-step."""

from kfp import dsl

from components.decorator import component


@component
def prune_step(
    run: dict,
    phase: int,
    checkpoint_uri: str,
    data_uri: str,
    plan: dsl.Input[dsl.Artifact],
    pruned: dsl.Output[dsl.Model],
) -> str:
    """Remove groups by the plan, repair and distill what stays; returns the new checkpoint's URI."""
    from components.runtime import task

    with task("prune-step", phase):
        from core.steps.prune_step import run_prune_step

        return run_prune_step(
            run=run, phase=phase, checkpoint_uri=checkpoint_uri, data_uri=data_uri, model=pruned
        )
