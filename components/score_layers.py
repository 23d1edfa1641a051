"""Component score-layers."""

from kfp import dsl

from components.decorator import component


@component
def score_layers(
    run: dict,
    phase: int,
    checkpoint_uri: str,
    data_uri: str,
    statistics: dsl.Input[dsl.Artifact],
    plan: dsl.Output[dsl.Artifact],
):
    """Decide which groups stay in each layer; the statistics are read where calibrate has published them."""
    from components.runtime import task

    with task("score-layers", phase):
        from core.steps.score_layers import run_score_layers

        run_score_layers(run=run, phase=phase, checkpoint_uri=checkpoint_uri, data_uri=data_uri, plan=plan)
