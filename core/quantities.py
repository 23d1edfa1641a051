"""Counts, shares and sizes as people write them: ``3.87B`` tokens, ``80%`` of the parameters, ``16GB``."""

import re
from collections.abc import Iterator

_NUMBER = r"\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE]\+?[0-9]+)?)\s*"
_LARGEST = 10**18
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_BYTE_PREFIXES = "kmgt"


def parse_count(value: int | float | str) -> int:
    """Read a count such as ``108M``, ``3.87B``, ``50k`` or ``134515008``.

    Raises:
        ValueError: If ``value`` is not a positive count.
    """
    match = re.fullmatch(rf"{_NUMBER}([kKmMbB]?)\s*", str(value))
    if match is None or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a count such as 108M, 3.87B or 134515008")
    count = _number(match[1]) * _COUNT_UNITS[match[2].lower()]
    if count > _LARGEST:
        raise ValueError(f"{value!r} is beyond any model or corpus")
    return round(count)


def parse_bytes(value: int | float | str) -> int:
    """Read a size such as ``16GB`` (10^9 bytes each), ``16GiB`` (2^30), ``32Gi``, ``500M`` or ``4096``.

    Raises:
        ValueError: If ``value`` is not a size, or names an unknown unit.
    """
    match = re.fullmatch(rf"{_NUMBER}(?:([kmgt])(i?))?b?\s*", str(value), re.IGNORECASE)
    if match is None or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a size such as 16GB, 500MB or 16GiB")
    number, prefix, binary = match.groups()
    power = _BYTE_PREFIXES.index(prefix.lower()) + 1 if prefix else 0
    size = _number(number) * (1024 if binary else 1000) ** power
    if size > _LARGEST:
        raise ValueError(f"{value!r} is beyond any memory")
    return round(size)


def is_share(value: str) -> bool:
    """Tell whether ``value`` reads like ``80%``."""
    return re.fullmatch(r"\s*[0-9.]+\s*%\s*", value) is not None


def in_range(name: str, value: float, low: float, high: float) -> Iterator[str]:
    """Yield what is wrong with a setting that must lie in [low, high], if anything is."""
    if not low <= value <= high:
        yield f"{name}={value} must lie between {low:,} and {high:,}. Change it."


def _number(digits: str) -> float:
    return float(re.sub("[_,]", "", digits))
