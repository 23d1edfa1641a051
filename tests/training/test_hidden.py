"""Hidden states as a lesson: what is minimized, against autograd on a loss written out."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import cross_entropy

from core.errors import SettingsError
from core.model.simulation import simulate_training
from core.settings.methods import FIXED
from core.settings.recipe import settings_from_dict
from core.training.objective import Teacher
from tests.support.models import CONFIGS, UNEQUAL, Float64Throughout, random_tokens, tiny
from tests.support.project import recipe_with, resolve
from tests.support.training import HostCopies, weights
from tests.training.test_objective import teacher_of, train

TOKENS = random_tokens(rows=4)
PLACES = [(0, 3), (2, 7), (2, 8), (3, 11)]


def outputs(model, tokens):
    """What each layer returns, with its graph."""
    found = []
    hooks = [layer.register_forward_hook(lambda *a: found.append(a[2])) for layer in model.model.layers]
    logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, found


@pytest.mark.parametrize(
    ("name", "layers", "changes"),
    [
        ("qwen2", (), {"micro_batch": 4}),
        ("qwen2", (1,), {"micro_batch": 1, "gradient_checkpointing": True}),
        ("gemma2", (0, 1), {"micro_batch": 2, "gradient_checkpointing": True, "layer_inputs": "host"}),
    ],
)
def test_a_step_minimizes_the_distance_of_chosen_layers_too(name, layers, changes, monkeypatch):
    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", HostCopies)
    trained = torch.zeros(4, 12, dtype=torch.uint8)
    for row, at in PLACES:
        trained[row, at] = 1
    model, expected, dense = tiny(name, UNEQUAL), tiny(name, UNEQUAL), teacher_of(name).model
    teacher = Teacher(model=dense, weight=0.25, temperature=1.0, hidden_weight=0.7, hidden_layers=layers)
    # What checkpointing computes again, autograd does outside of such a mode.
    exact = "gradient_checkpointing" not in changes
    with Float64Throughout() if exact else nullcontext():
        report = train(model, TOKENS, teacher, trained, max_grad_norm=0, **changes)
        (logits, states), (wanted, aims) = outputs(expected, TOKENS), outputs(dense, TOKENS)
        loss = distance = 0.0
        chosen = layers or range(len(states))
        for row, at in PLACES:
            own, its = logits[row, at - 1], wanted[row, at - 1].detach()
            divergence = (its.softmax(-1) * (its.log_softmax(-1) - own.log_softmax(-1))).sum()
            loss = loss + 0.75 * cross_entropy(own, TOKENS[row, at]) + 0.25 * divergence
            for layer in chosen:
                s, t = states[layer][row, at - 1], aims[layer][row, at - 1].detach()
                distance = distance + (s - t).square().mean() / t.square().mean() / len(chosen)
        loss = (loss + 0.7 * distance) / len(PLACES)
        loss.backward()
    assert report.losses[0][1] == pytest.approx(loss.item(), rel=1e-9 if exact else 1e-6)
    assert report.series["hidden_distance"][0][1] == pytest.approx(distance.item() / len(PLACES), rel=1e-6)
    norm = torch.nn.utils.get_total_norm([p.grad for p in expected.parameters()]).item()
    assert report.series["gradient_norm"][0][1] == pytest.approx(norm, rel=1e-9 if exact else 1e-5)
    torch.optim.AdamW(expected.parameters(), lr=report.losses[0][2], weight_decay=0).step()
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if exact else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(weights(model), weights(expected), **tolerance)
    assert not any(layer._forward_hooks for layer in [*model.model.layers, *dense.model.layers])


def test_memory_of_what_layers_learn_is_counted():
    def kept(layers, autocast=False):
        found = simulate_training(
            CONFIGS["llama"](),
            2,
            12,
            autocast=autocast,
            checkpointing=True,
            device="cpu",
            taught=(0.5, 1.0),
            hidden_layers=layers,
        )
        return found.kept

    a_layer = 4 * 2 * 12 * CONFIGS["llama"]().hidden_size
    assert kept((0, 1)) - kept(()) == pytest.approx(2 * a_layer, rel=0.1)
    assert kept((1,), autocast=True) - kept((), autocast=True) == pytest.approx(a_layer, rel=0.1)


@pytest.mark.parametrize(
    ("method", "also"),
    [
        ("shortgpt", {}),
        ("slicegpt", {}),
        ("sheared-llama", {"prune.layers": "2"}),
        ("sheared-llama", {"prune.hidden_size": "50%"}),
        ("minitron", {"prune.hidden_size": "50%"}),
    ],
)
def test_a_method_whose_layers_do_not_stand_for_the_base_models_is_refused(method, also):
    changes = {f"prune.{name}": value for name, value in FIXED[method].items()} | also
    changes |= {"training.teacher": "base", "training.hidden_weight": 1.0, "prune.method": method}
    with pytest.raises(SettingsError, match=f"hidden_weight does not go with prune.method={method}"):
        settings_from_dict(recipe_with(changes | {"prune.phases": 1}))


def test_a_layer_that_the_base_model_does_not_have_is_refused(project, monkeypatch):
    monkeypatch.chdir(project)
    changes = {"teacher": "base", "hidden_weight": 1.0, "hidden_layers": [1, 99]}
    with pytest.raises(SettingsError, match="hidden_layers=99: the base model has 3 layers"):
        resolve(recipe_with({f"training.{name}": value for name, value in changes.items()}))
