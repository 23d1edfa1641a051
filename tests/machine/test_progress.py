import logging
from types import SimpleNamespace

import pytest

from core import progress
from core.progress import Progress, tracked


@pytest.fixture
def clock(monkeypatch, caplog):
    """A clock that is set by hand."""
    caplog.set_level(logging.INFO, "core")
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_rate_and_time_left_are_logged_from_time_to_time(clock, caplog):
    with Progress("training", 5000, "tokens") as shown:
        for seconds in (10, 10, 10):
            clock.now += seconds
            shown.add(1000, f"loss {clock.now:g}")
    assert caplog.messages == ["training: 2,000 of 5,000 tokens, 100 a second, 30 s left, loss 120"]


def test_the_end_is_logged_and_an_early_end_is_not(clock, caplog):
    for _ in tracked("abc", "forward", "layers"):
        clock.now += 1
    with pytest.raises(ZeroDivisionError), Progress("backward", 1, "layers"):
        _ = 1 / 0
    assert caplog.messages == ["forward: 3 layers in 3.0 s"]


def test_the_work_of_an_earlier_attempt_counts_as_done_but_not_in_the_rate(clock, caplog):
    with Progress("training", 100, "steps", done=60) as shown:
        clock.now += 20
        shown.add(20)
        clock.now += 5
        shown.add(20)
    assert caplog.messages == [
        "training: 80 of 100 steps, 1 a second, 20 s left",
        "training: 40 steps in 25.0 s",
    ]


def test_a_finished_training_that_is_resumed_takes_no_time(clock, caplog):
    with Progress("training", 100, "steps", done=100):
        pass
    assert caplog.messages == ["training: 0 steps in 0.0 s"]
