"""Component finalize."""

from kfp import dsl

from components.decorator import component


@component
def finalize(recipe: dict, job: str, status: dsl.PipelineTaskFinalStatus):
    """Close the run, whether it succeeded or not: its status, and the checkpoints that need not stay."""
    from components.runtime import task

    with task("finalize"):
        from core.settings.storage import StorageSettings
        from core.steps.finalize import run_finalize

        # An exit task sees the pipeline's parameters only, and an edited recipe may lack the section.
        store = recipe.get("storage", {}).get("store", StorageSettings.store)
        run_finalize(store=store, job=job, succeeded=status.state == "SUCCEEDED")
