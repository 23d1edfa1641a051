"""``precision: auto`` becomes a number format once for each recipe in a store.

The first who begins the recipe notes the choice under ``precisions/``; everybody else takes it, on whatever
machine: a run keeps what it began with. The run's key is made of the choice: equal keys mean equal results.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Collection

from core.errors import StorageError
from core.machine.precision import ACCELERATORS, SECTIONS, Choice, choose_precision
from core.model.build import pick_device
from core.runs.run import Run
from core.settings.schema import Settings
from core.storage.interface import Store
from core.storage.layout import precisions_of
from core.storage.store import open_store
from core.untrusted import parse_object

FORMAT = 1

log = logging.getLogger(__name__)


def settle_precision(
    settings: Settings, revision: str, *, accelerated: Collection[str]
) -> tuple[Settings, dict[str, str]]:
    """Return the settings with a number format in place of each ``precision: auto``.

    Args:
        settings: The recipe's.
        revision: Revision of the base model.
        accelerated: Sections whose tasks get accelerators, which this machine may not have.

    Returns:
        The settings, and for each section that said ``auto`` what the format follows from.

    Raises:
        StorageError: If the store cannot be reached, or what it has noted is damaged.
    """
    automatic = [name for name in SECTIONS if getattr(settings, name).precision == "auto"]
    if not automatic:
        return settings, {}
    store, key = open_store(settings.storage.store), precisions_of(Run.key_of(revision, settings))
    choices = _noted(store, key)
    if choices is None:
        here = functools.cache(lambda: choose_precision(pick_device()))
        choices = {name: ACCELERATORS if name in accelerated else here() for name in SECTIONS}
        noted = {name: dataclasses.asdict(choice) for name, choice in choices.items()}
        content = json.dumps({"format": FORMAT, "choices": noted}, indent=1).encode()
        store.write_bytes(key, content, if_absent=True)
        choices = _noted(store, key) or choices  # another's, if it was first
    if missing := [name for name in automatic if name not in choices]:
        raise _damaged(store, key, f"it lacks {', '.join(missing)}")
    chosen = {
        name: dataclasses.replace(getattr(settings, name), precision=choices[name].precision)
        for name in automatic
    }
    for name in automatic:
        log.info("%s.precision=%s (%s)", name, choices[name].precision, choices[name])
    return dataclasses.replace(settings, **chosen), {name: str(choices[name]) for name in automatic}


def _noted(store: Store, key: str) -> dict[str, Choice] | None:
    try:
        data = parse_object(store.read_bytes(key))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT}")
        return {name: Choice.from_dict(choice) for name, choice in data["choices"].items()}
    except FileNotFoundError:
        return None
    except KeyError as error:
        raise _damaged(store, key, f"it lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise _damaged(store, key, str(error)) from error


def _damaged(store: Store, key: str, problem: str) -> StorageError:
    said = " ".join(problem.split())[:200].rstrip(".")
    return StorageError(
        f"{store.uri}/{key} is damaged: {said}. Set calibration.precision, training.precision and "
        "evaluation.precision to what the run began with (its run.json says it), or remove the file: the "
        "precision is then chosen again."
    )
