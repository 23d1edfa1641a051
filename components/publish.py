"""Component publish."""

from kfp import dsl

from components.decorator import component


@component
def publish(
    run: dict,
    checkpoint_uri: str,
    result: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    model: dsl.Output[dsl.Model],
) -> str:
    """Publish the final checkpoint and the report, and register the model; returns its URI."""
    from components.runtime import task

    with task("publish"):
        from core.steps.publish import run_publish

        return run_publish(run=run, checkpoint_uri=checkpoint_uri, result=result, report=report, model=model)
