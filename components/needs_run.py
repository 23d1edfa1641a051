"""Component needs-run."""

from typing import NamedTuple

from components.decorator import component


@component
def needs_run(run: dict, being_done_by: str) -> NamedTuple(
    "Outputs", Output=int, checkpoint_uri=str, result_uri=str, data_uri=str
):
    """Say which phase is the first with work for this run key and this execution; 0 if there is none."""
    from components.runtime import task

    with task("needs-run"):
        from core.steps.needs_run import run_needs_run

        return tuple(run_needs_run(run=run, being_done_by=being_done_by))
