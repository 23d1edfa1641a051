"""The plan of memory against what a step of training, a measurement and an evaluation really hold."""

import dataclasses

import pytest
import torch

from core.model.build import dtype_of, model_shape
from core.model.layerwise import LayerwiseModel, frozen
from core.model.simulation import (
    _LiveBytes,
    simulate_head,
    simulate_inference,
    simulate_layer,
    simulate_training,
)
from core.pruning.scoring.calibration import _Passes
from core.pruning.scoring.criteria import CRITERIA
from core.settings.prune import PruneSettings
from core.steps.footprint import evaluation_footprint, scoring_footprint, training_footprint
from core.training.state import TrainingProgress, state_tensors, write_state
from tests.steps.test_footprint import CALIBRATION, CONFIG, EVALUATION, TRAINING
from tests.support.models import CONFIGS, UNEQUAL, random_tokens, tiny

DEFAULT = PruneSettings().criterion


def held(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(("micro_batch", "accumulates"), [(6, True), (12, False)])
def test_training_holds_what_a_step_leaves_behind_and_its_widest_moment(micro_batch, accumulates, tmp_path):
    model, tokens = tiny("llama-tied", dtype=torch.float32), random_tokens()
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    settings = dataclasses.replace(TRAINING, micro_batch=micro_batch)
    found = training_footprint(model.config, None, settings, device="cpu", stored_bytes=2)
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
    write_state(
        tmp_path / "s",
        state_tensors(model, optimizer),
        TrainingProgress(losses=[(0, 1.0, 1.0)]),
        belongs_to={},
    )
    state = sum(file.stat().st_size for file in (tmp_path / "s").iterdir())
    assert found.disk_bytes == pytest.approx(2 * weights / 2 + state, rel=0.05)


def scoring(free_bytes, device="cpu", criterion=DEFAULT, config=CONFIG, **changes):
    settings = dataclasses.replace(CALIBRATION, **changes)
    prune = PruneSettings(criterion=criterion)
    return scoring_footprint(config, settings, prune, device=device, free_bytes=free_bytes)


STATES = 64 * 32 * 48 * 4
"""Bytes of the calibration set's hidden states."""


@pytest.mark.parametrize("criterion", [DEFAULT, "taylor_l1", "taylor_signed", "wanda_sp"])
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
    of_weights = criterion == "taylor_l1"
    add = None if of_weights else CRITERIA[criterion].add
    widest = simulate_layer(CONFIG, torch.float32, 8, 32, of_weights=of_weights, backward=goes_back, add=add)
    head = simulate_head(CONFIG, torch.float32, 8, 32, device="cpu")
    assert found.parts["a layer's passes"] == max(widest.peak, head.peak)


def test_scoring_by_the_default_criterion_holds_what_its_widest_layer_really_takes():
    """The activations that it observes, their gradients, and the products of both."""
    model = tiny("llama", dtype=torch.float32)
    passes = _Passes(LayerwiseModel(model), random_tokens(64, 32), 64, DEFAULT, 0)
    with frozen(model):
        state = passes.model.embed(passes.tokens)
        for_layer = passes._scoring(0, passes.model.layers[0]), torch.ones_like(state)
        with _LiveBytes() as counter:
            passes._layer_backward(0, state, *for_layer)
    found = scoring(10**12, micro_batch=64)
    assert found.parts["a layer's passes"] == pytest.approx(counter.peak, rel=0.1)


@pytest.mark.parametrize("slots", range(6))
def test_scoring_on_a_gpu_shares_the_states_out_between_it_and_the_host(slots):
    """Four: those between layers, and three layers' inputs; what the device has no room for the host pins."""
    weights = held(tiny("llama", dtype=torch.float32).parameters())
    found = scoring(weights + 4 * slots * STATES, "cuda", state_memory="1GB", weights="memory")
    there = min(slots, 4)
    assert found.parts["kept layer inputs"] == there * STATES
    assert found.host_bytes == max(weights, (4 - there) * 2**19)  # the next power of 2
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
