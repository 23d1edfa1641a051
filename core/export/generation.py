"""The tokens that end a text, for runtimes that do not find them themselves."""

from collections.abc import Mapping
from typing import Any

from core.errors import CheckpointError


def end_ids(generation: Mapping[str, Any], config: Any) -> list[int]:
    """Return all tokens that end a text, each once: those of the generation config, then of the model's.

    Raises:
        CheckpointError: If one is not an integer.
    """
    found: list[int] = []
    for named in (generation.get("eos_token_id"), config.eos_token_id):
        found += named if isinstance(named, list) else [] if named is None else [named]
    if any(type(index) is not int for index in found):
        raise CheckpointError(
            "the eos_token_id of generation_config.json or config.json is not a token id. Correct it."
        )
    return list(dict.fromkeys(found))
