"""Progress of long work: a bar on a terminal, a log line from time to time elsewhere."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

log = logging.getLogger(__name__)

_INTERVAL_S = 15.0


class Progress:
    """Counts finished items and reports their rate and the time left; the end of a ``with`` block ends it."""

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        """Start the clock.

        Args:
            what: What is being done, such as ``benchmarks``.
            total: Items in all.
            unit: What an item is, such as ``answers``.
            done: Items that an earlier attempt has finished.
        """
        self._what, self._total, self._unit = what, total, unit
        self._first = self._done = done
        self._note = ""
        self._start = self._last = time.monotonic()
        # disable=None shows the bar on a terminal only
        self._bar = tqdm(
            desc=what, total=total, initial=done, unit=f" {unit}", unit_scale=True, leave=False, disable=None
        )

    def __enter__(self) -> "Progress":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """See ``close``."""
        self.close()

    def add(self, items: int = 1, note: str = "") -> None:
        """Count ``items`` more as finished; ``note`` describes the state that this leads to."""
        self._done += items
        self._note = f", {note}" if note else ""
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(items)
        now = time.monotonic()
        if self._bar.disable and self._done < self._total and now - self._last >= _INTERVAL_S:
            self._last = now
            rate = (self._done - self._first) / max(now - self._start, 1e-9)
            left_s = (self._total - self._done) / rate
            log.info(
                "%s: %s of %s %s, %.3g a second, %.0f s left%s",
                *(self._what, f"{self._done:,}", f"{self._total:,}", self._unit, rate, left_s, self._note),
            )

    def close(self) -> None:
        """Remove the bar; if all is done, log how long it took."""
        self._bar.close()
        if self._done == self._total:
            seconds = time.monotonic() - self._start
            items = f"{self._done - self._first:,} {self._unit}"
            log.info("%s: %s in %.1f s%s", self._what, items, seconds, self._note)


def tracked(items: Sequence[T], what: str, unit: str) -> Iterator[T]:
    """Yield items one by one, and count each as finished when the next one is asked for."""
    with Progress(what, len(items), unit) as progress:
        for item in items:
            yield item
            progress.add()
