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

        # An exit task sees the pipeline's parameters only. An edited recipe may lack the section, or have
        # another thing in its place, which resolve-base has refused.
        section = recipe.get("storage")
        store = section.get("store") if isinstance(section, dict) else None
        store = store if isinstance(store, str) else StorageSettings.store
        run_finalize(store=store, job=job, succeeded=status.state == "SUCCEEDED")
