"""A JSON file that is one list, read one element after the other."""

import json
from collections.abc import Iterator
from typing import Any, TextIO

_CHUNK_CHARS = 2**20
_MAX_ELEMENT_CHARS = 2**28


def elements(file: TextIO) -> Iterator[Any]:
    """Yield the elements of the list that a file holds; memory holds little more than one.

    Raises:
        ValueError: If the file is not valid, an element is nested too deeply, or is larger than 256 MB.
    """
    decoder = json.JSONDecoder()
    text, place = file.read(_CHUNK_CHARS).lstrip()[1:], 0
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if text.startswith("]", place):
            return
        try:
            element, end = decoder.raw_decode(text, place)
        except RecursionError:
            raise ValueError("an element is nested too deeply") from None
        except json.JSONDecodeError:
            end = len(text)
        if end < len(text):  # what ends with the text may go on in the file
            yield element
            place = end
            continue
        more = file.read(max(_CHUNK_CHARS, len(text) - place))
        if not more or len(text) - place > _MAX_ELEMENT_CHARS:
            raise ValueError("an element of the list is not valid, or does not end")
        text, place = text[place:] + more, 0
