import dataclasses

import pytest
import torch
from transformers import LlamaConfig

from core.errors import OutOfMemoryError
from core.settings.calibration import CalibrationSettings
from core.settings.evaluation import EvaluationSettings
from core.settings.prune import PruneSettings
from core.settings.texts import TextSource
from core.settings.training import TrainingSettings
from core.steps import footprint
from core.steps.footprint import (
    Footprint,
    check_scoring,
    evaluation_footprint,
    explaining_memory,
    planned_evaluation,
    scoring_footprint,
    training_footprint,
)
from tests.support.models import CONFIGS, SIZES

CONFIG = CONFIGS["llama"]()
TRAINING = TrainingSettings(
    tokens="1M",
    sources=(TextSource(path="texts.jsonl"),),
    sequence_length=64,
    global_batch=12,
    micro_batch=6,
    precision="float32",
)
CALIBRATION = CalibrationSettings(sequences=64, sequence_length=32, precision="float32")
EVALUATION = EvaluationSettings(perplexity=TextSource(path="texts.txt"), precision="float32")


def training_bytes(**changes):
    settings = dataclasses.replace(TRAINING, **changes)
    return training_footprint(CONFIG, None, settings, device="cpu").device_bytes


@pytest.fixture
def free(monkeypatch):
    """Sets the memory that is free."""

    def set_free(size):
        monkeypatch.setattr(footprint, "available_bytes", lambda device="cpu": int(size))

    return set_free


def test_a_measurement_that_cannot_fit_is_refused_with_settings_that_do(free):
    prune = PruneSettings()
    hungry = dataclasses.replace(CALIBRATION, sequences=4096, pool_documents=4096, micro_batch=4096)

    def needs(settings, free_bytes):
        return scoring_footprint(
            CONFIG, settings, prune, device="cpu", free_bytes=int(free_bytes)
        ).device_bytes

    room = needs(dataclasses.replace(hungry, micro_batch=1), 1e9)
    free(room)
    with pytest.raises(OutOfMemoryError, match=r"Set calibration\.micro_batch=1: it takes about"):
        check_scoring(CONFIG, hungry, prune, "cpu")


def test_an_evaluation_picks_its_batch_and_is_refused_where_one_sequence_is_too_much(free):
    free(64e9)
    auto = dataclasses.replace(EVALUATION, batch_size=0)
    assert planned_evaluation(CONFIG, auto, "cpu").batch_size == 8  # 4,096 tokens
    at_two = evaluation_footprint(CONFIG, dataclasses.replace(EVALUATION, batch_size=2), device="cpu")
    free(at_two.device_bytes / 0.8 + 1)
    assert planned_evaluation(CONFIG, auto, "cpu").batch_size == 2
    free(10_000)
    with pytest.raises(OutOfMemoryError, match="evaluate needs about"):
        planned_evaluation(CONFIG, auto, "cpu")


def test_batches_beyond_what_there_is_take_no_more():
    def evaluated(batch_size):
        settings = dataclasses.replace(EVALUATION, batch_size=batch_size, perplexity_windows=4)
        return evaluation_footprint(CONFIG, settings, device="cpu")

    def scored(micro_batch):
        settings = dataclasses.replace(CALIBRATION, micro_batch=micro_batch)
        return scoring_footprint(CONFIG, settings, PruneSettings(), device="cpu", free_bytes=10**12)

    assert evaluated(1000) == evaluated(4) != evaluated(2)
    assert scored(1000) == scored(CALIBRATION.sequences) != scored(2)


def test_streamed_weights_take_a_layer(free):
    prune = PruneSettings()
    found = {
        weights: scoring_footprint(
            CONFIG,
            dataclasses.replace(CALIBRATION, weights=weights),
            prune,
            device="cpu",
            free_bytes=10**12,
        ).parts["weights"]
        for weights in ("memory", "streamed", "auto")
    }
    assert found["streamed"] < found["memory"] == found["auto"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 8 bytes free"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_one_line_that_names_settings(error):
    with (
        pytest.raises(
            OutOfMemoryError, match=r"out of memory.*Set training\.micro_batch: the same"
        ) as caught,
        explaining_memory("training.micro_batch"),
    ):
        raise error
    assert "\n" not in str(caught.value)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), explaining_memory("training.micro_batch"):
        raise RuntimeError("shapes do not match")


def test_what_helps_tells_whether_the_run_resumes():
    for resumes, then in ((True, ": the same run resumes."), (False, ", which begins another run, or add")):
        with (
            pytest.raises(OutOfMemoryError, match=f"Set training.teacher=none{then}"),
            explaining_memory("training.teacher=none", resumes=resumes),
        ):
            raise MemoryError


def test_a_real_allocation_beyond_the_machine_is_explained():
    with pytest.raises(OutOfMemoryError), explaining_memory("evaluation.batch_size"):
        torch.empty(2**50, dtype=torch.uint8)


def test_parts_add_up_and_only_the_larger_ones_are_named():
    found = Footprint(parts={"weights": 3 * 10**9, "logits": 10**7, "rest": 10**7 - 1})
    assert found.device_bytes == 3_019_999_999
    assert str(found) == "3.0 GB (weights 3.0 GB, logits 0.0 GB)"


def test_criteria_of_products_hold_a_square_matrix_of_the_widest_projection():
    """Peak resident memory, measured apart: both took 235 MB more than magnitude_l2 at a width of 3,000."""

    def needed(criterion, width):
        config = LlamaConfig(**SIZES | {"intermediate_size": width})
        return scoring_footprint(
            config, CALIBRATION, PruneSettings(criterion=criterion), device="cpu", free_bytes=10**12
        ).device_bytes

    for criterion in ("leverage", "obs"):
        more = needed(criterion, 3000) - needed("magnitude_l2", 3000)
        assert more == pytest.approx(235e6, rel=0.1)


def test_of_two_steps_that_follow_each_other_each_kind_of_memory_is_that_of_the_larger():
    one = Footprint(parts={"weights": 5}, host_bytes=1, waiting_bytes=2, disk_bytes=9)
    other = Footprint(parts={"weights": 3, "logits": 1}, host_bytes=4, waiting_bytes=1, disk_bytes=7)
    wanted = Footprint(parts={"weights": 5}, host_bytes=4, waiting_bytes=2, disk_bytes=9)
    assert one.or_else(other) == other.or_else(one) == wanted
