"""LoRA: which parameters are trained, what their gradients are, how they are merged, stored and resumed."""

import pytest
import torch
from safetensors import safe_open

from core.errors import CheckpointError, SettingsError
from core.model.decoder import final_states
from core.model.loss import loss_gradient
from core.quantities import Interval
from core.settings.recipe import settings_from_dict
from core.storage.interface import join_uri
from core.storage.publication import open_publication
from core.training.adapters import add_adapters
from core.training.recover import recover
from core.training.resume import SavedStates
from core.training.rows import Rows
from core.training.state import check_fits, read_state, trained_parameters
from tests.support.models import CONFIGS, UNEQUAL, Float64Throughout, random_tokens, tiny
from tests.support.project import recipe_with
from tests.support.training import training_settings, weights

TOKENS = random_tokens(rows=4)
RANK = 3


def randomize(model, seed=2):
    """Give the adapters, whose B is 0, values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1)


def projections(model):
    """Name and weight of each projection of the layers, found without the family's table."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}"
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weights_are_those_plus_twice_the_product(name):
    model, plain = tiny(name, UNEQUAL), tiny(name, UNEQUAL)
    with torch.no_grad():
        dense = plain(TOKENS).logits
        adapters = add_adapters(model, RANK)
        assert torch.equal(model(TOKENS).logits, dense)  # at first nothing changes
        randomize(model)
        pairs = {}
        for key, parameter in trained_parameters(model).items():
            place, _, which = key.partition(".lora_")
            pairs.setdefault(place, {})[which[0]] = parameter.detach().clone()
        assert pairs.keys() == projections(plain).keys()
        for place, weight in projections(plain).items():
            assert pairs[place]["A"].shape == (RANK, weight.shape[1])
            weight += 2 * pairs[place]["B"] @ pairs[place]["A"]
        with Float64Throughout():
            expected = plain(TOKENS).logits
            torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-9, atol=1e-9)
            assert not torch.allclose(expected, dense, rtol=0.01)
            adapters.merge_and_unload()
            torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-12, atol=1e-12)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llama-tied", "phi3", "gemma2"])
def test_gradients_of_adapters_follow_from_those_of_the_weights(name):
    """Of W + 2 B A: 2 B^T dW and 2 dW A^T."""
    model = tiny(name, UNEQUAL)
    adapters = add_adapters(model, RANK)
    randomize(model)
    with Float64Throughout():
        states = final_states(model, TOKENS)
        states.backward(loss_gradient(model, states, TOKENS, scale=1.0)[1])
        found = {key: p for key, p in trained_parameters(model).items()}
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        merged = tiny(name, UNEQUAL)
        adapters.merge_and_unload()
        merged.load_state_dict(model.state_dict())
        states = final_states(merged, TOKENS)
        states.backward(loss_gradient(merged, states, TOKENS, scale=1.0)[1])
    for place, weight in projections(merged).items():
        a, b = (found[f"{place}.lora_{which}.default.weight"] for which in "AB")
        torch.testing.assert_close(a.grad, 2 * b.T @ weight.grad, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(b.grad, 2 * weight.grad @ a.T, rtol=1e-8, atol=1e-9)


def train(model, steps=2, **changes):
    tokens = random_tokens(rows=4 * steps)
    rows = Rows(tokens, torch.ones_like(tokens))
    torch.manual_seed(3)
    return recover(model, rows, training_settings(**changes), first_step=0, total_steps=30)


def test_training_changes_the_adapters_alone_and_the_loss_falls():
    torch.manual_seed(1)
    model = tiny("qwen2", UNEQUAL, dtype=torch.float32)
    add_adapters(model, RANK)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = train(model, steps=16)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained_parameters(model).keys()
    assert report.losses[-1][1] < report.losses[0][1]


def test_gradient_checkpointing_changes_no_number():
    models = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = tiny("llama", UNEQUAL)
        add_adapters(model, RANK)
        train(model, gradient_checkpointing=checkpointing)
        models.append(weights(model))
    torch.testing.assert_close(*models)


def test_autocast_keeps_adapters_in_float32():
    losses = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(1)
        model = tiny("llama", UNEQUAL, dtype=torch.float32)
        add_adapters(model, RANK)
        losses.append(train(model, precision=precision).losses[-1][1])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


class StoppedError(Exception):
    pass


def attempt(uri, folder, *, stop=None, seed=0):
    """Train 6 steps as a task does; ``seed`` is of the adapters that a resumed attempt replaces."""
    model, tokens = tiny("llama", UNEQUAL, dtype=torch.float32), random_tokens(rows=24)
    torch.manual_seed(seed)
    adapters = add_adapters(model, RANK)
    every = Interval(steps=1)
    with SavedStates(uri, folder, every=every, belongs_to={"settings": "s"}) as states:
        state = states.newest(model, first_step=10)

        def save(optimizer, progress):
            states._publisher.submit(int).result()
            states.save(model, optimizer, progress)
            if len(progress.losses) == stop:
                raise StoppedError

        torch.manual_seed(3)
        rows = Rows(tokens, torch.ones_like(tokens))
        report = recover(
            model, rows, training_settings(), first_step=10, total_steps=30, resume_from=state, save=save
        )
    adapters.merge_and_unload()
    return report.losses, weights(model)


def test_a_killed_training_resumes_bit_for_bit_from_a_state_of_the_adapters_alone(tmp_path):
    uri = str(tmp_path / "store")
    with pytest.raises(StoppedError):
        attempt(uri, tmp_path / "work", stop=3)
    state = open_publication(join_uri(uri, "000013")).fetch(tmp_path / "state")
    with safe_open(state / "state-00001.safetensors", framework="pt") as shard:
        stored = {key: shard.get_slice(key).get_shape() for key in shard.keys()}  # noqa: SIM118
    model = tiny("llama", UNEQUAL)
    add_adapters(model, RANK)
    names = trained_parameters(model)
    assert {key.partition(".")[2] for key in stored if not key.startswith("rng")} == names.keys()
    assert all(".lora_" in name for name in names)
    resumed = attempt(uri, tmp_path / "work", seed=99)
    undisturbed = attempt(str(tmp_path / "other"), tmp_path / "unused")
    assert resumed[0] == undisturbed[0]
    assert torch.equal(resumed[1], undisturbed[1])


def test_a_state_of_another_rank_or_of_all_weights_does_not_fit(tmp_path):
    uri = str(tmp_path / "store")
    with pytest.raises(StoppedError):
        attempt(uri, tmp_path / "work", stop=2)
    state = read_state(open_publication(join_uri(uri, "000012")).fetch(tmp_path / "state"))
    model = tiny("llama", UNEQUAL, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="is a state of another model"):
        check_fits(state, model)
    add_adapters(model, RANK + 1)
    with pytest.raises(CheckpointError, match="is a state of another model"):
        check_fits(state, model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_rank": -1}, "training.lora_rank=-1 must"),
        ({"lora_rank": 8, "optimizer_state": "carry"}, "training.lora_rank=8 begins each phase with new"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_one_line(changes, said):
    with pytest.raises(SettingsError, match=said) as caught:
        settings_from_dict(recipe_with({f"training.{name}": value for name, value in changes.items()}))
    assert len(caught.value.problems) == 1


def test_adapters_are_another_run():
    digests = {settings_from_dict(recipe_with({"training.lora_rank": rank})).digest() for rank in (0, 4, 8)}
    assert len(digests) == 3
    assert settings_from_dict(recipe_with({})).digest() in digests
