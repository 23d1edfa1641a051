"""Settings of a text source, for the sections ``calibration``, ``training`` and ``evaluation``."""

from dataclasses import dataclass
from typing import Literal

from core.errors import refuse

_LARGEST_WEIGHT = 10**9


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A set of documents or conversations."""

    path: str = ""
    """A file or folder (``.txt``, ``.jsonl``, ``.json``, ``.parquet``, ``.arrow``), ``package:NAME/path``
    or a Hugging Face data set id."""
    subset: str = ""
    """Configuration name of a Hugging Face data set."""
    split: str = "train"
    """Split of a Hugging Face data set (files: always one split). A slice such as ``train[:90%]`` works for
    files and for data sets that are not streamed."""
    format: Literal["text", "chat", "instruction"] = "text"
    """``text``: one document in ``field``. ``chat``: a list of messages (role/content or from/value) in
    ``field``. ``instruction``: ``prompt_fields`` joined by blank lines, answered by ``response_field``."""
    field: str = "text"
    """Column of the document or of the messages."""
    prompt_fields: tuple[str, ...] = ()
    """Columns of the prompt (format ``instruction``); empty ones are left out."""
    response_field: str = ""
    """Column of the answer (format ``instruction``)."""
    weight: float = 1.0
    """Share of the training tokens relative to the other sources."""

    def __post_init__(self) -> None:
        """Check combinations."""
        problems = []
        if not self.path:
            problems.append("path is empty. Name a file, a package: path or a Hugging Face data set.")
        if not self.weight > 0:
            problems.append(f"weight={self.weight} must be positive. Leave the source out instead.")
        elif self.weight > _LARGEST_WEIGHT:
            problems.append(f"weight={self.weight} must be at most {_LARGEST_WEIGHT:,}. Lower all weights.")
        if self.format == "instruction" and not (self.prompt_fields and self.response_field):
            problems.append("format=instruction needs prompt_fields and response_field. Name the columns.")
        refuse(problems)
