import pytest

from core.pruning.phases import phase_steps
from core.training.wsd import wsd_learning_rate

SCHEDULE = dict(peak=2e-5, floor=2e-6, warmup_share=0.05, decay_share=0.10)


def curve(total, **changes):
    return [wsd_learning_rate(step, total, **SCHEDULE | changes) for step in range(total)]


def test_warms_up_stays_and_decays():
    rates = curve(200)
    assert rates[:10] == pytest.approx([2e-6 * (i + 1) for i in range(10)])
    assert rates[10:180] == [2e-5] * 170
    assert rates[180:] == pytest.approx([2e-5 - 1.8e-5 * (i + 1) / 20 for i in range(20)])
    assert rates[-1] == pytest.approx(2e-6)


@pytest.mark.parametrize("phases", [1, 3, 20])
def test_phases_joined_equal_the_unsplit_curve(phases):
    joined, start = [], 0
    for steps in phase_steps(337, phases):
        joined += [wsd_learning_rate(start + i, 337, **SCHEDULE) for i in range(steps)]
        start += steps
    assert joined == curve(337)


def test_a_run_of_a_few_steps_has_no_warmup_or_decay():
    assert curve(4) == [2e-5] * 4
    assert curve(4, warmup_share=0, decay_share=0) == [2e-5] * 4
