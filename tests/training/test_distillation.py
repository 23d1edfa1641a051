import pytest
import torch

from core.errors import TrainingError
from core.model.decoder import final_states
from core.pruning.plan import LayerPlan
from core.pruning.surgery import prune_model
from core.training import distillation as module
from core.training.distillation import distill, mean_divergence
from core.training.state import read_state, state_tensors, write_state
from tests.support.models import CONFIGS, Float64Throughout, random_tokens, tiny
from tests.support.training import weights

TOKENS = random_tokens(rows=16)
CUT = tuple(LayerPlan(query_heads=range(6), kv_heads=range(3), mlp_channels=range(25)) for _ in range(3))


def pair(name="llama", dtype=torch.float64):
    teacher = tiny(name, dtype=dtype)
    student = prune_model(teacher, CUT)
    student.load_state_dict(
        {key: tensor.clone() for key, tensor in student.state_dict().items()}, assign=True
    )
    student.tie_weights()
    return student.requires_grad_(True), teacher


def distilled(student, teacher, tokens=TOKENS, **changes):
    given = dict(steps=12, rate=3e-3, batch=4, micro_batch=4, autocast=False, seed=0)
    return distill(student, teacher, tokens, **given | changes)


def divergence(student, teacher, tokens=TOKENS):
    with torch.no_grad():
        logits, wanted = student(tokens).logits.double(), teacher(tokens).logits.double()
    p, q = (torch.distributions.Categorical(logits=of) for of in (wanted, logits))
    return torch.distributions.kl_divergence(p, q).mean().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cut_model_comes_closer_to_its_teacher_which_stays_as_it_is(name):
    student, teacher = pair(name)
    before, dense = divergence(student, teacher), weights(teacher)
    report = distilled(student, teacher, steps=24)
    after = divergence(student, teacher)
    assert after < 0.6 * before
    assert report.divergences[0] > report.divergences[-1]
    assert report.tokens == 24 * 4 * 12
    assert torch.equal(weights(teacher), dense)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_mean_divergence_is_that_of_all_tokens():
    student, teacher = pair()
    expected = pytest.approx(divergence(student, teacher), rel=1e-6)
    for micro_batch in (1, 5, 100):
        assert mean_divergence(student, teacher, TOKENS, micro_batch=micro_batch, autocast=False) == expected


def test_steps_are_those_of_a_plain_loop():
    """AdamW, the gradient's norm cut to 1, warm-up and a straight fall: by torch's own parts."""
    steps, rate, batch = 20, 3e-3, 5
    student, teacher = pair()
    plain, _ = pair()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(3)
    order = torch.cat([torch.randperm(16, generator=generator) for _ in range(7)])
    found, norms = [], []
    with Float64Throughout():
        for step in range(steps):
            ids = TOKENS[order[step * batch : (step + 1) * batch]]
            with torch.no_grad():
                p = teacher(ids).logits.softmax(-1)
            loss = (p * (p.log() - plain(ids).logits.log_softmax(-1))).sum() / ids.numel()
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item())
            optimizer.param_groups[0]["lr"] = rate * (1 if step == 0 else (20 - step) / 20)
            optimizer.step()
            found.append(loss.item())
        report = distilled(student, teacher, steps=steps, rate=rate, batch=batch, micro_batch=2, seed=3)
    assert min(norms) < 1 < max(norms), "both sides of the clipping are seen"
    torch.testing.assert_close(weights(student), weights(plain), rtol=1e-8, atol=1e-10)
    assert report.divergences == pytest.approx(found, rel=1e-9)


def test_a_seed_gives_the_same_weights_bit_for_bit_and_another_gives_others():
    students = [pair()[0] for _ in range(3)]
    teacher = pair()[1]
    for student, seed in zip(students, (1, 1, 2), strict=True):
        distilled(student, teacher, seed=seed)
    assert torch.equal(weights(students[0]), weights(students[1]))
    assert not torch.equal(weights(students[0]), weights(students[2]))


def test_the_micro_batch_changes_nothing_but_the_order_of_additions():
    students = [pair()[0] for _ in range(3)]
    teacher = pair()[1]
    with Float64Throughout():
        for student, size in zip(students, (1, 3, 4), strict=True):
            distilled(student, teacher, micro_batch=size)
    for student in students[1:]:
        torch.testing.assert_close(weights(student), weights(students[0]), rtol=1e-9, atol=1e-10)


def test_every_sequence_comes_once_before_any_comes_again():
    seen = torch.cat(list(module._batches(7, steps=5, batch=4, seed=0)))
    assert len(seen) == 20
    for start in (0, 7):
        assert sorted(seen[start : start + 7].tolist()) == list(range(7))
    assert len(set(seen[14:].tolist())) == 6
    assert seen[:7].tolist() != seen[7:14].tolist()


def test_a_model_that_equals_its_teacher_stays_as_it_is():
    student, teacher = tiny("llama"), tiny("llama")
    assert distilled(student, teacher).divergences == (0.0,) * 12
    assert torch.equal(weights(student), weights(teacher))


def test_weights_that_require_no_gradient_stay():
    student, teacher = pair("llama-tied")
    embeddings = student.get_input_embeddings().weight.requires_grad_(False)
    before, layers = embeddings.clone(), student.model.layers[0].mlp.up_proj.weight.detach().clone()
    distilled(student, teacher)
    assert torch.equal(embeddings, before)
    assert not torch.equal(student.model.layers[0].mlp.up_proj.weight, layers)


def test_under_autocast_weights_stay_float32_and_the_model_still_comes_closer():
    student, teacher = pair(dtype=torch.float32)
    before = divergence(student, teacher)
    seen = []
    student.model.layers[0].mlp.up_proj.register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    distilled(student, teacher.to(torch.bfloat16), autocast=True, steps=24)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert divergence(student, pair(dtype=torch.float32)[1]) < 0.7 * before


def test_a_rate_that_is_too_high_ends_in_one_line(monkeypatch):
    student, teacher = pair()
    with pytest.raises(TrainingError, match=r"step \d+ of 12: .*Lower prune.distill_rate \(it is 1e\+30\)"):
        distilled(student, teacher, rate=1e30)
    assert final_states(teacher, TOKENS).isfinite().all()


def test_a_killed_distillation_goes_on_bit_for_bit(tmp_path):
    class KilledError(Exception):
        pass

    def save(optimizer, progress):
        if len(progress.losses) == 5:
            write_state(tmp_path / "state", state_tensors(student, optimizer), progress, belongs_to={})
            raise KilledError

    undisturbed, teacher = pair()
    expected = distilled(undisturbed, teacher)
    student = pair()[0]
    with pytest.raises(KilledError):
        distilled(student, teacher, save=save)
    student = pair()[0]
    report = distilled(student, teacher, resume_from=read_state(tmp_path / "state"))
    assert report.divergences == expected.divergences
    assert len(report.divergences) == 12
    assert torch.equal(weights(student), weights(undisturbed))
