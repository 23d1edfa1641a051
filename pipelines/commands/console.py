"""What commands share: examples, options, logs, tables, and access to a model."""

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from core.errors import SettingsError

if TYPE_CHECKING:
    from rich.table import Table

    from core.report.tables import ResultTable
    from core.storage.interface import Store

MODEL_HELP = "MODEL is a Hugging Face checkpoint: a folder or an s3:// address"
STORE_HELP = "STORE is the storage.store of a recipe: a folder or an s3:// address"
PATH = click.Path(path_type=Path)

set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting, such as prune.target=80%; may be repeated.",
)


def example(*lines: str) -> str:
    """Return an epilog that shows commands; click does not wrap lines after a backspace character."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


def refuse_without(needed: str, given: bool, names: Iterable[str]) -> None:
    """Refuse options on the command line that do nothing without ``needed``; the environment's may stay.

    Args:
        needed: Option, as it is typed.
        given: Whether it is given.
        names: Parameters of the command.

    Raises:
        SettingsError: If one of them is given without it.
    """
    context = click.get_current_context()
    found = {name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    typed = [option.opts[0] for option in context.command.params if option.name in found]
    if typed and not given:
        listed, need = " and ".join(typed), "needs" if len(typed) == 1 else "need"
        raise SettingsError([f"{listed} {need} {needed}. Add it, or leave {listed} out."])


def prepare_for(model: str, name: str = "MODEL") -> None:
    """Refuse a folder that does not exist, and quiet libraries, before anything heavy is imported."""
    from components.runtime import quiet_libraries

    quiet_libraries()
    if "://" not in model and not Path(model).is_dir():
        raise SettingsError(
            [f"{name}={model} is not a folder. Give the folder or s3:// address of a checkpoint."]
        )


@contextlib.contextmanager
def local_checkpoint(model: str, *, only: Sequence[str] | None = None, verify: bool = True) -> Iterator[Path]:
    """Give the folder of a checkpoint; a published one is verified, a remote one fetched first.

    Args:
        model: A folder, or the URI of a publication. A folder that is a publication is verified whole, less
            the model card, which may have been edited.
        only: Files to fetch of a URI; None for all.
        verify: Whether a folder is verified here.
    """
    from core.scratch import scratch_folder
    from core.storage.layout import CARD
    from core.storage.publication import open_publication, verify_folder

    if "://" not in model:
        yield verify_folder(Path(model), may_differ=(CARD,)) if verify else Path(model)
        return
    with scratch_folder() as scratch:
        yield open_publication(model).fetch(scratch, only=only)


@contextlib.contextmanager
def log_on_stderr() -> Iterator[None]:
    """Show core's log lines, for a long command without tasks."""
    core, handler = logging.getLogger("core"), logging.StreamHandler()
    level = core.level
    core.addHandler(handler)
    core.setLevel(logging.INFO)
    try:
        yield
    finally:
        core.removeHandler(handler)
        core.setLevel(level)


def print_table(table: "Table") -> None:
    """Print a table; into a pipe, one line a row."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 1000
    Console(highlight=False, markup=False, width=width).print(table)


def print_result_table(table: "ResultTable") -> None:
    """Print a table of results and its notes."""
    from rich.table import Table

    columns = table.columns()
    shown = Table(title=table.title, title_justify="left", box=None)
    for name in columns:
        shown.add_column(name, justify="left" if name in table.labels else "right")
    for row in zip(*columns.values(), strict=True):
        shown.add_row(*map(printable, row))
    print_table(shown)
    for note in table.notes:
        click.echo(printable(note))


def printable(text: str, keep: str = "") -> str:
    """Return a text without anything that steers a terminal, but for the characters to ``keep``."""
    return "".join(letter if letter.isprintable() or letter in keep else "?" for letter in text)


def opened_store(store: str) -> "Store":
    """Open a store that exists, before anything heavy is imported."""
    if "://" not in store and not Path(store).is_dir():
        raise SettingsError(
            [f"STORE={store} is not a folder. Give the folder or s3:// address that storage.store names."]
        )
    from core.storage.store import open_store

    return open_store(store)
