"""What the API of Kubeflow Pipelines takes: its own models, read strictly, and cron expressions."""

import json
from collections.abc import Mapping
from typing import Any

import kfp_server_api

from tests.support.openapi import misfits

_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6, 429: 8, 500: 13, 503: 14}
_CRON = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
_NAMES = {
    4: ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"],
    5: ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"],
}


class Refused(Exception):
    """What the API answers instead of what it was asked for."""

    def __init__(
        self, status: int, message: str, *, body: bytes | None = None, headers: Mapping[str, str] = {}
    ):
        super().__init__(message)
        code = _CODES.get(status, 2)
        said = {"error": message, "code": code, "message": message, "details": []}
        self.status, self.headers = status, dict(headers)
        self.body = json.dumps(said).encode() if body is None else body


def found(kept: Mapping[str, dict[str, Any]], id_: str | None, kind: str) -> dict[str, Any]:
    if id_ not in kept:
        raise Refused(404, f"ResourceNotFoundError: {kind} {id_} not found.")
    return kept[id_]


def only(data: Mapping[str, Any], known: set[str]) -> None:
    if extra := set(data) - known:
        raise Refused(400, f"parameter not found in the request: {sorted(extra)}")


def strict(data: Any, kind: str) -> Any:
    """Check a body against a model of ``kfp_server_api``: no unknown field, no value of another type."""
    if isinstance(data, dict) and type(data.get("max_concurrency")) is int:
        # JSON has 64-bit integers as text; a number is understood, too.
        data = data | {"max_concurrency": str(data["max_concurrency"])}
    for problem in misfits(kfp_server_api.models, kind, data, "the body"):
        raise Refused(400, f"Invalid input error: {problem}")
    return data


def check(holds: bool, problem: str) -> None:
    if not holds:
        raise Refused(400, f"Invalid input error: {problem}")


def is_cron(text: str) -> bool:
    """Tell whether the real API's parser reads it: six fields, seconds first."""
    fields = text.upper().split(" ")
    if len(fields) != len(_CRON):
        return False
    for index, (low, high) in enumerate(_CRON):
        names = {name: str(number) for number, name in enumerate(_NAMES.get(index, ()), low)}
        for part in fields[index].split(","):
            span, slash, step = part.partition("/")
            first, dash, last = (names.get(bound, bound) for bound in span.partition("-"))
            numbers = [first, *([last] if dash else []), *([step] if slash else [])]
            if span in ("*", "?"):
                numbers = numbers[1:]
            if not all(number.isdigit() for number in numbers) or (slash and int(step) == 0):
                return False
            if span not in ("*", "?") and not low <= int(first) <= int(last or first) <= high:
                return False
    return True
