"""Hugging Face data sets are pinned to a commit once for each recipe in a store, as ``precision: auto`` is.

The first who begins the recipe notes the commits under ``revisions/``; everybody else takes them, so that a
run that is started again reads what it began with, whatever was uploaded since. They are part of its key.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

from core.data.locations import is_hub_id, locate
from core.data.rows import reading
from core.errors import DataError
from core.runs.run import Run
from core.settings.schema import Settings
from core.settings.texts import TextSource
from core.storage.interface import Store
from core.storage.layout import revision_of
from core.storage.store import open_store
from core.untrusted import decode

FORMAT = 1
_ADVICE = (
    "Set its revision to what the run began with (see its run.json), or remove the file: it is pinned again."
)
_TIMEOUT_S = 10
_COMMIT = re.compile("[0-9a-f]{40}")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Noted:
    revision: str


def settle_revisions(settings: Settings, revision: str) -> Settings:
    """Return the settings with a commit in place of each data set's branch, tag or nothing.

    Args:
        settings: The recipe's.
        revision: Revision of the base model.

    Raises:
        DataError: If there is no such data set, or the hub cannot be reached.
        StorageError: If the store cannot be reached, or what it has noted is damaged.
    """
    return _with_commits(settings, revision, open_store(settings.storage.store), _commit)


def noted_revisions(settings: Settings, revision: str, store: Store) -> Settings:
    """Return what ``settle_revisions`` returns, but leave a data set as it is that nothing is noted of yet.

    Nothing but the store is asked.

    Args:
        settings: The recipe's.
        revision: Revision of the base model.
        store: The recipe's.

    Raises:
        StorageError: If the store cannot be reached, or what it has noted is damaged.
    """
    return _with_commits(
        settings, revision, store, lambda store, key, source: _noted(store, key) or source.revision
    )


def _with_commits(
    settings: Settings, revision: str, store: Store, commit_of: Callable[[Store, str, TextSource], str]
) -> Settings:
    digest = Run.key_of(revision, settings)

    def pinned(source: TextSource | None) -> TextSource | None:
        if source is None or not _moves(source):
            return source
        commit = commit_of(store, revision_of(digest, f"{source.path}@{source.revision}"), source)
        return dataclasses.replace(source, revision=commit)

    sources = tuple(pinned(source) or source for source in settings.training.sources)
    return dataclasses.replace(
        settings,
        calibration=dataclasses.replace(settings.calibration, source=pinned(settings.calibration.source)),
        training=dataclasses.replace(settings.training, sources=sources),
        evaluation=dataclasses.replace(
            settings.evaluation, perplexity=pinned(settings.evaluation.perplexity)
        ),
    )


def _moves(source: TextSource) -> bool:
    try:
        return (
            locate(source.path) is None and is_hub_id(source.path) and not _COMMIT.fullmatch(source.revision)
        )
    except DataError:
        return False  # a package that is not installed here: the step that reads it says so


def _commit(store: Store, key: str, source: TextSource) -> str:
    if (noted := _noted(store, key)) is not None:
        return noted
    from huggingface_hub import HfApi

    with reading(source):
        wanted = source.revision or None
        commit = HfApi().dataset_info(source.path, revision=wanted, timeout=_TIMEOUT_S).sha
    assert commit is not None, "the hub names a commit for every revision"
    log.info("%s is pinned to %s", source.path, commit)
    content = json.dumps({"format": FORMAT, "data_set": source.path, "revision": commit}).encode()
    store.write_bytes(key, content, if_absent=True)
    return _noted(store, key) or commit  # another's, if it was first


def _noted(store: Store, key: str) -> str | None:
    try:
        content = store.read_bytes(key)
    except FileNotFoundError:
        return None
    return decode(_Noted, content, f"{store.uri}/{key}", _ADVICE, newest=FORMAT).revision
