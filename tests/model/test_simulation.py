import pytest
import torch

from core.model.decoder import final_states
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
from core.training.adapters import add_adapters
from core.training.rows import documents_of
from tests.support.models import CONFIGS, random_tokens, tiny

B, T = 3, 11


def saved_bytes(model, tokens=None, documents=None, *, autocast):
    """What autograd really keeps for the backward pass, each storage once, less the weights."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        tokens = torch.zeros(B, T, dtype=torch.long) if tokens is None else tokens
        states = final_states(model, tokens, documents)
    storages[states.untyped_storage().data_ptr()] = states.untyped_storage().nbytes()
    return sum(size for pointer, size in storages.items() if pointer not in weights)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_forward_pass_keeps_is_what_autograd_saves(name, autocast):
    model = tiny(name, dtype=torch.float32).train()
    simulated = simulate_training(model.config, B, T, autocast=autocast, checkpointing=False, device="cpu")
    # Among fake tensors transformers repeats keys and values for their query heads; else SDPA does without.
    assert simulated.kept == pytest.approx(saved_bytes(model, autocast=autocast), rel=0.12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "mistral"])
def test_the_mask_that_each_layer_keeps_of_packed_documents_is_planned_for(name, autocast):
    model = tiny(name, dtype=torch.float32).train()
    batch, length = 2, 96
    starts = torch.zeros(batch, length, dtype=torch.long)
    starts[:, [0, 31, 70]] = 1
    tokens = torch.zeros(batch, length, dtype=torch.long)
    found = saved_bytes(model, tokens, documents_of(starts), autocast=autocast)
    # Among fake tensors transformers makes that mask for any rows.
    simulated = simulate_training(
        model.config, batch, length, autocast=autocast, checkpointing=False, device="cpu"
    )
    # The masks are a tenth of it.
    assert simulated.kept == pytest.approx(found, rel=0.04)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3"])
def test_what_a_forward_pass_with_adapters_keeps_is_what_autograd_saves(name, autocast):
    model = tiny(name, dtype=torch.float32).train()
    simulated = simulate_training(
        model.config, B, T, autocast=autocast, checkpointing=False, device="cpu", lora_rank=4
    )
    add_adapters(model, 4)
    assert simulated.kept == pytest.approx(saved_bytes(model, autocast=autocast), rel=0.15)


def test_a_teacher_takes_more_and_adapters_take_less_than_all_gradients():
    def peak(**options):
        found = simulate_training(
            CONFIGS["llama"](), B, T, autocast=False, checkpointing=False, device="cpu", **options
        )
        return found.peak

    assert peak(lora_rank=2) < peak(lora_rank=8) < peak() < peak(taught=(1.0, 1.0))
    assert peak(taught=(1.0, 1.0)) < peak(taught=(0.5, 2.0))


def test_the_peak_of_training_holds_all_gradients():
    config = CONFIGS["llama"]()
    model = tiny("llama", dtype=torch.float32)
    simulated = simulate_training(config, B, T, autocast=False, checkpointing=False, device="cpu")
    assert simulated.peak >= 4 * model.num_parameters()


def test_checkpointing_keeps_less_and_more_sequences_keep_more():
    config = CONFIGS["llama"]()

    def kept(batch, checkpointing):
        return simulate_training(
            config, batch, T, autocast=False, checkpointing=checkpointing, device="cpu"
        ).kept

    assert kept(8, True) < kept(8, False) / 3
    assert kept(16, False) == pytest.approx(2 * kept(8, False), rel=0.12)


def test_inputs_of_layers_in_host_memory_are_not_on_the_device():
    config = CONFIGS["llama"]()
    there, elsewhere = (
        simulate_training(
            config, 64, T, autocast=False, checkpointing=True, device="cpu", offload=offload, accumulate=True
        )
        for offload in (False, True)
    )
    one = 64 * T * config.hidden_size * 4
    assert elsewhere.handed_over == (one,) * config.num_hidden_layers
    assert there.kept - elsewhere.kept == sum(elsewhere.handed_over)
    assert there.peak - elsewhere.peak == sum(elsewhere.handed_over) - one  # one comes back for its gradient
    assert there.handed_over == ()


def test_a_pass_without_gradients_takes_the_widest_moment_alone():
    config = CONFIGS["llama"]()
    trained = simulate_training(config, B, T, autocast=False, checkpointing=False, device="cpu")
    assert simulate_inference(config, torch.float32, B, T).peak < trained.kept


def test_scoring_without_a_way_back_takes_less_and_gradients_of_weights_take_more():
    config = CONFIGS["llama"]()

    def peak(**options):
        return simulate_layer(config, torch.float32, B, T, **options).peak

    forward = peak(of_weights=False, backward=False)
    outputs = peak(of_weights=False, backward=True)
    assert forward < outputs < peak(of_weights=True, backward=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "criterion"),
    [*((name, "fisher_per_token") for name in CONFIGS), ("llama", "wanda_sp"), ("phi3", "wanda_sp")],
)
def test_what_scoring_observes_of_a_layer_takes_what_it_really_holds(name, criterion, dtype):
    """Once half of it was left out: gradients of activations, and float32 copies of both."""
    model, tokens = tiny(name, dtype=dtype), random_tokens(16, 32)
    passes = _Passes(LayerwiseModel(model), tokens, len(tokens), criterion, 0)
    with frozen(model):
        state = passes.model.embed(tokens)
        gradient = torch.ones_like(state)
        scoring = passes._scoring(0, passes.model.layers[0])
        with _LiveBytes() as counter:
            if passes.goes_back:
                passes._layer_backward(0, state, scoring, gradient)
            else:
                with torch.no_grad(), scoring.activations() as seen:
                    after = passes.model.run(0, state)
                scoring.add({name: (v,) for name, v in seen.items()}, tokens=tokens.numel())
                assert after.shape == state.shape
    simulated = simulate_layer(
        model.config,
        dtype,
        *tokens.shape,
        of_weights=False,
        backward=passes.goes_back,
        add=CRITERIA[criterion].add,
    )
    assert simulated.peak == pytest.approx(counter.peak, rel=0.1)


def test_the_head_takes_its_logits_a_chunk_at_a_time():
    config = CONFIGS["llama"]()
    peak = simulate_head(config, torch.float32, B, T, device="cpu").peak
    assert peak >= 2 * 4 * B * T * config.vocab_size
