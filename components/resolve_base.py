"""Component resolve-base."""

from typing import NamedTuple

from components.decorator import component


@component
def resolve_base(
    base_model: str,
    revision: str,
    target: str,
    method: str,
    recipe: dict,
    fixed: dict,
    job: str,
    accelerated: list,
) -> NamedTuple("Outputs", run=dict, base_uri=str, being_done_by=str):
    """Pin the base model's revision, plan all phases and open the run, or say who works on it."""
    from components.runtime import task

    with task("resolve-base"):
        from core.steps.resolve_base import run_resolve_base

        return run_resolve_base(
            base_model=base_model,
            revision=revision,
            target=target,
            method=method,
            recipe=recipe,
            fixed=fixed,
            job=job,
            accelerated=accelerated,
        )
