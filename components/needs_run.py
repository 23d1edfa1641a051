"""Component needs-run."""

from components.decorator import component


@component
def needs_run(run: dict) -> bool:
    """Say whether anything is left to do for this run key."""
    from components.runtime import task

    with task("needs-run"):
        from core.steps import run_needs_run

        return run_needs_run(run=run)
