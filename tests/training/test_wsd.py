import pytest
import torch

from core.pruning.phases import phase_steps
from core.settings.texts import TextSource
from core.settings.training import TrainingSettings
from core.training.recover import recover
from core.training.rows import Rows
from core.training.wsd import wsd_learning_rate
from tests.support.models import random_tokens, tiny

SCHEDULE = dict(peak=2e-5, floor=2e-6, warmup_share=0.05, decay_share=0.10)


def curve(total, **changes):
    return [wsd_learning_rate(step, total, **SCHEDULE | changes) for step in range(total)]


def test_warms_up_stays_and_decays():
    rates = curve(200)
    assert rates[:10] == pytest.approx([2e-6 * (i + 1) for i in range(10)])
    assert rates[10:180] == [2e-5] * 170
    assert rates[180:] == pytest.approx([2e-5 - 1.8e-5 * (i + 1) / 20 for i in range(20)])
    assert rates[-1] == pytest.approx(2e-6)


@pytest.mark.parametrize("phases", [1, 3, 5])
def test_phases_joined_equal_the_unsplit_curve(phases):
    """The rates that training reports, phase after phase, against the three pieces of the curve."""
    total, settings = 40, TrainingSettings(
        tokens="1k", sources=(TextSource(path="x"),), sequence_length=12, global_batch=1, micro_batch=1,
        learning_rate=2e-5, min_learning_rate=2e-6, warmup_share=0.05, decay_share=0.10, precision="float32",
    )  # fmt: skip
    model, tokens, joined = tiny("llama"), random_tokens(rows=40), []
    for steps in phase_steps(total, phases):
        part = tokens[len(joined) : len(joined) + steps]
        first = joined[-1][0] + 1 if joined else 0
        report = recover(
            model, Rows(part, torch.ones_like(part)), settings, first_step=first, total_steps=total
        )
        joined += [(step, rate) for step, _, rate in report.losses]
    assert [step for step, _ in joined] == list(range(40))
    pieces = [1e-5, 2e-5, *[2e-5] * 34, 1.55e-5, 1.1e-5, 6.5e-6, 2e-6]
    assert [rate for _, rate in joined] == pytest.approx(pieces)


def test_a_run_of_a_few_steps_has_no_warmup_or_decay():
    assert curve(4) == [2e-5] * 4
    assert curve(4, warmup_share=0, decay_share=0) == [2e-5] * 4
