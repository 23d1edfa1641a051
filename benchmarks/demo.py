"""What the benchmarks share: the demo's recipe and model, options and tables."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from core.bases.importing import import_base
from core.settings.model import ModelSettings
from core.settings.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "demo.yaml"
DEMO = load_recipe(RECIPE)


def model_folder(model: str | Path | None, scratch: Path) -> Path:
    """Return the folder of a checkpoint or GGUF file, None for the demo's; unpack it below ``scratch``."""
    base = str(Path(model).resolve()) if model else DEMO.model.base
    return Path(import_base(ModelSettings(base=base), str(scratch / "store"))[0])


def parser_for(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a module's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)


def table_of(title: str, texts: Iterable[str], figures: Iterable[str]) -> Table:
    """Return a table with columns of text, then columns of figures."""
    table = Table(*texts, title=title, title_justify="left")
    for header in figures:
        table.add_column(header, justify="right")
    return table


def restart_peak() -> None:
    """Let ``peak_bytes`` start again from the memory that this process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the most memory that this process has held since ``restart_peak``, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
