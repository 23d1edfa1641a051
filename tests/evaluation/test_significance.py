import itertools
import math

import numpy as np
import pytest

from core.errors import DataError
from core.evaluation.significance import Observations, mcnemar_p, perplexity_ratio, score_difference

T_975 = {8: 2.364624, 16: 2.131450, 30: 2.045230, 60: 2.000995}  # Student's t of n - 1, from tables
OPPOSITE = {"better": "worse", "worse": "better", "no difference shown": "no difference shown"}


def scores(values, ids=None):
    return Observations(ids=ids or [f"item {i}" for i in range(len(values))], values=values)


def windows(nats, tokens):
    return Observations(ids=list(map(str, range(len(nats)))), values=nats, weights=tokens)


def compared(own, others):
    return score_difference({"task": scores(own)}, {"task": scores(others)})


def tail_of(items):
    """Where Student's t of this many items has 2.5 %, on the scale of the normal distribution."""
    return 0.5 * math.erfc(T_975[items] * math.sqrt(items / (items - 1)) / math.sqrt(2))


def quantile(values, share):
    """Linear between neighbours, as textbooks have it."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    return ordered[below] + (place - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])


def test_the_interval_is_what_a_loop_over_draws_and_items_gives():
    random = np.random.default_rng(3)
    own, others = random.random(30).tolist(), (random.random(30) - 0.3).tolist()
    means, generator = [], np.random.default_rng(0)
    for _ in range(10_000):
        drawn = generator.integers(30, size=30)
        means.append(math.fsum(own[i] - others[i] for i in drawn) / 30)
    found = compared(own, others)
    assert found.value == pytest.approx(math.fsum(own) / 30 - math.fsum(others) / 30)
    assert found.low == pytest.approx(quantile(means, tail_of(30)), rel=1e-3)
    assert found.high == pytest.approx(quantile(means, 1 - tail_of(30)), rel=1e-3)


def test_the_interval_of_right_and_wrong_answers_follows_their_exact_distribution():
    own, others = [1] * 20 + [0] * 9 + [1] * 31, [0] * 20 + [1] * 9 + [1] * 31
    one, exact = np.array([9, 31, 20]) / 60, np.ones(1)
    for _ in range(60):
        exact = np.convolve(exact, one)  # of the sum, from -60
    reached = np.cumsum(exact)
    found = compared(own, others)
    for end, share in ((found.low, tail_of(60)), (found.high, 1 - tail_of(60))):
        assert round(60 * end) == pytest.approx(int(np.searchsorted(reached, share)) - 60, abs=1)


def test_perplexities_are_weighted_by_tokens_and_drawn_by_windows():
    random = np.random.default_rng(5)
    tokens = random.integers(5, 50, 16)
    others = tokens * random.normal(3.0, 0.3, 16)
    own = others + tokens * random.normal(0.1, 0.05, 16)
    ratios, generator = [], np.random.default_rng(0)
    for _ in range(10_000):
        drawn = generator.integers(16, size=16)
        count = sum(tokens[i] for i in drawn)
        ratios.append(math.exp(sum(own[i] for i in drawn) / count - sum(others[i] for i in drawn) / count))
    found = perplexity_ratio(windows(own, tokens), windows(others, tokens))
    assert found.value == pytest.approx(
        math.exp(sum(own) / sum(tokens)) / math.exp(sum(others) / sum(tokens))
    )
    assert found.low == pytest.approx(quantile(ratios, tail_of(16)), rel=1e-3)
    assert found.high == pytest.approx(quantile(ratios, 1 - tail_of(16)), rel=1e-3)
    assert found.verdict == "worse"
    assert perplexity_ratio(windows(others, tokens), windows(own, tokens)).verdict == "better"


def test_a_perplexity_beyond_all_numbers_is_infinitely_worse():
    found = perplexity_ratio(windows([5000.0] * 12, [4] * 12), windows([12.0] * 12, [4] * 12))
    assert (found.value, found.low, found.high, found.verdict) == (math.inf, math.inf, math.inf, "worse")
    found = perplexity_ratio(windows([12.0] * 12, [4] * 12), windows([5000.0] * 12, [4] * 12))
    assert (found.value, found.high, found.verdict) == (0.0, 0.0, "better")


def test_intervals_cover_the_truth_as_often_as_they_say():
    random, times, covered = np.random.default_rng(7), 400, {"answers": 0, "windows": 0}
    for _ in range(times):
        easy = random.random(80)
        found = compared((random.random(80) < easy * 0.9).astype(int), (random.random(80) < easy).astype(int))
        covered["answers"] += found.low <= -0.05 <= found.high
        nats = random.gamma(4.0, 10.0, (2, 16))
        ratio = perplexity_ratio(windows(nats[0], [20] * 16), windows(nats[1], [20] * 16))
        covered["windows"] += ratio.low <= 1.0 <= ratio.high
    # 95 %, within three standard errors
    assert all(0.917 <= count / times <= 0.983 for count in covered.values()), covered


def test_equals_that_differ_on_few_items_seldom_seem_to_differ():
    random, found = np.random.default_rng(11), []
    for _ in range(400):
        other = (random.random(200) < 0.5).astype(int)
        own = np.where(random.random(200) < 0.02, 1 - other, other)  # about four items
        found.append(compared(own, other).verdict)
    assert set(found) <= {"better", "worse", "no difference shown"}
    assert sum(verdict != "no difference shown" for verdict in found) <= 0.05 * 400
    four, six = [1] * 4 + [0] * 96, [1] * 6 + [0] * 94
    assert compared(four, [0] * 100).verdict == "no difference shown"
    assert compared(six, [0] * 100).verdict == "better"


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (3, 3), (6, 0), (0, 6), (7, 2), (4, 6)])
def test_the_exact_test_counts_all_ways_of_equals_to_differ(better, worse):
    gaps = [abs(sum(signs)) for signs in itertools.product((1, -1), repeat=better + worse)]
    expected = sum(gap >= abs(better - worse) for gap in gaps) / len(gaps)
    assert mcnemar_p(better, worse) == pytest.approx(expected)


@pytest.mark.parametrize("binary", [True, False])
def test_the_other_way_round_is_the_mirror_image(binary):
    random = np.random.default_rng(13)
    own, other = random.random(60) + 0.1, random.random(60)
    if binary:
        own, other = (own > 0.5).astype(int), (other > 0.5).astype(int)
    there, back = compared(own, other), compared(other, own)
    assert (back.value, back.low, back.high) == (-there.value, -there.high, -there.low)
    assert back.verdict == OPPOSITE[there.verdict]


def test_an_average_draws_within_each_task_and_counts_tasks_alike():
    random = np.random.default_rng(17)
    sizes = {"small": 50, "large": 800}
    own = {task: (random.random(size) < 0.6).astype(int) for task, size in sizes.items()}
    other = {task: (random.random(size) < 0.5).astype(int) for task, size in sizes.items()}
    gains = [own[task] - other[task] for task in sizes]
    found = score_difference(
        {task: scores(values) for task, values in own.items()} | {"only here": scores([1] * 20)},
        {task: scores(values) for task, values in other.items()},
    )
    error = math.sqrt(sum(gain.var(ddof=1) / len(gain) for gain in gains)) / 2
    assert found.value == pytest.approx(np.mean([gain.mean() for gain in gains]))
    assert found.high - found.low == pytest.approx(2 * T_975[60] * error, rel=0.05)
    assert found.items == 850


def test_items_that_only_one_has_are_left_out_and_counted():
    random = np.random.default_rng(19)
    own, other = random.random((2, 40))
    here, there = [f"{i}" for i in range(40)], [f"{i}" for i in range(5, 45)]
    found = score_difference({"task": scores(own, here)}, {"task": scores(other, there)})
    same = compared(own[5:], other[:35])
    assert (found.items, found.left_out) == (35, 10)
    assert (found.value, found.low, found.high) == pytest.approx((same.value, same.low, same.high))
    shuffled = random.permutation(40)
    again = score_difference(
        {"task": scores(own, here)}, {"task": scores(other[shuffled], [there[i] for i in shuffled])}
    )
    assert again == found


def test_too_few_items_are_no_ground_for_a_word():
    assert compared([1] * 9, [0] * 9).verdict == "too few items"
    assert compared([1], [0]).low == -math.inf


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        (scores([1.0, 0.0], ["a", "b"]), scores([1.0], ["c"]), "no item in common"),
        (scores([1.0, 0.0], ["a", "a"]), scores([1.0], ["a"]), "not one result for each item"),
        (scores([1.0], ["a", "b"]), scores([1.0], ["a"]), "not one result for each item"),
        (windows([3.0, 2.0], [5, 5]), windows([3.0, 2.0], [5, 6]), "tokenizers differ"),
    ],
)
def test_what_cannot_be_compared_is_refused(own, other, said):
    with pytest.raises(DataError, match=said):
        perplexity_ratio(own, other)


def test_no_task_in_common_is_refused():
    with pytest.raises(DataError, match="no task in common"):
        score_difference({"a": scores([1])}, {"b": scores([1])})
