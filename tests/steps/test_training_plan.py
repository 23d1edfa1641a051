"""How a phase is trained so that it fits: ranks, what each of them holds, and micro-batches."""

import copy
import dataclasses
import functools
import logging

import pytest
import torch

from core.errors import OutOfMemoryError, SettingsError
from core.model.build import build_empty, model_shape
from core.steps import footprint, training_plan
from core.steps.footprint import TOLERANCE, Footprint, check_fit, training_footprint
from core.steps.training_plan import TrainingPlan, planned_training, rank_footprint
from tests.steps import test_footprint
from tests.steps.test_footprint import CONFIG

TRAINING = dataclasses.replace(test_footprint.TRAINING, moments="device", layer_inputs="device")
AUTO = dataclasses.replace(TRAINING, moments="auto", layer_inputs="auto")


def training_bytes(**changes):
    return training_footprint(
        CONFIG, None, dataclasses.replace(TRAINING, **changes), device="cpu"
    ).device_bytes


def rank_parts(**changes):
    plan = dataclasses.replace(TrainingPlan(settings=TRAINING), **changes)
    whole = training_footprint(CONFIG, None, plan.settings, device="cuda")
    return rank_footprint(whole, model_shape(CONFIG), plan)


@pytest.fixture
def free(monkeypatch):
    """Sets the memory that is free on the device, and on the host if that has another."""

    def set_free(size, host=None):
        def available(device="cpu"):
            return int(host if host is not None and device == "cpu" else size)

        monkeypatch.setattr(training_plan, "available_bytes", available)
        monkeypatch.setattr(footprint, "available_bytes", available)

    return set_free


@pytest.fixture
def gpus(monkeypatch):
    """Sets the number of GPUs; estimates do not run on them."""
    return lambda number: monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


def test_a_step_that_fits_tells_what_it_takes(free, caplog):
    free(64e9)
    with caplog.at_level(logging.INFO):
        assert planned_training(CONFIG, None, TRAINING, "cpu").settings == TRAINING
    assert "recover-train needs about 0.1 GB" in caplog.text
    assert "64.0 GB is free on this machine" in caplog.text


@pytest.mark.parametrize("wanted", [1, 2, 3, 6])
def test_micro_batch_0_takes_the_largest_that_fits(wanted, free):
    free(training_bytes(micro_batch=wanted) / 0.8 + 1)
    auto = dataclasses.replace(TRAINING, micro_batch=0)
    assert planned_training(CONFIG, None, auto, "cpu").settings.micro_batch == wanted


def test_micro_batch_0_takes_no_more_than_helps(free):
    free(64e9)
    auto = dataclasses.replace(TRAINING, micro_batch=0, sequence_length=1024)
    assert planned_training(CONFIG, None, auto, "cpu").settings.micro_batch == 4


def test_training_that_cannot_fit_is_refused_with_settings_that_do(free):
    free(training_bytes(micro_batch=2))
    big = dataclasses.replace(TRAINING, micro_batch=12, sequence_length=64)
    monstrous = dataclasses.replace(big, global_batch=1200, micro_batch=1200)
    with pytest.raises(OutOfMemoryError, match=r"recover-train needs about .* is free") as caught:
        planned_training(CONFIG, None, monstrous, "cpu")
    assert "Set training.micro_batch=" in str(caught.value)
    named = int(str(caught.value).partition("training.micro_batch=")[2].partition(":")[0].partition(",")[0])
    planned_training(CONFIG, None, dataclasses.replace(monstrous, micro_batch=named), "cpu")


def test_training_that_fits_only_with_checkpointing_is_told_so(free):
    long = dataclasses.replace(TRAINING, sequence_length=16384, global_batch=1, micro_batch=1)
    frugal = dataclasses.replace(long, gradient_checkpointing=True)
    free(training_footprint(CONFIG, None, frugal, device="cpu").device_bytes)
    told = r"Set training\.micro_batch=1, training\.gradient_checkpointing=true: it takes"
    with pytest.raises(OutOfMemoryError, match=told):
        planned_training(CONFIG, None, long, "cpu")
    assert planned_training(CONFIG, None, frugal, "cpu").settings == frugal


def test_training_beyond_any_setting_says_so(free):
    free(10_000)
    with pytest.raises(OutOfMemoryError, match="No setting makes it fit"):
        planned_training(CONFIG, None, TRAINING, "cpu")


def test_without_room_for_a_teacher_the_ways_without_one_in_memory_are_named(free):
    alone = dataclasses.replace(TRAINING, micro_batch=1, gradient_checkpointing=True)
    stored = dataclasses.replace(alone, teacher_logits="stored")
    free(training_footprint(CONFIG, None, stored, device="cpu").device_bytes)
    dense = copy.deepcopy(CONFIG)
    dense.intermediate_size *= 1000
    ways = r"Set training\.teacher_logits=stored or training\.teacher=none, which begins another run"
    with pytest.raises(OutOfMemoryError, match=ways):
        planned_training(CONFIG, dense, alone, "cpu")
    planned_training(CONFIG, None, stored, "cpu")
    planned_training(CONFIG, None, dataclasses.replace(alone, teacher="none"), "cpu")


def test_a_step_is_refused_where_85_percent_of_its_estimate_is_not_free(free):
    needed = training_bytes()
    free(0.85 * needed + 1)
    assert planned_training(CONFIG, None, TRAINING, "cpu").settings == TRAINING
    free(0.85 * needed - 1)
    with pytest.raises(OutOfMemoryError):
        planned_training(CONFIG, None, TRAINING, "cpu")


def test_all_gpus_train_and_each_holds_all_weights_if_they_fit(free, gpus, caplog):
    gpus(4)
    caplog.set_level(logging.INFO)
    free(80e9)
    plan = planned_training(CONFIG, None, AUTO, "cuda")
    assert (plan.ranks, plan.sharded, plan.settings.micro_batch) == (4, False, 3)  # of 12 sequences
    assert "4 ranks, 3 sequences at once on each; each holds all weights: they fit" in caplog.text


def test_weights_are_shared_out_where_they_do_not_fit_whole(free, gpus, caplog):
    gpus(4)
    caplog.set_level(logging.INFO)
    settings = dataclasses.replace(AUTO, micro_batch=3)
    sizes = [
        rank_parts(
            settings=dataclasses.replace(TRAINING, micro_batch=3), ranks=4, sharded=sharded
        ).device_bytes
        for sharded in (False, True)
    ]
    assert sizes[1] < sizes[0]
    free(sizes[0])
    assert not planned_training(CONFIG, None, settings, "cuda").sharded
    free(sizes[0] - 1)
    assert planned_training(CONFIG, None, settings, "cuda").sharded
    assert "shared out (FSDP2): whole, it would take 0.1 GB of 0.1 GB" in caplog.text
    told = dataclasses.replace(settings, sharding="none")
    free(TOLERANCE * sizes[0] - 1)
    with pytest.raises(OutOfMemoryError):
        planned_training(CONFIG, None, dataclasses.replace(told, micro_batch=3), "cuda")
    free(80e9)
    assert planned_training(CONFIG, None, dataclasses.replace(settings, sharding="full"), "cuda").sharded


def test_ranks_share_out_what_grows_with_the_parameters():
    parts = [rank_parts(ranks=3, sharded=sharded).parts for sharded in (False, True)]
    for name in ("weights", "optimizer", "gradients"):
        assert parts[1][name] == pytest.approx(parts[0][name] / 3, rel=1e-4)
    assert parts[1]["activations and logits"] == parts[0]["activations and logits"]


def test_moments_go_to_the_host_where_one_gpu_has_no_room(free, gpus, caplog):
    gpus(1)
    caplog.set_level(logging.INFO)
    on_device = training_bytes()
    free(on_device)
    assert planned_training(CONFIG, None, AUTO, "cuda").settings.moments == "device"
    free(on_device - 1, host=64e9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_plan, "_PASSING", 1000)  # as it would be of a large model
        assert planned_training(CONFIG, None, AUTO, "cuda").settings.moments == "host"
        assert "1 ranks, 6 sequences at once on each; the optimizer's moments stay in host" in caplog.text
        free(TOLERANCE * on_device - 1, host=64e9)
        with pytest.raises(OutOfMemoryError):
            planned_training(CONFIG, None, TRAINING, "cuda")
        free(TOLERANCE * on_device - 1, host=1000)
        with pytest.raises(OutOfMemoryError):
            planned_training(CONFIG, None, AUTO, "cuda")


def test_inputs_of_layers_go_to_the_host_where_moments_there_are_not_enough(free, gpus, caplog, monkeypatch):
    monkeypatch.setattr(training_plan, "_PASSING", 1000)
    caplog.set_level(logging.INFO)
    gpus(1)
    auto = dataclasses.replace(
        AUTO, sequence_length=8192, global_batch=1, micro_batch=1, gradient_checkpointing=True
    )
    here, moved = (dataclasses.replace(auto, layer_inputs=place) for place in ("device", "host"))
    estimate = functools.cache(functools.partial(training_footprint, CONFIG, None, device="cuda"))
    monkeypatch.setattr(training_plan, "training_footprint", lambda *given, **_: estimate(given[2]))
    whole = [estimate(settings) for settings in (here, moved)]
    one = 8192 * CONFIG.hidden_size * 4
    assert whole[1].waiting_bytes == CONFIG.num_hidden_layers * 2 ** (one - 1).bit_length()  # pinned
    assert whole[0].waiting_bytes == 0
    moments = whole[0].parts["optimizer"] - 1000
    for left, places in (
        (whole[0].device_bytes, ("device", "device")),
        (whole[0].device_bytes - moments, ("host", "device")),
        (whole[1].device_bytes, ("device", "host")),
        (whole[1].device_bytes - moments, ("host", "host")),
    ):
        free(left, host=64e9)
        plan = planned_training(CONFIG, None, auto, "cuda").settings
        assert (plan.moments, plan.layer_inputs) == places
    assert "the optimizer's moments and the inputs of layers stay in host memory: it would" in caplog.text
    shapes = [parameter.shape for parameter in build_empty(CONFIG).parameters()]
    pinned = sum(2 * 2 ** (4 * shape.numel() - 1).bit_length() for shape in shapes)
    assert pinned > whole[1].parts["optimizer"]
    in_host = whole[1].waiting_bytes + pinned
    free(TOLERANCE * left + 1, host=in_host - 1)
    with pytest.raises(OutOfMemoryError):
        planned_training(CONFIG, None, auto, "cuda")
    free(TOLERANCE * left + 1, host=in_host)
    planned_training(CONFIG, None, auto, "cuda")
    with pytest.raises(OutOfMemoryError):
        planned_training(CONFIG, None, here, "cuda")
    told = r"Set training\.micro_batch=1, training\.gradient_checkpointing=true: it takes"
    free(left, host=in_host)
    with pytest.raises(OutOfMemoryError, match=told):
        planned_training(CONFIG, None, dataclasses.replace(auto, gradient_checkpointing=False), "cuda")
    of_four = rank_footprint(whole[1], model_shape(CONFIG), TrainingPlan(settings=moved, ranks=4))
    assert of_four.host_bytes == 4 * of_four.waiting_bytes + of_four.parts["weights"]
    on_two = dataclasses.replace(moved, nodes=2, global_batch=4)
    of_two = rank_footprint(whole[1], model_shape(CONFIG), TrainingPlan(settings=on_two, ranks=4))
    assert of_two.host_bytes == 2 * of_four.waiting_bytes + of_four.parts["weights"]


def test_what_fits_on_no_gpu_names_the_number_that_it_fits_on(free, gpus, monkeypatch):
    monkeypatch.setattr(footprint, "LIBRARIES", 0)  # beside them the tiny model is nothing
    gpus(1)
    frugal = dataclasses.replace(TRAINING, micro_batch=1, gradient_checkpointing=True)
    on_two, on_three = (rank_parts(settings=frugal, ranks=ranks, sharded=True) for ranks in (2, 3))
    assert on_three.device_bytes < on_two.device_bytes
    free(on_three.device_bytes, host=0)
    told = r"Set cluster\.components\.recover-train\.gpus=3, training\.gradient_checkpointing=true, training"
    with pytest.raises(OutOfMemoryError, match=told):
        planned_training(CONFIG, None, dataclasses.replace(AUTO, micro_batch=1), "cuda")


def test_beside_more_gpus_the_runs_that_this_one_has_room_for_are_named():
    whole, half = (Footprint(parts={"weights": size}) for size in (100 * 10**9, 50 * 10**9))
    told = r"Set cluster\.gpus=2: .* resumes\. Set training\.teacher=none, which begins another run, to stay"
    with pytest.raises(OutOfMemoryError, match=told):
        check_fit(
            "s", whole, 80 * 10**9, "cuda", [("cluster.gpus=2", half)], [("training.teacher=none", half)]
        )


@pytest.mark.parametrize(
    ("number", "changes", "says"),
    [
        (1, {"sharding": "full"}, "sharding=full has no effect: a single rank trains"),
        (4, {"sharding": "full", "lora_rank": 8}, "sharding=full has no effect: adapters are trained"),
        (4, {"moments": "host"}, "on its GPU. training.sharding=full shares them out"),
        (4, {"moments": "host", "sharding": "full"}, "each keeps its moments on its GPU;"),
        (4, {"moments": "host", "lora_rank": 8}, "each keeps its moments on its GPU;"),
        (
            0,
            {"layer_inputs": "host", "gradient_checkpointing": True},
            "layer_inputs=host has no effect on a CPU",
        ),
        (0, {"moments": "host"}, "moments=host has no effect on a CPU"),
        (4, {"sharding": "full"}, ""),
        (1, {"moments": "host"}, ""),
        (1, {"layer_inputs": "host", "gradient_checkpointing": True}, ""),
        (4, {}, ""),
    ],
)
def test_a_setting_that_changes_nothing_here_is_a_warning(free, gpus, caplog, number, changes, says):
    free(80e9)
    gpus(number)
    settings = dataclasses.replace(AUTO, optimizer_state="reset", **changes)
    planned_training(CONFIG, None, settings, "cuda" if number else "cpu")
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == bool(says)
    assert says in "".join(f"{text};" for text in warned)


def test_gpus_that_cannot_have_equal_parts_stay_idle(free, gpus, caplog):
    free(80e9)
    gpus(5)
    assert planned_training(CONFIG, None, AUTO, "cuda").ranks == 4
    assert "4 of 5 GPUs train" in caplog.text
    with pytest.raises(SettingsError, match=r"training\.ranks=6, but the task has 5 GPUs"):
        planned_training(CONFIG, None, dataclasses.replace(AUTO, ranks=6), "cuda")
    with pytest.raises(SettingsError, match=r"ranks=5 must divide global_batch=12"):
        dataclasses.replace(AUTO, ranks=5)


def test_ranks_on_the_cpu_share_its_memory(free):
    free(3 * training_bytes(micro_batch=4))
    three = dataclasses.replace(AUTO, ranks=3)
    plan = planned_training(CONFIG, None, three, "cpu")
    assert (plan.ranks, plan.settings.micro_batch) == (3, 4)
    free(TOLERANCE * training_bytes(micro_batch=4) * 2)
    with pytest.raises(OutOfMemoryError):
        planned_training(CONFIG, None, dataclasses.replace(three, sharding="none"), "cpu")
