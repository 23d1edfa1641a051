"""Quantities as people write them: ``3.87B`` tokens, ``80%`` of the parameters, ``16GB``, ``10min``."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_NUMBER = r"\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE]\+?[0-9]+)?)\s*"
_LARGEST = 10**18
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_BYTE_PREFIXES = "kmgt"
_SECONDS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """How often something happens: every so many steps or seconds; never if both are 0."""

    steps: int = 0
    seconds: float = 0.0

    def is_over(self, steps: int, seconds: float) -> bool:
        """Return whether it is time again, so many steps and seconds after the last time."""
        return 0 < self.steps <= steps or 0 < self.seconds <= seconds


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


def parse_interval(value: int | float | str) -> Interval:
    """Read an interval such as ``10min``, ``90s``, ``1.5h`` or ``200 steps``; ``0`` is never.

    Raises:
        ValueError: If ``value`` is none of them.
    """
    match = re.fullmatch(rf"{_NUMBER}(s|min|h|steps?)?\s*", str(value), re.IGNORECASE)
    number, unit = (_number(match[1]), (match[2] or "").lower()) if match else (1.0, "")
    in_steps = unit.startswith("step")
    if isinstance(value, bool) or (number and not unit) or (in_steps and not number.is_integer()):
        raise ValueError(f"{value!r} is not an interval such as 10min, 90s, 2h or 200 steps")
    if number > _LARGEST:
        raise ValueError(f"{value!r} is beyond any training")
    return Interval(steps=int(number)) if in_steps else Interval(seconds=number * _SECONDS.get(unit, 0))


def is_share(value: str) -> bool:
    """Tell whether ``value`` reads like ``80%``."""
    return re.fullmatch(r"\s*[0-9.]+\s*%\s*", value) is not None


def in_range(name: str, value: float, low: float, high: float) -> Iterator[str]:
    """Yield what is wrong with a setting that must lie in [low, high], if anything is."""
    if not low <= value <= high:
        yield f"{name}={value} must lie between {low:,} and {high:,}. Change it."


def count_text(count: int) -> str:
    """Write a count for people: 134.5M, 8.03B, 49.2k, 512; four digits at most."""
    for factor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        # 999,950 would round to 1000.0k
        if count >= 0.99995 * factor:
            decimals = 2 if unit == "B" and count < 9.995 * factor else 1
            return f"{count / factor:.{decimals}f}{unit}"
    return str(count)


def bytes_text(size: int) -> str:
    """Write a number of bytes for people: 512 B, 49.2 kB, 269.0 MB, 16.1 GB."""
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= 0.99995 * factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def seconds_text(seconds: float) -> str:
    """Write a duration for people: 0.4 s, 41 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _number(digits: str) -> float:
    return float(re.sub("[_,]", "", digits))
