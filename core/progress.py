"""Progress of long work: a bar on a terminal, a log line from time to time elsewhere."""

import logging
import time

from tqdm import tqdm

log = logging.getLogger(__name__)

_INTERVAL_S = 15.0


class Progress:
    """Counts finished items and tells how fast they go and how long the rest takes."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        """Start the clock.

        Args:
            what: What is being done, such as ``benchmarks``.
            total: Items in all.
            unit: What an item is, such as ``answers``.
        """
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._start = self._last = time.monotonic()
        # disable=None shows the bar on a terminal only
        self._bar = tqdm(desc=what, total=total, unit=f" {unit}", leave=False, disable=None)

    def add(self, items: int = 1) -> None:
        """Count ``items`` more as finished."""
        self._done += items
        self._bar.update(items)
        now = time.monotonic()
        if self._bar.disable and now - self._last >= _INTERVAL_S:
            self._last = now
            rate = self._done / (now - self._start)
            left_s = (self._total - self._done) / rate
            log.info(
                "%s: %d of %d %s, %.3g a second, %.0f s left",
                *(self._what, self._done, self._total, self._unit, rate, left_s),
            )

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
