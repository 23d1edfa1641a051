"""Recovery training under a teacher: what is minimized, on which tokens, and what stays as it is."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from core.errors import SettingsError
from core.settings.recipe import settings_from_dict
from core.training.objective import Teacher
from core.training.recover import recover
from core.training.rows import Rows
from tests.support.models import CONFIGS, UNEQUAL, Float64Throughout, random_tokens, tiny
from tests.support.project import recipe_with
from tests.support.training import training_settings, weights
from tests.training.test_isolation import SIZES, rows_of

RATE = dict(learning_rate=1e-3, min_learning_rate=1e-4)


def teacher_of(name="llama", weight=1.0, temperature=1.0, **options):
    model = tiny(name, **{"seed": 1, **options}).requires_grad_(False)
    return Teacher(model=model, weight=weight, temperature=temperature)


def train(model, tokens, teacher, trained=None, starts=None, **changes):
    settings = training_settings(**RATE | {"sequence_length": tokens.shape[1]} | changes)
    trained = torch.ones_like(tokens) if trained is None else trained
    rows = Rows(tokens, trained, starts)
    return recover(model, rows, settings, teacher=teacher, first_step=0, total_steps=9)


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.25, 2.0)])
def test_a_step_minimizes_the_mean_over_the_trained_tokens(weight, temperature, micro_batch):
    tokens, trained = random_tokens(rows=4), torch.zeros(4, 12, dtype=torch.uint8)
    places = [(0, 3), (2, 7), (2, 8), (3, 11)]
    for row, at in places:
        trained[row, at] = 1
    model, expected, teacher = tiny("qwen2", UNEQUAL), tiny("qwen2", UNEQUAL), teacher_of("qwen2")
    teacher = Teacher(model=teacher.model, weight=weight, temperature=temperature)
    with Float64Throughout():
        report = train(model, tokens, teacher, trained, micro_batch=micro_batch, max_grad_norm=0)
        loss = 0.0
        for row, at in places:
            own, its = (
                of(tokens[row : row + 1]).logits[0, at - 1].double() for of in (expected, teacher.model)
            )
            p = (its.detach() / temperature).softmax(-1)
            q = (own / temperature).softmax(-1)
            divergence = temperature**2 * (p * (p / q).log()).sum()
            loss += ((1 - weight) * cross_entropy(own, tokens[row, at]) + weight * divergence) / len(places)
        loss.backward()
    assert report.losses[0][1] == pytest.approx(loss.item(), rel=1e-9)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=report.losses[0][2], weight_decay=0)
    optimizer.step()
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_teacher_reads_packed_rows_as_it_reads_their_documents(name):
    """The loss of packed rows is the mean of what each document gives alone; a leak would show."""
    (ids, trained, starts), documents = rows_of(SIZES)
    teacher = teacher_of(name)
    with Float64Throughout():
        packed = train(tiny(name, UNEQUAL), ids, teacher, trained, starts).losses[0][1]
        student, total, counted = tiny(name, UNEQUAL), 0.0, 0
        for document in (document for row in documents for document in row):
            tokens = torch.from_numpy(document.ids).long()[None]
            with torch.no_grad():
                p, q = (of(tokens).logits[0].softmax(-1) for of in (teacher.model, student))
            at = torch.from_numpy(document.trained[1:]).nonzero().flatten()
            total += (p * (p / q).log())[at].sum().item()
            counted += len(at)
    assert packed == pytest.approx(total / counted, rel=1e-9)


def test_the_teacher_stays_as_it_is_and_a_model_that_equals_it_learns_nothing():
    tokens, teacher = random_tokens(rows=8), teacher_of(seed=0)
    before, model = weights(teacher.model).clone(), tiny("llama")
    report = train(model, tokens, teacher)
    assert [loss for _, loss, _ in report.losses] == [0.0, 0.0]
    assert torch.equal(weights(model), before)
    train(tiny("llama", seed=5), tokens, teacher)
    assert torch.equal(weights(teacher.model), before)
    assert all(p.grad is None for p in teacher.model.parameters())


def test_a_student_comes_closer_to_its_teacher_than_by_the_next_token_alone():
    tokens = random_tokens(rows=32)
    teacher = teacher_of(dtype=torch.float32)

    def distance(model):
        with torch.no_grad():
            p, q = (
                torch.distributions.Categorical(logits=of(tokens).logits) for of in (teacher.model, model)
            )
        return torch.distributions.kl_divergence(p, q).mean().item()

    found = {}
    for name, taught in (("alone", None), ("taught", teacher)):
        model = tiny("llama", UNEQUAL, dtype=torch.float32)
        train(model, tokens, taught, learning_rate=1e-2)
        found[name] = distance(model)
    assert found["taught"] < 0.8 * found["alone"]


def test_a_bfloat16_teacher_under_autocast_comes_close():
    tokens = random_tokens(rows=4)
    exact = train(tiny("llama", UNEQUAL, dtype=torch.float32), tokens, teacher_of(dtype=torch.float32))
    model = tiny("llama", UNEQUAL, dtype=torch.float32)
    rough = train(model, tokens, teacher_of(dtype=torch.bfloat16), precision="bfloat16")
    assert rough.losses[0][1] == pytest.approx(exact.losses[0][1], rel=0.05)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distillation_weight": 0.9}, "distillation_weight=0.9 needs a teacher. Set teacher to base"),
        ({"temperature": 2.0}, r"temperature=2\.0 needs a teacher"),
        ({"teacher": "base", "distillation_weight": 0.0}, "distillation_weight=0 leaves a teacher nothing"),
        ({"teacher": "base", "distillation_weight": 1.5}, r"distillation_weight=1.5 must"),
        ({"teacher": "base", "temperature": 0.0}, r"temperature=0.0 must"),
        ({"teacher_logits": "stored"}, "teacher_logits=stored needs a teacher. Set teacher to base"),
        ({"teacher": "base", "teacher_top_k": 9}, "teacher_top_k=9 is of what is stored. Set teacher_logits"),
        ({"teacher": "base", "teacher_logits": "stored", "teacher_top_k": 0}, "teacher_top_k=0 must"),
        (
            {"teacher": "base", "teacher_logits": "stored", "nodes": 2},
            "teacher_logits=stored is of one node. Set nodes to 1",
        ),
        ({"hidden_weight": 1.0}, r"hidden_weight=1\.0 needs a teacher"),
        (
            {"teacher": "base", "teacher_logits": "stored", "hidden_weight": 1.0},
            "hidden_weight=1 compares hidden states, of which none are stored. Set teacher_logits to live",
        ),
        ({"teacher": "base", "hidden_layers": [0]}, "hidden_layers has no effect without hidden_weight"),
        (
            {"teacher": "base", "hidden_weight": 1.0, "hidden_layers": [2, 2]},
            "hidden_layers=2, 2 must be different numbers",
        ),
        ({"teacher": "larger"}, "teacher=larger must be one of none, base"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_one_line(changes, said):
    with pytest.raises(SettingsError, match=said) as caught:
        settings_from_dict(recipe_with({f"training.{name}": value for name, value in changes.items()}))
    assert all(problem.startswith("training.") for problem in caught.value.problems)
    assert len(caught.value.problems) == 1


def test_a_teacher_is_another_run_and_no_teacher_the_run_that_it_was():
    def digest(**changes):
        return settings_from_dict(
            recipe_with({f"training.{name}": v for name, v in changes.items()})
        ).digest()

    assert digest() == digest(teacher="none", distillation_weight=0.5, temperature=1.0)
    taught = [digest(teacher="base"), digest(teacher="base", distillation_weight=1.0)]
    taught.append(digest(teacher="base", temperature=2.0))
    taught += [digest(teacher="base", hidden_weight=1.0, hidden_layers=layers) for layers in ([], [1])]
    assert taught[0] == digest(teacher="base", hidden_weight=0.0, hidden_layers=[])
    assert len({digest(), *taught}) == 6
