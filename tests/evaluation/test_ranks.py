"""Several processes give each answer that one gives."""

import json
import weakref

import pytest

from core.evaluation import checkpoint
from core.evaluation.checkpoint import LoadedOnce, measure_checkpoint
from core.settings.evaluation import EvaluationSettings


@pytest.fixture
def measured(llama, tokenizer, tmp_path):
    """A checkpoint, and settings with a task of each kind."""
    llama.config.max_position_embeddings = 512
    llama.generation_config.eos_token_id = None
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ("iron", "a hen", "gold", "a duck", "tin", "tea", "wool")
    rows = {
        "openbookqa": [
            {
                "question_stem": f"One can see {word} in",
                "choices": {"text": ["the sea", "a tree", word, "Rome"], "label": list("ABCD")},
                "answerKey": "ABCD"[n % 4],
            }
            for n, word in enumerate(words)
        ],
        "wikitext": [{"page": f"One sees {word} in the sea . " * n} for n, word in enumerate(words, start=3)],
        "triviaqa": [
            {"question": f"What is {word}?", "answer": {"value": word, "aliases": [word]}} for word in words
        ],
    }
    for name, data in rows.items():
        (tmp_path / name / "validation").mkdir(parents=True)
        text = "\n".join(json.dumps(row) for row in data)
        (tmp_path / name / "validation/data.jsonl").write_text(text)
    settings = EvaluationSettings(
        tasks=tuple(rows),
        task_data={name: str(tmp_path / name) for name in rows},
        precision="float32",
        batch_size=3,
        stride=40,
    )
    return tmp_path / "model", settings


@pytest.mark.slow  # two processes that import torch
def test_two_processes_give_the_numbers_of_one(measured, monkeypatch):
    directory, settings = measured
    alone = measure_checkpoint(directory, settings, seed=0)
    sizes, run_ranks = [], checkpoint.run_ranks

    def counting(work, size, device):
        sizes.append(size)
        return run_ranks(work, size, device)

    monkeypatch.setattr(checkpoint, "run_ranks", counting)
    together = measure_checkpoint(directory, EvaluationSettings(**{**vars(settings), "ranks": 2}), seed=0)
    assert sizes == [2]
    assert together == alone
    assert set(alone.figures) == {"openbookqa", "wikitext", "triviaqa"}


def test_the_model_that_measured_the_perplexity_makes_room_for_those_of_the_ranks(measured, monkeypatch):
    directory, settings = measured
    load = LoadedOnce(directory, settings.precision)
    first = weakref.ref(load()[0])
    alive = []

    def no_ranks(*_):
        alive.append(first())
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "run_ranks", no_ranks)
    several = EvaluationSettings(**{**vars(settings), "ranks": 2})
    with pytest.raises(KeyboardInterrupt):
        measure_checkpoint(directory, several, seed=0, model=load)
    assert alive == [None]
