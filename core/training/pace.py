"""How often work is saved: as often as a setting says, or by what it costs, which is measured on the way.

Saving costs the time in which the work stands still, and what a transfer beside it slows it down. At most 2 %
of the time goes to that. What a kill may take away is the time from one save to the next, until that is
stored: at most 10 minutes. Where the two conflict the first one holds: each run pays for saving, and only one
that is killed for lost work.

One that goes on after a kill may be killed again, so it saves more often at first. Where kills come every M
seconds, least is lost, to them and to saving, by a save of c seconds every sqrt(2 c M) (J. W. Young, A first
order approximation to the optimum checkpoint interval, CACM 1974). M is taken to be the time for which this
attempt has been spared.
"""

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from statistics import median

from core.quantities import Interval

log = logging.getLogger(__name__)

MOST_SHARE = 0.02
"""Of the time, for saving."""
MOST_LOST_S = 600.0
"""Of work, by a kill."""
LEAST_S = 10.0
"""Between two saves: there is little to gain below."""
SPARED_S = 180.0
"""After a kill the next one is expected in this time, or in as long as there was none."""
_MOST_TRANSFER = 0.25
"""Share of the time in which something is on its way to the store, unless more would be lost than it may."""
_FIRST_RATE = 1e9
"""Bytes a second for which work stands still, before that has been measured."""
_LAST_STEPS, _FEW_STEPS = 100, 3
"""Steps that their usual time is taken from, and those that are too few for it."""


class Pace:
    """Tells between every two steps whether it is time to save."""

    def __init__(
        self,
        every: Interval | None,
        *,
        least_s: float = LEAST_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin now.

        Args:
            every: How often; None to decide by the cost.
            least_s: The shortest time between two saves.
            clock: Gives the time in seconds.
        """
        self._every, self._least_s, self._clock = every, least_s, clock
        self._last = (0, clock())
        self._resumed_at: float | None = None
        self._told: set[bool] = set()
        self.blocked_s: float | None = None
        """For how long the last save let the work stand still."""
        self.transfer_s = 0.0
        """How long the last one took until it was stored."""
        self.restart_steps()

    def restart_steps(self) -> None:
        """Forget how long steps take: those that come are of another kind."""
        self._seen: float | None = None
        self._beside = False
        self._steps: dict[bool, deque[float]] = {
            beside: deque(maxlen=_LAST_STEPS) for beside in (False, True)
        }

    def resume(self, done: int) -> None:
        """Count from here, after so many steps: what was killed may be killed again."""
        now = self._resumed_at = self._clock()
        self._last = (done, now)

    def is_due(self, done: int, *, size: int, transferring: bool) -> bool:
        """Return whether it is time; call it after each step.

        Args:
            done: Steps so far.
            size: Bytes to save.
            transferring: Whether what was saved before is still on its way: then it is not time.
        """
        now = self._clock()
        if self._seen is not None:
            self._steps[self._beside].append(now - self._seen)
        self._seen, self._beside = now, transferring
        steps, seconds = done - self._last[0], now - self._last[1]
        if self._every is not None:
            is_due = self._every.is_over(steps, seconds)
        else:
            is_due = seconds >= self.interval_s(size)
        if transferring or not is_due:
            return False
        self._last = (done, now)
        return True

    @contextlib.contextmanager
    def standstill(self) -> Iterator[None]:
        """Measure how long the work stands still for a save."""
        began = self._clock()
        yield
        self._seen, self._beside = self._clock(), True
        self.blocked_s = self._seen - began

    def stored(self, seconds: float) -> None:
        """Note how long the last save took until it was stored."""
        self.transfer_s = seconds
        if self._every is None:
            self._tell()

    @property
    def cost_s(self) -> float:
        """The time that a save costs: the standstill, and what the steps beside its transfer lose."""
        slowed = 0.0
        if min(map(len, self._steps.values())) >= _FEW_STEPS:
            (alone, error), (beside, error_beside) = map(_usual, self._steps.values())
            steps = math.ceil(self.transfer_s / max(beside, 1e-9))
            if beside - alone > 2 * math.hypot(error, error_beside):  # else it is chance
                slowed = min((beside - alone) * steps, self.transfer_s)
        return (self.blocked_s or 0.0) + slowed

    def interval_s(self, size: int = 0) -> float:
        """Return the time from one save to the next; ``size`` tells the cost before the first one."""
        if self.blocked_s is None:
            if self._resumed_at is not None:
                return self._least_s
            return min(max(self._least_s, size / _FIRST_RATE / MOST_SHARE), MOST_LOST_S)
        wanted = max(self._least_s, self.transfer_s / _MOST_TRANSFER)
        longest = MOST_LOST_S - self._until_stored_s
        affordable = self.cost_s / MOST_SHARE
        if self._resumed_at is not None:
            spared_s = max(SPARED_S, self._clock() - self._resumed_at)
            affordable = min(affordable, math.sqrt(2 * self.cost_s * spared_s))
        return max(affordable, min(wanted, longest), self.transfer_s)

    @property
    def _until_stored_s(self) -> float:
        """The time of the step that ends after a save is due, and until it is stored."""
        return self.transfer_s + (median(self._steps[False]) if self._steps[False] else 0.0)

    def _tell(self) -> None:
        """Log the interval once, and once that more may be lost than is meant to be."""
        interval_s, cost_s = self.interval_s(), self.cost_s
        lost_s = interval_s + self._until_stored_s
        too_much = lost_s > MOST_LOST_S + 1
        if too_much in self._told:
            return
        self._told.add(too_much)
        what = (
            "saving costs %.2f s each time, and it takes %.1f s until that is stored: it is done every %.0f s"
        )
        given = cost_s, self.transfer_s, interval_s
        if too_much:
            log.warning(
                f"{what}, as at most %.0f %% of the time may go to it. That comes first: a kill may cost "
                "%.0f minutes of work, not %.0f.",
                *(*given, 100 * MOST_SHARE, lost_s / 60, MOST_LOST_S / 60),
            )
        else:
            log.info(what, *given)


def _usual(seconds: Iterable[float]) -> tuple[float, float]:
    """Return the median and its standard error, estimated by the median deviation from it."""
    values = list(seconds)
    usual = median(values)
    spread = 1.48 * median(abs(value - usual) for value in values)
    return usual, 1.25 * spread / math.sqrt(len(values))
