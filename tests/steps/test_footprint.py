import dataclasses
import logging

import pytest
import torch
from transformers import LlamaConfig

from core.errors import OutOfMemoryError
from core.model.build import dtype_of, model_shape
from core.model.layerwise import LayerwiseModel
from core.model.simulation import simulate_head, simulate_inference, simulate_layer, simulate_training
from core.pruning.scoring.calibration import _Passes
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
    planned_training,
    scoring_footprint,
    training_footprint,
)
from core.training.state import TrainingProgress, write_state
from tests.support.models import CONFIGS, SIZES, UNEQUAL, random_tokens, tiny

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
    return training_footprint(CONFIG, settings, device="cpu").device_bytes


@pytest.fixture
def free(monkeypatch):
    """Sets the memory that is free."""

    def set_free(size):
        monkeypatch.setattr(footprint, "available_bytes", lambda device="cpu": int(size))

    return set_free


def test_a_step_that_fits_tells_what_it_takes(free, caplog):
    free(64e9)
    with caplog.at_level(logging.INFO):
        assert planned_training(CONFIG, TRAINING, "cpu") == TRAINING
    assert "recover-train needs about 0.1 GB" in caplog.text
    assert "64.0 GB is free on this machine" in caplog.text


@pytest.mark.parametrize("wanted", [1, 2, 3, 6])
def test_micro_batch_0_takes_the_largest_that_fits(wanted, free):
    free(training_bytes(micro_batch=wanted) / 0.8 + 1)
    auto = dataclasses.replace(TRAINING, micro_batch=0)
    assert planned_training(CONFIG, auto, "cpu").micro_batch == wanted


def test_micro_batch_0_takes_no_more_than_helps(free):
    free(64e9)
    auto = dataclasses.replace(TRAINING, micro_batch=0, sequence_length=1024)
    assert planned_training(CONFIG, auto, "cpu").micro_batch == 4


def test_training_that_cannot_fit_is_refused_with_settings_that_do(free):
    free(training_bytes(micro_batch=2))
    big = dataclasses.replace(TRAINING, micro_batch=12, sequence_length=64)
    monstrous = dataclasses.replace(big, global_batch=1200, micro_batch=1200)
    with pytest.raises(OutOfMemoryError, match=r"recover-train needs about .* is free") as caught:
        planned_training(CONFIG, monstrous, "cpu")
    assert "Set training.micro_batch=" in str(caught.value)
    named = int(str(caught.value).partition("training.micro_batch=")[2].partition(":")[0].partition(",")[0])
    planned_training(CONFIG, dataclasses.replace(monstrous, micro_batch=named), "cpu")


def test_training_beyond_any_setting_says_so(free):
    free(10_000)
    with pytest.raises(OutOfMemoryError, match="No setting makes it fit"):
        planned_training(CONFIG, TRAINING, "cpu")


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


def test_a_real_allocation_beyond_the_machine_is_explained():
    with pytest.raises(OutOfMemoryError), explaining_memory("evaluation.batch_size"):
        torch.empty(2**50, dtype=torch.uint8)


def test_criteria_of_products_hold_a_square_matrix_of_the_widest_projection():
    """Measured apart: leverage and obs took 261 and 264 MB more than wanda_sp at an MLP width of 3,000."""

    def needed(criterion, width):
        config = LlamaConfig(**SIZES | {"intermediate_size": width})
        return scoring_footprint(
            config, CALIBRATION, PruneSettings(criterion=criterion), device="cpu", free_bytes=10**12
        ).device_bytes

    for criterion in ("leverage", "obs"):
        more = needed(criterion, 3000) - needed("wanda_sp", 3000)
        assert more == pytest.approx(261e6, rel=0.05)


def test_parts_add_up_and_only_the_larger_ones_are_named():
    found = Footprint(parts={"weights": 3 * 10**9, "logits": 10**7, "rest": 10**7 - 1})
    assert found.device_bytes == 3_019_999_999
    assert str(found) == "3.0 GB (weights 3.0 GB, logits 0.0 GB)"


def held(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(("micro_batch", "accumulates"), [(6, True), (12, False)])
def test_training_holds_what_a_step_leaves_behind_and_its_widest_moment(micro_batch, accumulates, tmp_path):
    model, tokens = tiny("llama-tied", dtype=torch.float32), random_tokens()
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    settings = dataclasses.replace(TRAINING, micro_batch=micro_batch)
    found = training_footprint(model.config, settings, device="cpu", stored_bytes=2)
    weights = held(model.parameters())
    moments = [state[kind] for state in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq")]
    assert (found.parts["weights"], found.parts["optimizer"]) == (weights, held(moments))
    assert found.parts["gradients"] == held(p.grad for p in model.parameters())
    passes = simulate_training(
        model.config, micro_batch, 64, autocast=False, checkpointing=False, device="cpu",
        accumulate=accumulates,
    )  # fmt: skip
    beside = found.parts["gradients"] + found.parts["activations and logits"]
    assert (beside, found.parts["libraries"]) == (passes.peak, 10**8)
    assert found.host_bytes == weights
    write_state(tmp_path / "s", model, optimizer, TrainingProgress(losses=[(0, 1.0, 1.0)]), belongs_to={})
    state = sum(file.stat().st_size for file in (tmp_path / "s").iterdir())
    assert found.disk_bytes == pytest.approx(2 * weights / 2 + state, rel=0.05)


def scoring(free_bytes, device="cpu", criterion="taylor_l1", config=CONFIG, **changes):
    settings = dataclasses.replace(CALIBRATION, **changes)
    prune = PruneSettings(criterion=criterion)
    return scoring_footprint(config, settings, prune, device=device, free_bytes=free_bytes)


STATES = 64 * 32 * 48 * 4
"""Bytes of the calibration set's hidden states."""


@pytest.mark.parametrize("criterion", ["taylor_l1", "taylor_signed", "wanda_sp"])
@pytest.mark.parametrize("room", [0, 2 * STATES, 5 * STATES])
def test_scoring_on_the_cpu_keeps_what_its_passes_allocate(criterion, room, tmp_path):
    model = tiny("llama", dtype=torch.float32)
    passes = _Passes(LayerwiseModel(model), random_tokens(64, 32), 8, criterion, 0)
    passes.make_room(room, tmp_path, room - 3 * STATES)
    found = scoring(10**12, criterion=criterion, state_memory=f"{room}B", micro_batch=8)
    goes_back = criterion != "wanda_sp"
    assert found.parts["weights"] == held(model.parameters())
    assert found.parts["kept layer inputs"] == held(passes.inputs._memory) + STATES
    kept = [tensor for layer in passes.kept._kept for tensor in layer.values()] if goes_back else []
    assert found.parts["kept layer outputs"] == held(kept)
    assert bool(kept) == (goes_back and room == 5 * STATES)
    on_disk = (3 if goes_back else 0) - len(passes.inputs._memory)
    assert found.disk_bytes == held(model.parameters()) // 2 + on_disk * STATES
    assert found.host_bytes == 0
    widest = simulate_layer(
        CONFIG, torch.float32, 8, 32, of_weights=criterion == "taylor_l1", backward=goes_back
    )
    head = simulate_head(CONFIG, torch.float32, 8, 32, device="cpu")
    assert found.parts["a layer's passes"] == max(widest.peak, head.peak)


@pytest.mark.parametrize("slots", range(6))
def test_scoring_on_a_gpu_shares_the_states_out_between_it_and_the_host(slots):
    """Four: those between layers, and three layers' inputs; what the device has no room for the host pins."""
    weights = held(tiny("llama", dtype=torch.float32).parameters())
    found = scoring(weights + 4 * slots * STATES, "cuda", state_memory="1GB", weights="memory")
    there = min(slots, 4)
    assert found.parts["kept layer inputs"] == there * STATES
    assert found.host_bytes == (4 - there) * 2**19  # the next power of 2
    assert found.disk_bytes == weights // 2
    assert (found.parts["kept layer outputs"] > 0) == (slots == 5)


def test_streamed_weights_are_those_outside_the_layers_and_of_the_largest():
    model = tiny("llama", UNEQUAL, dtype=torch.float32)
    layers = [held(layer.parameters()) for layer in model.model.layers]
    whole = held(model.parameters())
    for free_bytes, weights in ((2 * whole, whole), (2 * whole - 2, whole - sum(layers) + max(layers))):
        assert scoring(free_bytes, config=model.config).parts["weights"] == weights


@pytest.mark.parametrize(
    ("device", "tasks", "positions"), [("cpu", (), 16), ("cpu", ("piqa",), 256), ("cuda", ("piqa",), 2048)]
)
@pytest.mark.parametrize(("precision", "logit_bytes"), [("float32", 8), ("bfloat16", 10)])
def test_evaluation_holds_the_weights_and_logits(device, tasks, positions, precision, logit_bytes):
    config = CONFIGS["llama"]()
    config.vocab_size = 5000
    settings = dataclasses.replace(
        EVALUATION, precision=precision, batch_size=2, perplexity_length=8, tasks=tasks
    )
    found = evaluation_footprint(config, settings, device=device, stored_bytes=2)
    params, itemsize = model_shape(config).num_params(), 4 if precision == "float32" else 2
    assert found.parts["weights"] == found.host_bytes == params * itemsize
    assert found.disk_bytes == 2 * params * 2
    states = 2 * 8 * 48 * itemsize
    assert found.parts["activations, then logits"] == states + positions * 5000 * logit_bytes
    long = dataclasses.replace(settings, perplexity_length=512, batch_size=64, tasks=())
    passes = simulate_inference(config, dtype_of(precision), 64, 512)
    assert evaluation_footprint(config, long, device="cpu").parts["activations, then logits"] == max(
        passes.peak, 64 * 512 * 48 * itemsize + 2**24 // 5000 * 5000 * logit_bytes
    )


def test_a_step_is_refused_where_85_percent_of_its_estimate_is_not_free(free):
    needed = training_bytes()
    free(0.85 * needed + 1)
    assert planned_training(CONFIG, TRAINING, "cpu") == TRAINING
    free(0.85 * needed - 1)
    with pytest.raises(OutOfMemoryError):
        planned_training(CONFIG, TRAINING, "cpu")
