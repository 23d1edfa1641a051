"""Settings of a text source, for the sections ``calibration``, ``training`` and ``evaluation``."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from core.errors import refuse
from core.quantities import in_range, parse_count
from core.settings.identity import HOW

_LARGEST_WEIGHT = 10**9


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A set of documents or conversations."""

    path: str = ""
    """A file or folder (``.txt``, ``.jsonl``, ``.json``, ``.parquet``, ``.arrow`` or ``.csv``),
    ``package:NAME/path`` or a Hugging Face data set id."""
    subset: str = ""
    """Configuration name of a Hugging Face data set."""
    revision: str = ""
    """Commit, branch or tag of a Hugging Face data set. It is pinned to a commit when a run begins; empty
    takes the newest."""
    split: str = "train"
    """Split of a Hugging Face data set (files: always one split). A slice such as ``train[:90%]`` works for
    files and for data sets that are not streamed."""
    format: Literal["text", "chat", "instruction"] = "text"
    """``text``: one document in ``field``. ``chat``: a list of messages (role/content or from/value, or the
    JSON text of one) in ``field``. ``instruction``: ``prompt_fields`` joined by blank lines, answered by
    ``response_field``."""
    field: str = "text"
    """Column of the document or of the messages."""
    prompt_fields: tuple[str, ...] = ()
    """Columns of the prompt (format ``instruction``); empty ones are left out."""
    response_field: str = ""
    """Column of the answer (format ``instruction``)."""
    system_field: str = ""
    """Column of the system turn, for conversations that have none (formats ``chat`` and ``instruction``)."""
    weight: float = 1.0
    """Share of the training tokens relative to the other sources."""
    max_tokens: str = ""
    """Most training tokens to take (``50M``); the other sources then fill the rest. Empty for no limit."""
    max_malformed: float = dataclasses.field(default=0.01, metadata=HOW)
    """Share of the rows that may be malformed, such as a broken line, an unknown role or a conversation that
    the chat template refuses: they are counted and left out. More of them are an error. More empty rows, of
    no text or no reply, are a warning."""

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
        if self.format != "instruction":
            problems += [
                f"{name} needs format instruction. Leave it out, or set format."
                for name in ("prompt_fields", "response_field")
                if getattr(self, name)
            ]
        if self.format == "text" and self.system_field:
            problems.append("system_field needs format chat or instruction. Leave it out.")
        problems += in_range("max_malformed", self.max_malformed, 0, 1)
        try:
            if self.max_tokens and not parse_count(self.max_tokens):
                raise ValueError
        except ValueError:
            problems.append(f"max_tokens={self.max_tokens} is not a count such as 50M. Correct it.")
        refuse(problems)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        own = (*self.prompt_fields, self.response_field) if self.format == "instruction" else (self.field,)
        return (*own, self.system_field) if self.system_field else own

    @property
    def is_plain_text(self) -> bool:
        """Whether the path names a plain text."""
        return self.path.lower().removesuffix(".gz").endswith(".txt")

    @property
    def most_tokens(self) -> int | None:
        """``max_tokens`` as a number; None for no limit."""
        return parse_count(self.max_tokens) if self.max_tokens else None
