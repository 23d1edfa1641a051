"""Folders that a command writes into are tried before anything starts."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from core.errors import SettingsError


def check_folders(folders: Mapping[str, Path]) -> None:
    """Make folders and try to write there.

    Args:
        folders: Setting and its value, as an error is to name them, to the folder.

    Raises:
        SettingsError: With every folder that cannot be written.
    """
    problems = []
    for name, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problems.append(
                f"{name} cannot be written ({error.strerror}). Give a folder that you may write to."
            )
    if problems:
        raise SettingsError(problems)
