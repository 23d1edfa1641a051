"""The templates of the report, of the other HTML pages and of the model card."""

import functools
import re
from collections.abc import Iterable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from core.quantities import count_text, seconds_text
from core.runs.record import perplexity_text


def render(template: str, **values: Any) -> str:
    """Fill in a template of the folder beside this module; a missing value is an error.

    In a ``.html``, all values but ``markupsafe.Markup`` are escaped.
    """
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("core.report"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "thousands": "{:,}".format,
        "count": count_text,
        "perplexity": perplexity_text,
        "duration": seconds_text,
        "code": code,
        "listed": listed,
    }
    environment.globals["zip"] = zip
    return environment


def code(text: Any) -> str:
    """Return text in backticks, without characters that would end them, the line or a table's cell."""
    plain = re.sub(r"[`|\s]+", " ", str(text))
    return f"`{plain}`"


def listed(items: Iterable[str]) -> str:
    """Write a list in a sentence: a, b and c."""
    *first, last = list(items) or [""]
    return f"{', '.join(first)} and {last}" if first else last
