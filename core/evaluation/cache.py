"""Results of an evaluation in a store, so that the same question to the same checkpoint is asked once.

A result is kept under a hash of all that it follows from, and of nothing else: the checkpoint's files, the
task with its version, prompts and metrics as lm-eval defines them, the items and the examples before them,
and the number format. Where the data lies, how many were asked for, and the batch size are not part of it.
Of a text, which is asked for its perplexity, it is the tokens of the windows.
"""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.evaluation.results import TaskAnswers
from core.storage.interface import join_uri
from core.storage.layout import CARD, HTML, RECORD, REPORT, answers_at
from core.storage.manifest import FileEntry, Manifest
from core.storage.publication import published_in
from core.storage.store import open_store
from core.untrusted import decode

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

FORMAT = 1
"""Of a kept result. Raise it if equal questions get another answer than before, beyond rounding."""

_PLACES = ("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "tag", "task_alias")


@dataclass(frozen=True, kw_only=True)
class AnswerCache:
    """The results of one checkpoint in a store."""

    store: str
    """URI."""
    checkpoint: str
    """Digest of the checkpoint's files: ``files_digest``, ``folder_digest``."""
    precision: str
    """Number format of the weights and activations."""

    def key(self, task: Any, *, stride: int) -> str:
        """Return what a task's result is kept under.

        Args:
            task: lm-eval's, with its number of examples set and its items chosen.
            stride: Of the windows, which whole documents depend on.
        """
        config = {name: value for name, value in task.dump_config().items() if name not in _PLACES}
        config["metadata"] = {**config.get("metadata", {}), "config_source": None}
        examples = task.sampler.df if hasattr(task, "sampler") and config.get("num_fewshot") else ()
        asked = {
            "format": FORMAT,
            "lm_eval": importlib.metadata.version("lm_eval"),
            "checkpoint": self.checkpoint,
            "precision": self.precision,
            "task": task.task_name,
            "version": str(task.VERSION),
            "config": config,
            "items": _digest(task.eval_docs),
            "examples": _digest(examples),
            "stride": stride if task.OUTPUT_TYPE == "loglikelihood_rolling" else 0,
        }
        text = json.dumps(asked, sort_keys=True, default=_name)
        return hashlib.sha256(text.encode()).hexdigest()

    def key_of_text(self, columns: "Mapping[str, Tensor]") -> str:
        """Return what the windows of a text are kept under, from all columns of their file."""
        asked: dict[str, Any] = {
            "format": FORMAT,
            "checkpoint": self.checkpoint,
            "precision": self.precision,
        }
        for name, column in sorted(columns.items()):
            content = hashlib.sha256(column.contiguous().numpy().tobytes()).hexdigest()
            asked[name] = [str(column.dtype), list(column.shape), content]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def find(self, key: str) -> TaskAnswers | None:
        """Return a kept result; None if there is none.

        Raises:
            StorageError: If it is damaged.
        """
        place = answers_at(key)
        try:
            content = open_store(self.store).read_bytes(place)
        except FileNotFoundError:
            return None
        where = join_uri(self.store, place)
        return decode(TaskAnswers, content, where, "Remove it: it is measured again.", newest=FORMAT)

    def keep(self, key: str, answers: TaskAnswers) -> None:
        """Keep a result."""
        text = json.dumps({"format": FORMAT, **asdict(answers)})
        open_store(self.store).write_bytes(answers_at(key), text.encode(), if_absent=True)


def files_digest(files: Iterable[FileEntry]) -> str:
    """Return the digest of a checkpoint's files, less those that no model reads: its card, reports."""
    unread = (CARD, HTML, RECORD, REPORT)
    return Manifest(files=tuple(entry for entry in files if entry.path not in unread)).digest


def folder_digest(folder: Path) -> str:
    """Return the digest of the checkpoint in a folder, from its manifest if it was published."""
    published = published_in(folder)
    if published is not None:
        return files_digest(published.manifest.files)
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    return files_digest(FileEntry.of(folder, name) for name in names)


def _digest(rows: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()


def _name(value: Any) -> str:
    """Name what is not JSON, such as a function in a task's configuration."""
    return getattr(value, "__qualname__", type(value).__name__)
