"""What commands share: how they show examples and logs, and how they get at a model."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from core.errors import SettingsError

MODEL_HELP = "MODEL is a folder or an s3:// address of a Hugging Face checkpoint"


def example(*lines: str) -> str:
    """Return an epilog that shows commands; click does not wrap lines after a backspace character."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


def prepare_for(model: str, name: str = "MODEL") -> None:
    """Refuse a folder that is not there, and quiet libraries, before anything heavy is imported."""
    from components.runtime import quiet_libraries

    quiet_libraries()
    if "://" not in model and not Path(model).is_dir():
        raise SettingsError(
            [f"{name}={model} is not a folder. Give the folder or s3:// address of a checkpoint."]
        )


@contextlib.contextmanager
def log_on_stderr() -> Iterator[None]:
    """Show core's log lines, for a command that works long and has no tasks."""
    core, handler = logging.getLogger("core"), logging.StreamHandler()
    level = core.level
    core.addHandler(handler)
    core.setLevel(logging.INFO)
    try:
        yield
    finally:
        core.removeHandler(handler)
        core.setLevel(level)
