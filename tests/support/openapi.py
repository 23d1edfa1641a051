"""JSON against the models of a client that was generated from an OpenAPI description."""

import re

_PLAIN = {"str": "str", "int": "int", "bool": "bool", "datetime": "str"}


def misfits(models, kind, value, where):
    """Yield what is wrong: unknown fields, values of another type, required fields that are missing."""
    if match := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{where} must be a list"
            return
        for i, item in enumerate(value):
            yield from misfits(models, match[1], item, f"{where}[{i}]")
    elif kind in _PLAIN:
        if type(value).__name__ != _PLAIN[kind]:
            yield f"{where}={value!r} must be of type {kind}"
    elif kind == "object":  # anything
        return
    elif hasattr(model := getattr(models, kind, None), "allowable_values"):
        if value not in model.allowable_values:
            yield f"{where}={value!r} is none of {model.allowable_values}"
    elif not isinstance(value, dict):
        yield f"{where} must be a mapping"
    elif match := re.fullmatch(r"dict\(str, (.+)\)", kind):
        for key, item in value.items():
            yield from misfits(models, match[1], item, f"{where}.{key}")
    else:
        names = {name: attribute for attribute, name in model.attribute_map.items()}
        yield from (f'unknown field "{key}" in {where}' for key in value if key not in names)
        known = {names[key]: item for key, item in value.items() if key in names}
        for name, item in known.items():
            place = f"{where}.{model.attribute_map[name]}"
            yield from misfits(models, model.openapi_types[name], item, place)
        try:
            model(**known)
        except ValueError as error:  # a required field is not there
            yield f"{where}: {error}"
