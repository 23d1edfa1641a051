"""What the API of Kubeflow Pipelines takes: its own models, pipelines, parameters, and cron expressions."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import kfp_server_api
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from tests.support.openapi import misfits

_FITS: dict[int, Callable[[Any], bool]] = {
    pipeline_spec_pb2.ParameterType.STRING: lambda value: isinstance(value, str),
    pipeline_spec_pb2.ParameterType.NUMBER_INTEGER: lambda value: type(value) is int,
    pipeline_spec_pb2.ParameterType.NUMBER_DOUBLE: lambda value: type(value) in (int, float),
    pipeline_spec_pb2.ParameterType.BOOLEAN: lambda value: isinstance(value, bool),
    pipeline_spec_pb2.ParameterType.STRUCT: lambda value: isinstance(value, dict),
    pipeline_spec_pb2.ParameterType.LIST: lambda value: isinstance(value, list),
}
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


def parse(documents: list[Any]) -> pipeline_spec_pb2.PipelineSpec:
    """Read a compiled pipeline strictly, with its platforms."""
    try:
        spec = json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
        for platform in documents[1:]:
            json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    except (json_format.ParseError, IndexError) as error:
        raise Refused(400, f"Invalid input error: {error}") from None
    return spec


def check_parameters(spec: pipeline_spec_pb2.PipelineSpec, given: Mapping[str, Any]) -> None:
    """Refuse parameters of a run that its pipeline does not take."""
    wanted = spec.root.input_definitions.parameters
    for name, value in given.items():
        if name not in wanted:
            raise Refused(400, f"Invalid input error: parameter {name} is not in the pipeline")
        if not _FITS[wanted[name].parameter_type](value):
            raise Refused(400, f"Invalid input error: parameter {name} is of the wrong type")
    for name, parameter in wanted.items():
        if name not in given and not (parameter.is_optional or parameter.HasField("default_value")):
            raise Refused(400, f"Invalid input error: parameter {name} is missing")
