"""When a state is saved under ``training.save_every: auto``: a training on a clock that the test turns."""

import logging
import math
import random
import re
from itertools import pairwise

import pytest

from core.quantities import Interval
from core.training.pace import LEAST_S, MOST_LOST_S, MOST_SHARE, SPARED_S, Pace


def train(
    *, every=None, step_s, blocked_s, transfer_s, slower=1.0, hours=6.0, size=0, noise=0.0, resumed=False
):
    """Train on a clock of its own; return (start, stored at) of each save, and the share of time lost.

    Lost to saving is the standstill, and what steps last longer while a transfer is under way.
    """
    now, chance = [0.0], random.Random(0)
    pace = Pace(every, clock=lambda: now[0])
    saves, stored_at, lost, done = [], None, 0.0, 0
    if resumed:
        pace.resume(done)
    while now[0] < hours * 3600:
        alone = step_s * (1 + noise * chance.uniform(-1, 1))
        beside = alone * (slower if stored_at is not None else 1.0)
        lost += beside - alone
        now[0] += beside
        done += 1
        if stored_at is not None and now[0] >= stored_at:
            saves[-1] = (saves[-1][0], stored_at)
            stored_at = None
            pace.stored(transfer_s)
        if pace.is_due(done, size=size, transferring=stored_at is not None):
            saves.append((now[0], None))
            with pace.standstill():
                now[0] += blocked_s
            lost += blocked_s
            stored_at = now[0] + transfer_s
    return [save for save in saves if save[1] is not None], lost / now[0]


def most_lost_s(saves):
    """The longest time that a kill at the worst moment takes away: from a save until the next is stored."""
    return max(after[1] - before[0] for before, after in pairwise(saves))


CHEAP = {
    "a tiny model": dict(step_s=0.2, blocked_s=0.001, transfer_s=0.1),
    "1.4 GB": dict(step_s=9.0, blocked_s=0.6, transfer_s=25.0, slower=1.15),
    "12 GB to a server": dict(step_s=20.0, blocked_s=4.0, transfer_s=80.0),
    "a slow server": dict(step_s=4.0, blocked_s=1.0, transfer_s=250.0),
    "long steps": dict(step_s=140.0, blocked_s=3.0, transfer_s=60.0),
}


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("what", CHEAP)
def test_both_limits_hold_where_they_can(what, noise, caplog):
    caplog.set_level(logging.INFO, "core")
    saves, share = train(**CHEAP[what], noise=noise)
    assert share <= 1.05 * MOST_SHARE
    assert most_lost_s(saves) <= (1.5 if noise else 1.1) * MOST_LOST_S
    assert min(b[0] - a[0] for a, b in pairwise(saves)) >= 0.99 * LEAST_S
    assert ("a kill may cost" in caplog.text) <= bool(noise)


def test_what_costs_little_is_saved_often():
    saves, _ = train(**CHEAP["a tiny model"])
    assert most_lost_s(saves) < LEAST_S + 1


@pytest.mark.parametrize(
    "given",
    [
        dict(step_s=10.0, blocked_s=30.0, transfer_s=20.0),
        dict(step_s=5.0, blocked_s=1.0, transfer_s=60.0, slower=1.5),
    ],
    ids=["it stands still for long", "a transfer slows it down"],
)
def test_where_the_limits_conflict_the_share_holds_and_it_is_told_once(given, caplog):
    caplog.set_level(logging.INFO, "core")
    saves, share = train(**given, hours=24)
    assert 0.8 * MOST_SHARE < share <= 1.05 * MOST_SHARE
    assert most_lost_s(saves) > MOST_LOST_S
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert "at most 2 % of the time" in told[0]
    minutes = int(re.search(r"may cost ([0-9]+) minutes of work, not 10", told[0])[1])
    assert minutes == pytest.approx(most_lost_s(saves[2:]) / 60, rel=0.1)


def test_before_anything_is_measured_the_size_decides():
    small, large = (train(**CHEAP["a tiny model"], size=size, hours=1)[0][0][0] for size in (0, 10**10))
    assert small == pytest.approx(LEAST_S, abs=0.3)
    assert large == pytest.approx(500, abs=0.3)


def test_what_was_killed_before_saves_soon_then_by_youngs_rule_and_in_the_end_by_the_share():
    given = dict(step_s=1.0, blocked_s=3.0, transfer_s=4.0, size=12 * 10**9, resumed=True)
    saves, share = train(**given, hours=12)
    assert saves[0][0] == LEAST_S
    waits = [(b[0], b[0] - a[0]) for a, b in pairwise(saves)]
    for at, wait in waits:
        young = math.sqrt(2 * 3.0 * max(SPARED_S, at))
        assert wait == pytest.approx(min(young, 3.0 / MOST_SHARE), abs=4.1)  # a step and the standstill
    assert share <= 1.1 * MOST_SHARE
    assert train(**given | {"resumed": False}, hours=1)[1] <= 1.05 * MOST_SHARE


@pytest.mark.parametrize(("mean_s", "gain"), [(120.0, 1.5), (600.0, 1.03), (20000.0, 0.99)])
def test_where_kills_are_frequent_youngs_rule_loses_less_than_the_share_alone(mean_s, gain):
    """Attempts end at random moments; what they have stored counts."""

    def stored(resumed):
        chance, steps = random.Random(1), 0
        for _ in range(min(200, round(200_000 / mean_s))):
            hours = chance.expovariate(1 / mean_s) / 3600
            saves, _ = train(step_s=5.0, blocked_s=3.0, transfer_s=4.0, resumed=resumed, hours=hours)
            steps += (saves[-1][0] - 3.0 * (len(saves) - 1)) / 5.0 if saves else 0
        return steps

    assert stored(True) > gain * stored(False)


def test_a_number_keeps_its_meaning(caplog):
    caplog.set_level(logging.INFO, "core")
    given = dict(step_s=10.0, blocked_s=30.0, transfer_s=20.0)
    saves, share = train(**given, every=Interval(seconds=60))
    assert share > 0.3
    assert {round(b[0] - a[0]) for a, b in pairwise(saves)} == {60}
    saves, _ = train(**given, every=Interval(steps=7))
    assert {round(b[0] - a[0]) for a, b in pairwise(saves)} == {7 * 10 + 30}
    assert train(**given, every=Interval())[0] == []
    assert caplog.text == ""
