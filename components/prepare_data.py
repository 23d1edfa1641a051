"""Component prepare-data."""

from components.decorator import component


@component
def prepare_data(run: dict, base_uri: str) -> str:
    """Tokenize and pack the texts once, one slice a phase; returns their URI."""
    from components.runtime import task

    with task("prepare-data"):
        from core.steps.prepare_data import run_prepare_data

        return run_prepare_data(run=run, base_uri=base_uri)
