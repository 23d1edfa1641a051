"""Results are kept under all that they follow from: a repeat is free, and nothing else is a repeat."""

import dataclasses
import json
import logging
import signal
import subprocess
import time

import pytest

from core.errors import StorageError
from core.evaluation.benchmarks import measure_tasks
from core.evaluation.cache import AnswerCache
from core.settings.evaluation import EvaluationSettings
from tests.support.project import command_line

ROWS = [
    {"question": f"What is {thing}?", "choices": {"text": ["a metal", "a bird", "tea"], "label": list("ABC")}}
    for thing in ("iron", "a hen", "gold", "a duck", "tin")
]


def write(folder, rows, split="test"):
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": str(n), **row, "answerKey": "ABCAB"[n]}) for n, row in enumerate(rows)]
    (folder / split / "data.jsonl").write_text("\n".join(lines))


class Asked:
    """Measures with a cache, and tells whether the model was asked."""

    def __init__(self, model, tokenizer, folder):
        self.model, self.tokenizer = model, tokenizer
        self.cache = AnswerCache(store=str(folder / "store"), checkpoint="c0", precision="float32")
        self.settings = EvaluationSettings(
            tasks=("arc_easy",), task_data={"arc_easy": str(folder / "arc")}, limit=3
        )

    def __call__(self, *, seed=0, cache=None, **settings):
        asked = []

        def load():
            asked.append(True)
            return self.model, self.tokenizer

        settings = dataclasses.replace(self.settings, **settings)
        found = measure_tasks(load, settings, seed=seed, cache=cache or self.cache)
        return found, bool(asked)


@pytest.fixture
def asked(llama, tokenizer, tmp_path):
    llama.config.max_position_embeddings = 512
    write(tmp_path / "arc", ROWS)
    write(tmp_path / "arc", ROWS[:3], "train")
    return Asked(llama, tokenizer, tmp_path)


def test_a_repeat_asks_nothing_and_the_log_says_so(asked, caplog):
    first, computed = asked()
    assert computed
    with caplog.at_level(logging.INFO, "core.evaluation.benchmarks"):
        again, computed = asked()
    assert not computed
    assert again == first
    assert caplog.messages == ["benchmarks: 1 of 1 tasks are known from before"]


def test_what_does_not_change_the_answers_is_no_part_of_the_key(asked, tmp_path):
    first, _ = asked(limit=0)
    write(tmp_path / "moved", ROWS)
    for changed in (
        {"batch_size": 2},
        {"ranks": 1},
        {"limit": 100},
        {"task_data": {"arc_easy": str(tmp_path / "moved")}},
        {"stride": 5},  # of whole documents alone
    ):
        found, computed = asked(**{"limit": 0, **changed})
        assert (found, computed) == (first, False), changed


def test_whatever_changes_the_answers_is_part_of_the_key(asked, tmp_path, monkeypatch):
    import lm_eval.tasks

    def changed(value, **parts):
        asked()
        assert not asked()[1]
        found, computed = asked(**parts)
        assert computed, value
        assert not asked(**parts)[1], value
        return found

    changed("checkpoint", cache=dataclasses.replace(asked.cache, checkpoint="c1"))
    changed("precision", cache=dataclasses.replace(asked.cache, precision="bfloat16"))
    changed("limit", limit=2)
    changed("seed", seed=1)
    changed("shots", shots={"arc_easy": 2})
    monkeypatch.setattr("core.evaluation.cache.importlib.metadata.version", lambda name: "0.0")
    assert asked()[1], "version of lm-eval"
    for key, value in (("VERSION", "99"), ("doc_to_text", "Q: {{question}}")):
        original = lm_eval.tasks.TaskManager.load

        def load(self, names, original=original, key=key, value=value):
            loaded = original(self, names)
            for task in loaded["tasks"].values():
                if key == "VERSION":
                    task.VERSION = value
                else:
                    task.set_config(key, value)
            return loaded

        monkeypatch.setattr(lm_eval.tasks.TaskManager, "load", load)
        assert asked()[1], key
        assert not asked()[1], key
        monkeypatch.setattr(lm_eval.tasks.TaskManager, "load", original)


def test_changed_data_are_another_question(asked, tmp_path):
    asked(limit=0)
    asked(limit=0, shots={"arc_easy": 2})
    write(tmp_path / "arc", [{**ROWS[0], "question": "What is lead?"}, *ROWS[1:3]], "train")
    assert not asked(limit=0)[1]  # without examples, those that it could have do not count
    assert asked(limit=0, shots={"arc_easy": 2})[1]
    write(tmp_path / "arc", [*ROWS[:4], {**ROWS[4], "question": "What is zinc?"}])
    found, computed = asked(limit=0)
    assert computed
    assert found.figures["arc_easy"]["acc_stderr"] >= 0


@pytest.fixture
def both(tmp_path):
    """Settings with two tasks."""
    tasks = ("arc_easy", "arc_challenge")
    return {"tasks": tasks, "task_data": {name: str(tmp_path / "arc") for name in tasks}}


def test_only_the_tasks_that_are_not_known_are_asked(asked, both, tmp_path):
    first, _ = asked()
    answered = []
    asked.model.register_forward_pre_hook(lambda *_: answered.append(1))
    found, _ = asked(**both)
    passes = len(answered)
    alone, _ = asked(cache=AnswerCache(store=str(tmp_path / "other"), checkpoint="c0", precision="float32"))
    assert alone == first
    assert passes == len(answered) - passes  # one task's each time
    assert found.figures["arc_easy"] == first.figures["arc_easy"]
    assert list(found.figures) == ["arc_easy", "arc_challenge"]


def test_tasks_that_were_answered_before_an_interruption_are_not_asked_again(asked, both, tmp_path):
    other = AnswerCache(store=str(tmp_path / "other"), checkpoint="c0", precision="float32")
    passes = []
    counter = asked.model.register_forward_pre_hook(lambda *_: passes.append(1))
    whole, _ = asked(cache=other, **both)
    counter.remove()
    done = []

    def interrupt(*_):
        done.append(1)
        if len(done) == len(passes):  # the last one of the second task
            raise KeyboardInterrupt

    interruption = asked.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        asked(**both)
    interruption.remove()
    asked.model.register_forward_pre_hook(lambda *_: done.append(1))
    found, _ = asked(**both)
    assert found == whole
    assert len(done) == len(passes) * 3 // 2  # once both, and the second one again


def test_a_damaged_result_is_one_line_that_says_what_to_do(asked, tmp_path):
    asked()
    (kept,) = (tmp_path / "store/answers").iterdir()
    kept.write_text("{")
    with pytest.raises(StorageError, match=r"answers/\w+\.json is damaged.*Remove it"):
        asked()


@pytest.mark.slow  # three processes that import torch
def test_a_command_that_is_killed_goes_on_after_the_tasks_that_it_has_answered(project, tmp_path):
    def started(*more):
        options = ("--task", "mini", "--batch-size", "1", *more)
        command, environment = command_line("evaluate", project / "base", *options)
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    expected, _ = started().communicate()
    store = tmp_path / "store"
    killed = started("--cache", store)
    while not list(store.glob("answers/*.json")) and killed.poll() is None:
        time.sleep(0.001)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    kept = len(list(store.glob("answers/*.json")))
    assert kept in (1, 2)
    again = started("--cache", store)
    shown, said = again.communicate()
    assert f"benchmarks: {kept} of 3 tasks are known from before" in said
    assert "mini_facts" in expected
    assert shown == expected
