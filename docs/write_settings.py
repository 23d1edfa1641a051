"""Print docs/settings.md: every setting with its default and its meaning, read from the dataclasses.

The meaning is the string under the field, as the source has it. `make docs` writes the page.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing

from core.settings.cluster import ComponentSettings, Toleration
from core.settings.parameters import reached_by
from core.settings.schema import Settings
from core.settings.texts import TextSource

HEAD = """# Settings

Every setting of a recipe, as `section.key`. What has a default may be left out; a recipe may `include:`
others, and `--set section.key=value` overrides it on the command line. Unknown keys, values out of range and
impossible combinations are reported all at once, before anything starts. Counts may be written as `3.87B`,
shares as `80%`, sizes as `16GB`, times as `10min`. The code is in [core/settings](../core/settings).

*Kind* says what another value means for a run: `result` is another run; `how` resumes the same run;
`measured` measures again and computes nothing else; `place` is the same run (of the base model its pinned
revision counts, not its name).

*Pipeline* says how a setting reaches a run on a cluster: by a parameter of that name, which each run may
change (`recipe` holds all settings without a parameter of their own), or `compiled` into the pipeline.

Written by `make docs`; do not edit.
"""
PARTS = (
    (
        "Text sources",
        "A text source; its kind is that of the setting that holds it:",
        TextSource,
        "",
        "recipe",
    ),
    (
        "Components",
        "What `cluster.components` may say of one component:",
        ComponentSettings,
        "place",
        "compiled",
    ),
    (
        "Tolerations",
        "An entry of `cluster.tolerations` and `cluster.gpu_tolerations`:",
        Toleration,
        "place",
        "compiled",
    ),
)

NAMES: dict[object, str] = {str: "text", int: "integer", float: "number", bool: "true, false"}
NAMES |= {part: f"[{title.lower()}](#{title.lower().replace(' ', '-')})" for title, _, part, *_ in PARTS}


def meanings(section: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, on one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            found[ast.unparse(field.target)] = " ".join(
                ast.literal_eval(below.value).replace("``", "`").split()
            )
    return found


def kind(hint: object) -> str:
    """Return what a field takes, in words."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" if value else '""' for value in typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return ", ".join(kind(part) for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return f"list of {kind(typing.get_args(hint)[0])}"
    return "map" if typing.get_origin(hint) is dict else NAMES[hint]


def default(field: dataclasses.Field[typing.Any]) -> str:
    """Return a field's default as YAML writes it; empty where the recipe must say, or nothing is set."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None or value is dataclasses.MISSING:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | dict):
        return "[]" if isinstance(value, tuple) else "{}"
    return str(value)


def table(section: type, prefix: str = "", inherited: str = "result", pipeline: str = "") -> str:
    """Return the fields of a dataclass as a table, less those that are sections."""
    hints, texts = typing.get_type_hints(section), meanings(section)
    rows = [
        " | ".join(
            [
                f"| `{prefix}{field.name}`",
                default(field),
                kind(hints[field.name]),
                field.metadata.get("kind", inherited),
                pipeline or reached_by(prefix.rstrip("."), field.name),
                f"{texts[field.name]} |",
            ]
        )
        for field in dataclasses.fields(section)
        if not (section is Settings and dataclasses.is_dataclass(hints[field.name]))
    ]
    return "\n".join(
        ["| setting | default | takes | kind | pipeline | meaning |", "|---|---|---|---|---|---|", *rows, ""]
    )


def page() -> str:
    """Return the whole page."""
    hints, texts = typing.get_type_hints(Settings), meanings(Settings)
    parts = [HEAD, table(Settings)]
    for field in dataclasses.fields(Settings):
        if dataclasses.is_dataclass(section := hints[field.name]):
            rows = table(section, f"{field.name}.", field.metadata.get("kind", "result"))
            parts.append(f"## {field.name}\n\n{texts[field.name]}\n\n{rows}")
    parts += [f"## {title}\n\n{text}\n\n{table(part, '', *how)}" for title, text, part, *how in PARTS]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
