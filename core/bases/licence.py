"""A base model's licence and languages, as it states them: a smaller model keeps them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from core.untrusted import read_limited

FACTS = ("license", "license_name", "license_link", "language")
"""Under the names that the hub's model cards use: licence id, its name and address if the id is ``other``,
and language codes."""

_LONGEST = 300
_LONGEST_FRONT_MATTER = 100_000


def known_facts(stated: Any) -> dict[str, Any]:
    """Return those of ``FACTS`` that are stated, and are what they should be.

    Args:
        stated: A model card's front matter, or what ``adapt_pruner.json`` holds; nothing in it is trusted.
    """
    if not isinstance(stated, Mapping):
        return {}
    facts: dict[str, Any] = {}
    for name in FACTS:
        value = stated.get(name)
        # YAML reads the language code "no" as false.
        items = ["no" if item is False else item for item in (value if isinstance(value, list) else [value])]
        texts = [item.strip() for item in items if isinstance(item, str) and 0 < len(item) <= _LONGEST]
        if len(texts) != len(items) or not all(text.isprintable() for text in texts):
            continue
        if name == "language":
            facts[name] = texts
        elif len(texts) == 1:
            facts[name] = texts[0]
    return facts


def card_facts(card: Path) -> dict[str, Any]:
    """Return what the front matter of a model card states; {} if there is none, or it says nothing."""
    try:
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", read_limited(card).decode(), re.DOTALL)
        if match is None or len(match[1]) > _LONGEST_FRONT_MATTER:
            return {}
        return known_facts(yaml.safe_load(match[1]))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}


def gguf_facts(file: Path) -> dict[str, Any]:
    """Return what the metadata of a GGUF file states.

    A licence that is a name instead of one of the hub's ids becomes ``other`` with that name.
    """
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    names = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
        "language": "general.languages",
    }
    facts = known_facts({name: fields[key].contents() for name, key in names.items() if key in fields})
    licence = facts.get("license", "").lower()
    if licence and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        facts.setdefault("license_name", re.sub(r"[^a-z0-9.]+", "-", licence).strip("-"))
        licence = "other"
    return facts | ({"license": licence} if licence else {})
