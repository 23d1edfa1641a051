"""Component check-pod: of the small pipeline by which ``adapt-pruner doctor`` looks into a cluster."""

from components.decorator import component


@component
def check_pod(expected: dict):
    """Check from inside a pod that a run would find there what it needs."""
    from components.runtime import task

    with task("check-pod"):
        from core.steps.check_pod import run_check_pod

        run_check_pod(expected=expected)
