"""Component needs-run."""

from components.decorator import component


@component
def needs_run(run: dict, being_done_by: str) -> bool:
    """Say whether anything is left to do for this run key, by this execution."""
    from components.runtime import task

    with task("needs-run"):
        from core.steps.needs_run import run_needs_run

        return run_needs_run(run=run, being_done_by=being_done_by)
