"""A measurement that is killed after some layers goes on there, and its scores are equal to the last bit."""

import logging

import pytest
import torch

from core.pruning.scoring.calibration import measure
from core.steps import stages
from core.steps.stages import SavedStages
from core.storage.interface import join_uri
from core.storage.store import open_store
from core.training.pace import Pace
from core.training.resume import published_steps
from tests.support.models import UNEQUAL, random_tokens, tiny

TOKENS = random_tokens(rows=5)
MADE_OF = {"checkpoint": "c"}
LAYERS = len(UNEQUAL)


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """Whatever this process took before, and however small the machine."""
    monkeypatch.setattr(stages, "spare_bytes", lambda: 10**9)


class KilledError(Exception):
    pass


class Always(Pace):
    """Keeps a stage after each layer."""

    def __init__(self):
        super().__init__(None)

    def is_due(self, done, *, size, transferring):
        return True


class Killed(SavedStages):
    """Stages of an attempt that dies after so many layers, when what it has kept is stored."""

    def __init__(self, uri, folder, *, after=None, gaps=(), made_of=MADE_OF):
        super().__init__(uri, folder, made_of=made_of, worth_s=0, pace=Always())
        self._left, self._gaps, self.kept = after, gaps, []

    def is_due(self, share, size):
        if self._under_way is not None:
            self._under_way.result()
        if self._left == 0:
            raise KilledError
        self._left = None if self._left is None else self._left - 1
        return super().is_due(share, size)

    def keep(self, make, superseded):
        stage = make()
        self.kept.append(stage.number)
        if stage.number not in self._gaps:
            super().keep(lambda: stage, superseded)


def attempt(uri, folder, *, criterion="taylor_l1", keep_bytes=0, micro_batch=2, runs=None, **how):
    """Measure as calibrate does; returns None if it has been killed. ``runs`` counts the layers that run."""
    model = tiny("llama", UNEQUAL, dtype=torch.float32)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: None if runs is None else runs.append(1))
    given = dict(criterion=criterion, keep_bytes=keep_bytes, micro_batch=micro_batch)
    with Killed(uri, folder, **how) as stages:
        try:
            return measure(model, TOKENS, **given, stages=stages)
        except KilledError:
            return None


def assert_equal(found, expected):
    assert torch.equal(found.similarities, expected.similarities)
    assert (found.loss, found.tokens) == (expected.loss, expected.tokens)
    for mine, theirs in zip(found.scores, expected.scores, strict=True):
        for kind, tensor in vars(mine).items():
            assert torch.equal(tensor, getattr(theirs, kind)), kind


def undisturbed(**given):
    model = tiny("llama", UNEQUAL, dtype=torch.float32)
    return measure(model, TOKENS, **{"micro_batch": 2, **given})


@pytest.fixture
def uri(tmp_path):
    return join_uri(str(tmp_path), "runs/k/phases/01/calibrated/_resume")


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, "core")
    return caplog


@pytest.mark.parametrize(
    ("gaps", "keep_bytes"), [((), 0), ((), 2**30), ((2,), 2**30), ((1, 2, 3), 2**30)], ids=str
)
def test_killed_after_each_layer_in_turn(gaps, keep_bytes, uri, tmp_path):
    expected = undisturbed(keep_bytes=keep_bytes)
    for after in range(1, 2 * LAYERS - 1):
        place = f"{uri}-{after}"
        attempt(place, tmp_path / "work", keep_bytes=keep_bytes, after=after, gaps=gaps)
        assert_equal(attempt(place, tmp_path / "work", keep_bytes=keep_bytes, gaps=gaps), expected)


@pytest.mark.slow
def test_killed_again_and_again_each_attempt_goes_further(uri, tmp_path, log):
    """Each has the time for two layers: without stages none would ever come to an end."""
    attempts, result = 0, None
    while result is None:
        result = attempt(uri, tmp_path / "work", keep_bytes=2**30, after=1)
        attempts += 1
        assert attempts < 3 * LAYERS
    assert_equal(result, undisturbed(keep_bytes=2**30))
    assert attempts > LAYERS


def test_what_is_kept_is_not_run_again(uri, tmp_path):
    attempt(uri, tmp_path / "work", after=LAYERS + 1)  # killed when one layer is scored
    runs, all_runs = [], []
    attempt(uri, tmp_path / "work", runs=runs)
    attempt(uri + "-none", tmp_path / "work", runs=all_runs)
    micro_batches = 3
    embedding = head = LAYERS * micro_batches  # each asks how layers are called
    assert len(all_runs) == embedding + head + (LAYERS + LAYERS) * micro_batches
    assert len(runs) == embedding + (LAYERS - 1) * micro_batches  # of the backward pass


def test_what_goes_on_may_be_killed_again_and_keeps_more(uri, tmp_path):
    attempt(uri, tmp_path / "work", after=2)
    resumed, pace = [], Always()
    pace.resume = resumed.append
    for place in (uri, uri + "-none"):
        with SavedStages(place, tmp_path / "work", made_of=MADE_OF, pace=pace) as stages:
            stages.agree({}, {})
            assert len(resumed) == 1


@pytest.mark.parametrize("criterion", ["wanda_sp", "fluctuation", "taylor_signed", "random"])
def test_every_kind_of_criterion(criterion, uri, tmp_path):
    attempt(uri, tmp_path / "work", criterion=criterion, after=2)
    assert published_steps(uri) == ([1, 2] if criterion == "taylor_signed" else [2])
    found = attempt(uri, tmp_path / "work", criterion=criterion)
    assert_equal(found, undisturbed(criterion=criterion))


def test_what_is_scored_needs_no_inputs_any_more(uri, tmp_path):
    attempt(uri, tmp_path / "work", after=LAYERS + 1)  # killed when one layer is scored
    assert published_steps(uri) == [*range(1, LAYERS - 1), LAYERS + 2]


def test_the_way_of_the_first_attempt_is_gone_on_with(uri, tmp_path):
    """Another micro-batch, and other outputs that are kept, change the last bits."""
    expected = undisturbed(micro_batch=1, keep_bytes=20_000)
    attempt(uri, tmp_path / "work", micro_batch=1, keep_bytes=20_000, after=2)
    assert_equal(attempt(uri, tmp_path / "work", micro_batch=4, keep_bytes=2**30), expected)


def test_what_would_take_much_more_memory_is_not_gone_on_with(uri, tmp_path, log):
    attempt(uri, tmp_path / "work", micro_batch=5, after=2)
    assert_equal(attempt(uri, tmp_path / "work", micro_batch=2), undisturbed())
    assert "too large for this machine" in log.text


def test_another_measurement_and_damaged_stages_are_not_used(uri, tmp_path, log):
    attempt(uri, tmp_path / "work", after=3)
    assert_equal(attempt(uri, tmp_path / "work", made_of={"checkpoint": "other"}, after=None), undisturbed())
    assert log.text.count("is removed, not used") == 3
    log.clear()
    attempt(uri + "2", tmp_path / "work", after=LAYERS + 1)
    store = open_store(uri + "2")
    numbers = published_steps(uri + "2")
    for number in (numbers[0], numbers[-1]):
        key = f"{number:06d}/stage.safetensors"
        store.write_bytes(key, store.read_bytes(key)[:-1])
    assert_equal(attempt(uri + "2", tmp_path / "work"), undisturbed())
    assert log.text.count("is removed, not used") == 2


def flip(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("damaged", "damage"),
    [
        ("statistics.safetensors", flip),
        ("statistics.safetensors", None),
        ("MANIFEST.json", flip),
        ("MANIFEST.json", lambda content: content.replace(b'"sha256"', b'"sha265"', 1)),
    ],
    ids=["changed", "lost", "no manifest", "another manifest"],
)
def test_a_damaged_result_is_measured_again_once(damaged, damage, store_uri, tmp_path, log):
    """In a folder each attempt measured again, as nothing else could be kept there; on S3 each failed."""
    uri, measured = join_uri(store_uri, "runs/k/phases/01/scored/_resume/0001"), undisturbed()

    def result():
        with SavedStages(uri, tmp_path / "work", made_of=MADE_OF, worth_s=0) as stages:
            found = stages.result()
            if found is None:
                stages.finish(measured)
            return found

    assert result() is None
    assert_equal(result(), measured)
    store = open_store(join_uri(uri, "result"))
    if damage is None:
        store.delete(damaged)
    else:
        store.write_bytes(damaged, damage(store.read_bytes(damaged)))
    assert result() is None
    found = result()
    assert found is not None
    assert_equal(found, measured)
    assert log.text.count("is removed, and done again") == 1


def test_a_store_that_takes_nothing_ends_no_measurement(tmp_path, log):
    (tmp_path / "store").touch()
    with SavedStages(str(tmp_path / "store"), tmp_path / "w", made_of={}, worth_s=0, pace=Always()) as stages:
        stages.agree = lambda way, most: way  # what is there could not be read either
        found = measure(tiny("llama", UNEQUAL, dtype=torch.float32), TOKENS, micro_batch=2, stages=stages)
    assert_equal(found, undisturbed())
    assert "the measurement goes on" in log.text


def test_a_measurement_of_seconds_keeps_nothing(uri, tmp_path):
    model = tiny("llama", UNEQUAL, dtype=torch.float32)
    with SavedStages(uri, tmp_path / "w", made_of={}, pace=Always()) as stages:
        measure(model, TOKENS, micro_batch=2, stages=stages)
    assert not open_store(uri).local_path("").exists()
