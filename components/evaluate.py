"""Component evaluate."""

from kfp import dsl

from components.decorator import component


@component
def evaluate(
    run: dict,
    phase: int,
    checkpoint_uri: str,
    data_uri: str,
    summary: dsl.Output[dsl.Markdown],
    picture: dsl.Output[dsl.HTML],
):
    """Measure perplexity and the benchmarks."""
    from components.runtime import task

    with task("evaluate", phase):
        from core.steps.evaluate import run_evaluate

        run_evaluate(
            run=run,
            phase=phase,
            checkpoint_uri=checkpoint_uri,
            data_uri=data_uri,
            summary=summary,
            picture=picture,
        )
