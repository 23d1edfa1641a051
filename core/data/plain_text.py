"""Plain texts, cut into documents."""

import re
from collections.abc import Iterable, Iterator

_DOCUMENT_CHARS = 2_000
_SENTENCES = re.compile(rf".{{{_DOCUMENT_CHARS},}}?[.!?]\s|.+", re.DOTALL)


def merge_paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Cut a plain text into documents at the first blank line after about 2,000 characters.

    Text without blank lines is cut at line ends, and a very long line at sentence ends.
    """
    document = ""
    for line in lines:
        # Some corpora keep a whole article in one line.
        pieces = _SENTENCES.findall(line) if len(line) > 4 * _DOCUMENT_CHARS else [line]
        for piece in pieces:
            document += piece
            may_end = not line.strip() or len(pieces) > 1 or len(document) >= 4 * _DOCUMENT_CHARS
            if may_end and len(document) >= _DOCUMENT_CHARS:
                yield document.strip()
                document = ""
    if document.strip():
        yield document.strip()
