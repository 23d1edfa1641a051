"""``precision: auto`` becomes a number format once for each recipe in a store.

The first who begins the recipe notes the choice under ``precisions/``; everybody else takes it, on whatever
machine: a run keeps what it began with. The run's key is made of the choice: equal keys mean equal results.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass

from core.errors import StorageError
from core.machine.precision import ACCELERATORS, SECTIONS, Choice, choose_precision
from core.model.build import pick_device
from core.runs.run import Run
from core.settings.schema import Settings
from core.storage.interface import Store
from core.storage.layout import precisions_of
from core.storage.store import open_store
from core.untrusted import decode

FORMAT = 1
_ADVICE = (
    "Set calibration.precision, training.precision and evaluation.precision to what the run began with (see "
    "its run.json), or remove the file: the precision is then chosen again."
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Noted:
    choices: dict[str, Choice]
    """By section."""


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
        raise StorageError(f"{store.uri}/{key} is damaged: it lacks {', '.join(missing)}. {_ADVICE}")
    chosen = {
        name: dataclasses.replace(getattr(settings, name), precision=choices[name].precision)
        for name in automatic
    }
    for name in automatic:
        log.info("%s.precision=%s (%s)", name, choices[name].precision, choices[name])
    return dataclasses.replace(settings, **chosen), {name: str(choices[name]) for name in automatic}


def _noted(store: Store, key: str) -> dict[str, Choice] | None:
    try:
        content = store.read_bytes(key)
    except FileNotFoundError:
        return None
    return decode(_Noted, content, f"{store.uri}/{key}", _ADVICE, newest=FORMAT).choices
