"""What a checkpoint says of generation, for runtimes that must be told: which tokens end a text."""

from collections.abc import Mapping
from typing import Any

from core.errors import CheckpointError


def end_ids(generation: Mapping[str, Any], config: Any) -> list[int]:
    """Return all tokens that end a text, each once: by the generation config, then by the model's.

    Raises:
        CheckpointError: If one is no number.
    """
    found: list[int] = []
    for named in (generation.get("eos_token_id"), config.eos_token_id):
        found += named if isinstance(named, list) else [] if named is None else [named]
    if any(type(index) is not int for index in found):
        raise CheckpointError(
            "the eos_token_id of generation_config.json or config.json is no token's number. Correct it."
        )
    return list(dict.fromkeys(found))
