"""Component calibrate."""

from kfp import dsl

from components.decorator import component


@component
def calibrate(
    run: dict, phase: int, checkpoint_uri: str, data_uri: str, statistics: dsl.Output[dsl.Artifact]
):
    """Measure how much every layer and group matters on the calibration set."""
    from components.runtime import task

    with task("calibrate", phase):
        from core.steps.calibrate import run_calibrate

        run_calibrate(
            run=run, phase=phase, checkpoint_uri=checkpoint_uri, data_uri=data_uri, statistics=statistics
        )
