"""Makes text from outside safe to show: without credentials, and without terminal controls."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

# A colon and digits up to a slash are a port; whatever else follows the colon is a password. A name alone is
# hidden too, as some servers take it for a token.
_USER_INFO = re.compile(r"""://([^/@:\s]*)(?::(?!\d+(?:[/?#,;\s]|$))[^\s'"<>]*|(?<=[^/]))@""")
_NAME = r"[\w.-]*(?:password|passwd|pwd|secret|token|signature|credential|access_?key|api_?key)[\w.-]*"
_IN_QUERY = re.compile(rf"([?&]{_NAME}=)[^&\s'\"]+", re.IGNORECASE)


def without_password(text: str) -> str:
    """Hide the password, or the token, of every URI in a text, for messages, parameters and reports."""
    return _IN_QUERY.sub(r"\1***", _USER_INFO.sub(_hidden, text))


def _hidden(match: re.Match[str]) -> str:
    return f"://{match[1]}:***@" if ":" in match[0][3:] else "://***@"


def holds_password(text: str) -> bool:
    """Return whether a text holds a URI with a password or a token."""
    return without_password(text) != text


def one_line(text: str) -> str:
    r"""Return a text without credentials, whose control characters are written out, as in ``\x1b``."""
    shown = without_password(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def passwords_in(data: Any, name: str = "") -> Iterator[str]:
    """Yield a problem for every text in nested settings that holds a password or a token.

    Args:
        data: A recipe's mappings, lists and values.
        name: Of the setting that ``data`` is.
    """
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from passwords_in(value, f"{name}.{key}" if name else str(key))
    elif isinstance(data, list | tuple):
        for number, value in enumerate(data):
            yield from passwords_in(value, f"{name}[{number}]")
    elif isinstance(data, str) and holds_password(data):
        shown = without_password(data)
        yield (
            f"{name}={shown} holds a password or a token, which would be stored with the run. Leave it out, "
            "and set it in the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for a store, "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or the whole MLFLOW_TRACKING_URI) for "
            "MLflow."
        )
