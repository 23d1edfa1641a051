"""A run: its settings, its base model and where its files stand. Every step starts by loading it."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from core.errors import SettingsError, StorageError
from core.model.shape import ModelShape
from core.settings.identity import with_former
from core.settings.recipe import settings_from_dict
from core.settings.schema import Settings
from core.storage.interface import Store, join_uri
from core.storage.layout import pointer_of
from core.storage.lease import Lease, holding_lease, release_lease
from core.storage.owner import Owner
from core.storage.publication import MANIFEST, find_publication
from core.storage.store import open_store
from core.untrusted import check_format, decode, parse_object

FORMAT = 1
"""Of ``run.json``, ``DONE.json`` and the files in ``jobs``."""

_AGAIN = "Start the run again with its recipe."


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """What ``run.json`` says beside its own place."""

    settings: dict[str, Any]
    revision: str
    base_uri: str
    dense: ModelShape
    phase_params: tuple[int, ...]
    chosen: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What ``run.json`` says.

    Attributes:
        store: URI of the store.
        key: Names the run; equal for equal base revision, settings and N_P.
        settings: The settings.
        revision: Which revision of the base model.
        base_uri: Publication of the base model.
        dense: Sizes of the base model.
        phase_params: Parameters that each phase ends at.
        job: The execution that asks; of no concern to ``run.json``.
        chosen: Section whose precision was ``auto`` to what its number format follows from.
    """

    store: str
    key: str
    settings: Settings
    revision: str
    base_uri: str
    dense: ModelShape
    phase_params: tuple[int, ...]
    job: str
    chosen: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def key_of(revision: str, settings: Settings) -> str:
        """Return the key of a run of these settings on this revision of the base model."""
        return hashlib.sha256(f"{revision} {settings.digest()}".encode()).hexdigest()[:12]

    @classmethod
    def load(cls, handle: Mapping[str, Any]) -> "Run":
        """Load the run that a task was handed.

        Args:
            handle: ``store``, ``key`` and, for steps that compute, ``job``.

        Raises:
            StorageError: If the store does not hold the run, or cannot be reached.
        """
        store, key = str(handle["store"]), str(handle["key"])
        where = f"{store}/runs/{key}/run.json"
        try:
            content = open_store(store).read_bytes(f"runs/{key}/run.json")
        except FileNotFoundError:
            raise StorageError(f"{store} holds no run {key}. {_AGAIN}") from None
        stored = decode(_Stored, content, where, _AGAIN, newest=FORMAT)
        try:
            settings = settings_from_dict(with_former(Settings, stored.settings))
        except (SettingsError, TypeError, ValueError, AttributeError, OverflowError) as error:
            said = " ".join(str(error).split())[:300].rstrip(".")
            raise StorageError(f"{where} is damaged: {said}. {_AGAIN}") from error
        own = {"store": store, "key": key, "settings": settings, "job": str(handle.get("job", ""))}
        return cls(**vars(stored) | own)

    @staticmethod
    def is_done(handle: Mapping[str, Any]) -> bool:
        """Return whether the run that tasks were handed has been published, and still is."""
        store, run = open_store(str(handle["store"])), f"runs/{handle['key']}"
        return all(store.exists(f"{run}/{file}") for file in ("DONE.json", f"final/{MANIFEST}"))

    def save(self) -> None:
        """Write ``run.json``.

        A run that is started again gets the settings of the last start: those that its key leaves out may
        have been corrected, such as where it is tracked.
        """
        data = {"format": FORMAT, **asdict(self), "settings": self.settings.to_dict()}
        del data["job"]
        text = json.dumps(data, indent=1)
        open_store(self.store).write_bytes(f"{self.folder}/run.json", text.encode())

    def handle(self) -> dict[str, str]:
        """Return what tasks are handed."""
        return {"store": self.store, "key": self.key, "job": self.job}

    def pointer(self) -> bytes:
        """Return the content of the file by which finalize finds the run."""
        return json.dumps({"format": FORMAT, **self.handle()}).encode()

    @property
    def folder(self) -> str:
        """Where the run stands in the store."""
        return f"runs/{self.key}"

    @contextlib.contextmanager
    def working(self) -> Iterator[Callable[[], Lease]]:
        """Hold the run's lease while the block runs, and let finalize find the run by its job.

        Yields:
            A function that makes sure that the lease is still held.

        Raises:
            LeaseError: If another execution works on the run, or takes it over meanwhile.
        """
        store = open_store(self.store)
        with holding_lease(store, self.folder, Owner.of(self.job)) as renew:
            # Cleaning may have removed this, if the lease had expired while a task waited for a machine.
            store.write_bytes(pointer_of(self.job), self.pointer(), if_absent=True)
            yield renew

    def release(self) -> None:
        """Give the lease back, if this execution holds it."""
        release_lease(open_store(self.store), self.folder, self.job)

    def uri(self, *parts: str) -> str:
        """Return the URI of ``parts`` within the run."""
        return join_uri(self.store, "runs", self.key, *parts)

    def inputs(self, checkpoint: str, data: str) -> dict[str, str]:
        """Return what work that is kept belongs to: what it starts from, by digest, and the settings."""
        return {"checkpoint": checkpoint, "data": data, "settings": self.settings.digest()}

    def phase_uri(self, phase: int, step: str) -> str:
        """Return the URI of what a step of a phase publishes."""
        return self.uri("phases", f"{phase:02d}", step)

    def measured_uri(self, phase: int) -> str:
        """Return the URI of what ``evaluate`` publishes of a phase under the settings of this run."""
        return self.phase_uri(phase, f"evaluated-{self.settings.measured_digest()}")

    def held_out_uri(self) -> str:
        """Return the URI of the tokenized text for perplexity."""
        return self.uri(f"held-out-{self.settings.measured_digest()}")

    def report_uri(self) -> str:
        """Return the URI of the publication with the record and the report.

        That is the final checkpoint's, unless that was published under other settings of what is measured:
        publications do not change.
        """
        measured, final = self.settings.measured_digest(), self.uri("final")
        published = find_publication(final)
        apart = published is not None and published.manifest.metadata.get("measured", measured) != measured
        return self.uri(f"report-{measured}") if apart else final

    def mark_done(self) -> None:
        """Write that all is published, and under which settings of what is measured."""
        measured = {*_measured_before(open_store(self.store), self.folder), self.settings.measured_digest()}
        data = {"format": FORMAT, "final": self.uri("final"), "measured": sorted(measured)}
        open_store(self.store).write_bytes(f"{self.folder}/DONE.json", json.dumps(data).encode())

    def is_complete(self) -> bool:
        """Return whether nothing is left to compute or to measure."""
        measured = self.settings.measured_digest()
        store = open_store(self.store)
        return Run.is_done(self.handle()) and Run.was_measured(store, self.key, measured)

    @staticmethod
    def was_measured(store: Store, key: str, measured: str) -> bool:
        """Return whether a run was done under settings of this digest; True if a done one does not say."""
        return measured in _measured_before(store, f"runs/{key}", otherwise=measured)


def _measured_before(store: Store, folder: str, *, otherwise: str = "") -> list[str]:
    """Return under which settings a run that is done was measured; ``otherwise`` if it does not say."""
    try:
        data = parse_object(store.read_bytes(f"{folder}/DONE.json"))
    except FileNotFoundError:
        return []
    except ValueError:
        data = {}
    check_format(data, FORMAT, join_uri(store.uri, folder, "DONE.json"))
    measured = data.get("measured", [otherwise] if otherwise else [])
    return [str(digest) for digest in measured] if isinstance(measured, list) else []
