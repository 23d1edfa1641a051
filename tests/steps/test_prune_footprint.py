import dataclasses
import logging
import re

import pytest
import torch

from core.errors import OutOfMemoryError
from core.model.build import build_model, model_shape
from core.model.config import config_with_layers, layer_shapes
from core.model.decoder import final_states
from core.pruning.methods.masks import LAYERS, masked
from core.settings.calibration import CalibrationSettings
from core.settings.prune import PruneSettings
from core.steps import prune_footprint
from core.steps.prune_footprint import (
    check_repair,
    distill_batch,
    distillation_footprint,
    masks_footprint,
    planned_distillation,
    planned_masks,
    repair_footprint,
)
from tests.support.models import CONFIGS, UNEQUAL

DENSE = CONFIGS["llama"]()
SMALLER = config_with_layers(DENSE, UNEQUAL)
CALIBRATION = CalibrationSettings(sequence_length=32, precision="float32", state_memory="1MB")
PRUNE = PruneSettings(distill_steps=3, distill_batch_tokens="384", repair_tokens="4k")  # 12 sequences


@pytest.fixture
def free(monkeypatch):
    """Sets the memory that is free."""

    def set_free(size):
        monkeypatch.setattr(prune_footprint, "available_bytes", lambda device="cpu": int(size))

    return set_free


def of_distillation(micro_batch, **changes):
    calibration = dataclasses.replace(CALIBRATION, micro_batch=micro_batch, **changes)
    return distillation_footprint(SMALLER, DENSE, calibration, PRUNE, device="cpu")


def of_repair(**changes):
    calibration = dataclasses.replace(CALIBRATION, **changes)
    return repair_footprint(DENSE, calibration, PRUNE, device="cpu", free_bytes=10**9)


def test_a_batch_holds_at_least_the_tokens_asked_for():
    assert distill_batch(CALIBRATION, PRUNE) == 12
    assert distill_batch(CALIBRATION, dataclasses.replace(PRUNE, distill_batch_tokens="385")) == 13


def test_a_distillation_holds_both_models():
    params, dense = (model_shape(config).num_params() for config in (SMALLER, DENSE))
    parts = of_distillation(1).parts
    assert (parts["weights"], parts["optimizer"], parts["gradients"]) == (4 * params, 8 * params, 4 * params)
    assert parts["base model"] == 4 * dense
    assert of_distillation(1, precision="bfloat16").parts["base model"] == 2 * dense


def test_more_sequences_take_more_up_to_a_batch():
    sizes = [of_distillation(size).device_bytes for size in (1, 3, 6)]
    assert sizes == sorted(set(sizes))
    assert of_distillation(12) == of_distillation(1000)


@pytest.mark.parametrize("wanted", [1, 2, 3, 6, 12])
def test_micro_batch_0_takes_the_largest_that_fits(wanted, free):
    free(of_distillation(wanted).device_bytes / 0.8 + 1)
    assert planned_distillation(SMALLER, DENSE, CALIBRATION, PRUNE, "cpu") == wanted


def test_a_distillation_that_cannot_fit_is_refused_with_a_setting_that_does(free):
    room = of_distillation(2).device_bytes
    free(room)
    hungry = dataclasses.replace(CALIBRATION, micro_batch=12)
    hungry_prune = dataclasses.replace(PRUNE, distill_batch_tokens="1M")
    hungry = dataclasses.replace(hungry, micro_batch=10_000)
    with pytest.raises(OutOfMemoryError, match=r"the distillation needs about .* is free") as caught:
        planned_distillation(SMALLER, DENSE, hungry, hungry_prune, "cpu")
    named = int(re.search(r"Set calibration\.micro_batch=(\d+):", str(caught.value))[1])
    resumed = dataclasses.replace(hungry, micro_batch=named)
    assert planned_distillation(SMALLER, DENSE, resumed, hungry_prune, "cpu") == named
    free(10_000)
    with pytest.raises(OutOfMemoryError, match="No setting makes it fit"):
        planned_distillation(SMALLER, DENSE, CALIBRATION, PRUNE, "cpu")


@pytest.mark.parametrize("layers", ["auto", "2"])
def test_learning_masks_holds_a_model_with_its_moments_and_what_masks_multiply(layers):
    prune = dataclasses.replace(PRUNE, method="sheared-llama", repair="none", phases=1, layers=layers)

    def need(micro_batch, **changes):
        calibration = dataclasses.replace(CALIBRATION, micro_batch=micro_batch, **changes)
        return masks_footprint(SMALLER, calibration, prune, device="cpu")

    params = model_shape(SMALLER).num_params()
    parts = need(2).parts
    assert (parts["weights"], parts["optimizer"], parts["gradients"]) == (4 * params, 8 * params, 4 * params)
    model = build_model(SMALLER).requires_grad_(True)
    masks = {
        (index, path): torch.rand(getattr(layer, size), requires_grad=True)
        for index, layer in enumerate(layer_shapes(SMALLER))
        for path, size in (("self_attn.o_proj", "kv_heads"), ("mlp.down_proj", "mlp_width"))
    }
    if layers == "2":
        masks[LAYERS] = torch.rand(3, requires_grad=True)
    ids, kept = torch.zeros(2, 32, dtype=torch.long), {}
    for name, given in (("masked", masks), ("whole", {})):
        seen = {}

        def keep(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with masked(model, given), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            states = final_states(model, ids)
        kept[name] = sum(storage.nbytes() for storage in seen.values())
        del states
    columns = 4 * sum(layer.mlp_width + 10 * layer.query_heads for layer in layer_shapes(SMALLER))
    columns += 4 * 3 * (layers == "2")
    assert kept["masked"] - kept["whole"] - columns == parts["masked activations"]
    assert need(2, precision="bfloat16").parts["masked activations"] == parts["masked activations"] / 2
    assert need(12) == need(1000)


def test_learning_masks_takes_the_largest_micro_batch_that_fits_or_is_refused(free):
    needed = masks_footprint(DENSE, dataclasses.replace(CALIBRATION, micro_batch=3), PRUNE, device="cpu")
    free(needed.device_bytes / 0.8 + 1)
    assert planned_masks(DENSE, CALIBRATION, PRUNE, "cpu") == 3
    free(10_000)
    with pytest.raises(OutOfMemoryError, match=r"the learning of masks needs about .* No setting makes it"):
        planned_masks(DENSE, CALIBRATION, PRUNE, "cpu")


def test_a_repair_tells_what_it_takes_and_is_refused_with_settings_that_take_less(free, caplog):
    free(64e9)
    with caplog.at_level(logging.INFO):
        check_repair(DENSE, CALIBRATION, PRUNE, "cpu")
    assert "the repair needs about" in caplog.text
    # Hidden states and weights beyond any other part.
    hungry = dataclasses.replace(CALIBRATION, state_memory="1TB", micro_batch=100_000, pool_documents=10**6)
    tokens = dataclasses.replace(PRUNE, repair_tokens="32M")
    least = repair_footprint(
        DENSE,
        dataclasses.replace(hungry, weights="streamed", micro_batch=1, state_memory="0"),
        tokens,
        device="cpu",
        free_bytes=10**9,
    )
    free(1.01 * least.device_bytes)
    with pytest.raises(OutOfMemoryError, match="the repair needs ") as refused:
        check_repair(DENSE, hungry, tokens, "cpu")
    least_settings = "weights=streamed, calibration.micro_batch=1, calibration.state_memory=0:"
    assert f"Set calibration.{least_settings}" in str(refused.value)


def test_a_repair_holds_a_hidden_state_a_token_and_what_it_may_keep():
    states = 4000 * DENSE.hidden_size * 4
    assert of_repair().parts["hidden states"] == states
    assert of_repair(state_memory="0").parts["kept activations"] == 0
    everything = 4000 * 4 * (max(DENSE.intermediate_size, 60) + DENSE.hidden_size)
    assert of_repair(state_memory="1GB").parts["kept activations"] == everything
    assert of_repair().parts["kept activations"] == 10**6 - states
    assert of_repair(precision="bfloat16").parts["hidden states"] == states / 2
    assert of_repair(sequences=8, pool_documents=25).parts["hidden states"] == states / 5
    assert of_repair(weights="streamed").parts["weights"] < of_repair().parts["weights"]


def test_on_a_gpu_hidden_states_take_the_hosts_memory():
    here = repair_footprint(DENSE, CALIBRATION, PRUNE, device="cuda", free_bytes=10**9)
    assert here.parts["hidden states"] == 0
    assert here.host_bytes > of_repair().parts["hidden states"]
    assert torch.float32.itemsize * model_shape(DENSE).num_params() == here.parts["weights"]
