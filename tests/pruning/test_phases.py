import itertools

import pytest

from core.pruning.phases import phase_shares, phase_sizes, phase_steps, pruning_steps


def test_geometric_phases_shrink_by_one_ratio():
    sizes = (1_000_000, *phase_sizes(1_000_000, 250_000, 4, "geometric"))
    ratios = [b / a for a, b in itertools.pairwise(sizes)]
    assert ratios == pytest.approx([0.25 ** (1 / 4)] * 4, rel=1e-5)
    assert sizes[-1] == 250_000


def test_linear_phases_remove_equally_much():
    assert phase_sizes(1000, 400, 3, "linear") == (800, 600, 400)


@pytest.mark.parametrize("phases", [1, 2, 7, 20, 96])
def test_shares_follow_eq_11_and_sum_to_one(phases):
    shares = phase_shares(phases)
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([2 * i / (phases * (phases + 1)) for i in range(1, phases + 1)])


@pytest.mark.parametrize(
    ("total", "phases"), [(29_500, 20), (23, 2), (20, 20), (21, 20), (400, 20), (3, 5), (0, 3)]
)
def test_steps_cover_the_total_and_no_phase_starves(total, phases):
    steps = phase_steps(total, phases)
    assert (len(steps), sum(steps)) == (phases, total)
    assert min(steps) >= (1 if total >= phases else 0)
    if total > 1000:
        assert steps == pytest.approx([total * share for share in phase_shares(phases)], abs=phases)


@pytest.mark.parametrize(
    ("before", "target", "steps"),
    [(1000, 990, 1), (1000, 950, 1), (1000, 949, 2), (1000, 800, 4), (1000, 400, 12), (1000, 1000, 1)],
)
def test_a_step_removes_a_twentieth_at_most(before, target, steps):
    assert pruning_steps(before, target) == steps
    assert pruning_steps(before, target, setting=7) == 7


def test_the_last_phase_is_left_a_step_however_many_phases_round_theirs_up_to_one():
    for phases in range(1, 40):
        for total in range(phases, 400):
            steps = phase_steps(total, phases)
            assert (len(steps), sum(steps)) == (phases, total)
            for number, step in enumerate(steps[:-1], start=1):
                exact = max(1, 2 * number * total / (phases * (phases + 1)))
                assert 0 <= exact - step < 1 + 1e-9
            assert steps[-1] >= 1
