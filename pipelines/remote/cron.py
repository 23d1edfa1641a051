"""Cron expressions as Kubeflow Pipelines reads them: six fields, seconds first."""

import calendar

from core.errors import SettingsError

_FIELDS = (
    ("second", 0, 59),
    ("minute", 0, 59),
    ("hour", 0, 23),
    ("day of the month", 1, 31),
    ("month", 1, 12),
    ("day of the week", 0, 6),
)
_MONTHS = {name.upper(): number for number, name in enumerate(calendar.month_abbr) if number}
_DAYS = {name: number for number, name in enumerate(("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"))}
_MACROS = {
    "@yearly": "0 0 0 1 1 *",
    "@annually": "0 0 0 1 1 *",
    "@monthly": "0 0 0 1 * *",
    "@weekly": "0 0 0 * * 0",
    "@daily": "0 0 0 * * *",
    "@midnight": "0 0 0 * * *",
    "@hourly": "0 0 * * * *",
}
_LONGEST = {2: 29, 4: 30, 6: 30, 9: 30, 11: 30}


def six_fields(text: str) -> str:
    """Return ``text`` as Kubeflow Pipelines takes it; five fields, as cron itself has them, get seconds.

    Raises:
        SettingsError: If it is no cron expression, or never comes.
    """
    fields = _MACROS.get(text.strip().lower(), text).upper().split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != 6:
        raise SettingsError(
            [
                f"--cron={text!r} must have six fields: second, minute, hour, day of the month, month and "
                'day of the week, such as "0 0 2 * * *" for every night at two. Correct it.'
            ]
        )
    problems, values = [], []
    for value, (name, low, high) in zip(fields, _FIELDS, strict=True):
        try:
            values.append(_values(value, name, low, high))
        except ValueError as error:
            problems.append(f"--cron={text!r}: {name} {value} {error}")
    if not problems and not any(
        values[3] & set(range(1, _LONGEST.get(month, 31) + 1)) for month in values[4]
    ):
        problems.append(f"--cron={text!r} never comes: no such month is that long. Correct the day.")
    if problems:
        raise SettingsError(problems)
    return " ".join(fields)


def _values(field: str, name: str, low: int, high: int) -> set[int]:
    """Return the values that a field stands for.

    Raises:
        ValueError: With the rest of a sentence that says what is wrong.
    """
    found: set[int] = set()
    for part in field.split(","):
        span, slash, step_text = part.partition("/")
        step = _number(step_text, name) if slash else 1
        if step < 1:
            raise ValueError("has a step of 0. Make it 1 or more.")
        if span in ("*", "?"):
            first, last = low, high
        else:
            first_text, dash, last_text = span.partition("-")
            first = _number(first_text, name)
            # As the server reads it, 5/10 is every tenth from 5 on.
            last = _number(last_text, name) if dash else high if slash else first
            outside = [number for number in (first, last) if not low <= number <= high]
            if outside:
                sunday = " Sunday is 0." if set(outside) == {7} and high == 6 else ""
                raise ValueError(f"must lie between {low} and {high}.{sunday} Correct it.")
            if first > last:
                raise ValueError("runs backwards. Write it as two ranges with a comma.")
        found.update(range(first, last + 1, step))
    return found


def _number(text: str, name: str) -> int:
    names = {"month": _MONTHS, "day of the week": _DAYS}.get(name, {})
    if text in names:
        return names[text]
    if not (text.isascii() and text.isdigit()):
        known = f" or one of {', '.join(names)}" if names else ""
        raise ValueError(f"is not understood. Write numbers{known}, *, and , - / between them.")
    return int(text)
