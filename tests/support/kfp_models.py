"""What the API of Kubeflow Pipelines takes: its own models, read strictly, and cron expressions."""

import json
import re
from collections.abc import Mapping
from typing import Any

import kfp_server_api

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


def strict(data: Any, kind: str, where: str = "the body") -> Any:
    """Check JSON against a model of ``kfp_server_api``: no unknown field, no value of another type."""
    if match := re.fullmatch(r"list\[(.+)\]", kind):
        check(isinstance(data, list), f"{where} is no list")
        return [strict(item, match[1], where) for item in data]
    if match := re.fullmatch(r"dict\(str, (.+)\)", kind):
        check(isinstance(data, dict), f"{where} is no mapping")
        return {name: strict(value, match[1], f"{where}.{name}") for name, value in data.items()}
    if kind in ("str", "int", "bool", "object", "datetime"):
        # JSON has 64-bit integers as text; a number is understood, too.
        is_number = where.endswith(".max_concurrency") and type(data) is int
        fits = {"str": str, "int": int, "bool": bool, "object": object, "datetime": str}[kind]
        check(is_number or isinstance(data, fits), f"{where}={data!r} is not of type {kind}")
        return data
    model = getattr(kfp_server_api.models, kind)
    if hasattr(model, "allowable_values"):
        check(data in model.allowable_values, f"{where}={data!r} is none of {model.allowable_values}")
        return data
    check(isinstance(data, dict), f"{where} is no {kind}")
    attributes = {key: attribute for attribute, key in model.attribute_map.items()}
    for key in data:
        check(key in attributes, f'unknown field "{key}" in {where}')
    checked = {
        key: strict(v, model.openapi_types[attributes[key]], f"{where}.{key}") for key, v in data.items()
    }
    model(**{attributes[key]: value for key, value in checked.items()})
    return checked


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
