"""What a teacher expects of rows, stored in files: read as it was found, it trains as a teacher does."""

import pytest
import torch

from core.model.loss import likeliest
from core.training.lessons import bytes_a_position, open_lessons
from core.training.objective import Teacher, write_lessons
from core.training.recover import recover
from core.training.rows import Rows
from tests.support.models import UNEQUAL, random_tokens, tiny
from tests.support.training import training_settings, weights

K = 7
CPU = torch.device("cpu")


@pytest.fixture
def teacher():
    return tiny("llama", seed=1, dtype=torch.float32).requires_grad_(False)


@pytest.fixture
def rows():
    """Two of them have nothing to train, one of these is the last."""
    trained = (torch.rand(8, 12, generator=torch.Generator().manual_seed(3)) > 0.6).to(torch.uint8)
    trained[2] = trained[7] = 0
    starts = torch.zeros_like(trained)
    starts[1, 5] = starts[4, 9] = 1
    return Rows(random_tokens(rows=8), trained, starts)


def written(teacher, rows, folder, sizes, top_k=K, temperature=1.0, micro_batch=3):
    files, covered, first = [], [], 0
    for number, size in enumerate(sizes):
        files.append(folder / f"{number}.safetensors")
        part = rows.part(first, size)
        covered.append(
            write_lessons(
                teacher, part, files[-1], top_k=top_k, temperature=temperature, micro_batch=micro_batch
            )
        )
        first += size
    return files, covered


def alone(teacher, rows, row, at):
    """What the teacher expects at a place, from its document alone."""
    begins = max([0, *rows.starts[row, : at + 1].nonzero().flatten().tolist()])
    with torch.no_grad():
        return teacher(rows.input_ids[row, begins : at + 1][None]).logits[0, -1]


@pytest.mark.parametrize("sizes", [[8], [3, 3, 2], [1] * 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_what_is_read_is_what_the_teacher_expects_of_each_trained_token(
    teacher, rows, tmp_path, sizes, micro_batch
):
    files, covered = written(teacher, rows, tmp_path, sizes)
    taught = rows._replace(lessons=open_lessons(files, rows.trained_by_row))
    seen = 0
    for first in (0, 4):  # a global batch of four rows, as a rank takes them
        for number, part in enumerate(taught.part(first, 4).micro_batches(micro_batch, CPU)):
            ids, logs = part.expected
            places = [
                (first + number * micro_batch + row, at)
                for row, at in (part.trained[:, 1:] != 0).nonzero().tolist()
            ]
            assert len(ids) == len(logs) == len(places)
            for place, tokens, found in zip(places, ids, logs, strict=True):
                wanted_ids, wanted, _ = likeliest(alone(teacher, rows, *place)[None], K, 1.0)
                assert tokens.tolist() == wanted_ids[0].tolist()
                torch.testing.assert_close(found.float(), wanted[0], rtol=1e-3, atol=1e-3)
            seen += len(places)
    assert seen == rows.trained_tokens == sum(each.positions for each in covered)
    size = sum(file.stat().st_size for file in files)
    assert size - seen * bytes_a_position(101, K) == pytest.approx(0, abs=250 * len(files)), "but headers"
    assert bytes_a_position(101, 500) == 101 * 2 + 102 * 2
    assert bytes_a_position(70_000, 64) == 64 * 4 + 65 * 2


def test_how_much_is_kept_is_summed_over_the_trained_tokens(teacher, rows, tmp_path):
    _, (covered,) = written(teacher, rows, tmp_path, [8], temperature=2.0)
    kept = left_out = 0.0
    for row, at in (rows.trained[:, 1:] != 0).nonzero().tolist():
        p = (alone(teacher, rows, row, at).double() / 2).softmax(-1).sort(descending=True).values
        kept += p[:K].sum().item()
        left_out += (p[K:] * (p[K:] / p[K:].mean()).log()).sum().item()
    assert covered.kept == pytest.approx(kept, rel=1e-5)
    assert covered.left_out == pytest.approx(left_out, rel=1e-4)


@pytest.mark.parametrize(("top_k", "close"), [(101, 2e-3), (30, 0.3)])
def test_training_on_what_is_stored_is_training_with_the_teacher(teacher, rows, tmp_path, top_k, close):
    """All tokens: but for float16. Some of them: less is taught."""
    settings = training_settings(micro_batch=2, max_grad_norm=0)
    files, _ = written(teacher, rows, tmp_path, [3, 5], top_k=top_k, temperature=1.5)
    found = {}
    for name, model, data in (
        ("live", teacher, rows),
        ("stored", None, rows._replace(lessons=open_lessons(files, rows.trained_by_row))),
    ):
        student = tiny("llama", UNEQUAL, dtype=torch.float32)
        before = weights(student).clone()
        taught_by = Teacher(model=model, weight=0.75, temperature=1.5)
        report = recover(student, data, settings, teacher=taught_by, first_step=0, total_steps=2)
        found[name] = [loss for _, loss, _ in report.losses], weights(student) - before
    (live, moved), (stored, moved_too) = found["live"], found["stored"]
    assert stored == pytest.approx(live, rel=close)
    assert (stored == pytest.approx(live, rel=2e-3)) == (top_k == 101)
    direction = torch.nn.functional.cosine_similarity(moved, moved_too, dim=0)
    assert direction > (0.99 if top_k == 101 else 0.5)
