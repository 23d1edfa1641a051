"""The data of benchmarks: columns, splits and folders, and what is wrong with them or with their names."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import DataError, SettingsError
from core.evaluation import task_data
from core.evaluation.benchmarks import evaluate_tasks
from core.evaluation.task_data import task_problems, unknown_tasks
from core.settings.evaluation import EvaluationSettings
from core.settings.recipe import settings_from_dict
from pipelines.local.run import run_local
from pipelines.remote.submission import prepare
from tests.support.benchmarks import QUESTIONS, arc_item, preferences, settings_for, write
from tests.support.project import recipe_with, resolve

ITEMS = {
    "arc_challenge": [arc_item(0, answer) for answer in range(4)],
    "piqa": [{"goal": "open a jar", "sol1": "turn the lid", "sol2": "sing", "label": n} for n in range(2)],
    "hellaswag": [
        {
            "ind": 1,
            "activity_label": "Cooking",
            "ctx_a": "A man cuts [substeps] bread.",
            "ctx_b": "he",
            "endings": ["eats it.", "sleeps on a chair.", "flies to the moon.", "runs."],
            "label": str(n),
        }
        for n in range(4)
    ],
    "openbookqa": [
        {
            "question_stem": "The sun is",
            "choices": {"text": ["a star", "a tree", "cold", "small"], "label": list("ABCD")},
            "answerKey": label,
        }
        for label in "ABCD"
    ],
    "boolq": [
        {"question": "is iron a metal", "passage": "Iron is a metal.", "answer": answer}
        for answer in (False, True)
    ],
    "winogrande": [
        {
            "sentence": "Ann thanked Eve because _ had helped her.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": n,
        }
        for n in "12"
    ],
    "social_iqa": [
        {
            "context": "Kim went home.",
            "question": "Why?",
            "answerA": "to sleep",
            "answerB": "to fly",
            "answerC": "because of a bear",
            "label": n,
        }
        for n in "123"
    ],
}


@pytest.mark.parametrize("task", ITEMS)
def test_the_papers_tasks_read_answers_in_their_published_columns(llama, tokenizer, tmp_path, task):
    # One question repeated for each of its choices as the answer: the model is right exactly once.
    write(tmp_path / "validation", ITEMS[task])
    result = evaluate_tasks(llama, tokenizer, settings_for(tmp_path, task))
    assert result[task]["acc"] == pytest.approx(1 / len(ITEMS[task]))


def test_boolq_reads_both_of_its_published_forms(llama, tokenizer, tmp_path):
    for answers in ([True, True, False], [False, False, True]):
        rows = [{**ITEMS["boolq"][0], "answer": answer} for answer in answers]
        labelled = [
            {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])}
            for row in rows
        ]
        write(tmp_path / f"{answers}/answer/validation", rows)
        write(tmp_path / f"{answers}/label/validation", labelled)
    results = [
        evaluate_tasks(llama, tokenizer, settings_for(tmp_path / f"{answers}/{form}", "boolq"))["boolq"][
            "acc"
        ]
        for answers in ([True, True, False], [False, False, True])
        for form in ("answer", "label")
    ]
    assert results[0] == results[1]
    assert results[2] == results[3]
    assert sorted(results[::2]) == [pytest.approx(1 / 3), pytest.approx(2 / 3)]


def test_sciq_finds_the_right_answer_in_its_own_column(llama, tokenizer, tmp_path):
    choices = ["iron", "water from a well", "wood", "air"]
    rows = [
        {
            "support": "",
            "question": "Which is a metal?",
            "correct_answer": choice,
            **{f"distractor{i}": other for i, other in enumerate((c for c in choices if c != choice), 1)},
        }
        for choice in choices
    ]
    write(tmp_path / "validation", rows)
    result = evaluate_tasks(llama, tokenizer, settings_for(tmp_path, "sciq"))
    assert result["sciq"]["acc"] == pytest.approx(1 / 4)


def test_two_tasks_share_a_folder_with_a_subset_each(llama, tokenizer, tmp_path):
    plain, _ = preferences(llama, tokenizer)
    write(tmp_path / "ARC-Easy/validation", [arc_item(n, answer) for n, answer in enumerate(plain)])
    wrong = [arc_item(n, (answer + 1) % len(QUESTIONS[n][1])) for n, answer in enumerate(plain)]
    write(tmp_path / "ARC-Challenge/validation", wrong)
    result = evaluate_tasks(llama, tokenizer, settings_for(tmp_path, "arc_easy", "arc_challenge"))
    assert [result[task]["acc"] for task in ("arc_easy", "arc_challenge")] == [1, 0]


def split_evaluated(llama, tokenizer, folder, caplog):
    """Which split was taken: only its answers are right; and what the log said."""
    with caplog.at_level(logging.INFO, "core.evaluation.task_data"):
        acc = evaluate_tasks(llama, tokenizer, settings_for(folder))["arc_easy"]["acc"]
    return acc, [r.message for r in caplog.records if r.name == "core.evaluation.task_data"]


@pytest.mark.parametrize(
    ("splits", "evaluated", "said"),
    [
        (("train", "validation", "test"), "test", False),
        (("train", "validation"), "validation", True),
        (("dev", "train"), "dev", True),
        (("everything",), "everything", True),
    ],
)
def test_the_split_that_is_evaluated(llama, tokenizer, tmp_path, caplog, splits, evaluated, said):
    plain, _ = preferences(llama, tokenizer)
    right = [arc_item(n, answer) for n, answer in enumerate(plain)]
    wrong = [arc_item(n, (answer + 1) % len(QUESTIONS[n][1])) for n, answer in enumerate(plain)]
    for split in splits:
        write(tmp_path / split, right if split == evaluated else wrong)
    acc, messages = split_evaluated(llama, tokenizer, tmp_path, caplog)
    assert acc == 1
    expected = f"arc_easy: split {evaluated} is evaluated, because {tmp_path} has no test"
    assert messages == ([expected] if said else [])


def test_nothing_is_left_beside_the_data_and_the_model_is_as_before(llama, tokenizer, tmp_path):
    write(tmp_path / "validation", ITEMS["hellaswag"], "arrow")
    before = sorted(os.walk(tmp_path))
    llama.train()
    tokenizer.pad_token = None
    evaluate_tasks(llama, tokenizer, settings_for(tmp_path, "hellaswag"))
    assert llama.training
    assert tokenizer.pad_token is None
    assert sorted(os.walk(tmp_path)) == before


def test_all_wrong_names_and_folders_are_reported_at_once(llama, tokenizer, tmp_path):
    write(tmp_path / "file/test", [arc_item(0, 0)])
    settings = EvaluationSettings(
        tasks=("arc_eazy", "piqa", "boolq", "mmlu", "ai2_arc"),
        task_data={"piqa": str(tmp_path / "missing"), "boolq": "package:no_such_package/boolq"},
    )
    problems = task_problems(settings)
    assert len(problems) == 3
    assert problems[0].startswith(
        "evaluation.tasks: arc_eazy is not one of lm-eval's tasks. Did you mean arc_easy"
    )
    assert "evaluation.task_data.piqa" in problems[1]
    assert "is not a folder" in problems[1]
    assert "evaluation.task_data.boolq" in problems[2]
    with pytest.raises(DataError) as error:
        evaluate_tasks(llama, tokenizer, settings)
    assert str(error.value).splitlines() == problems


@pytest.mark.parametrize("place", ["run", "submit", "resolve-base"])
def test_a_run_with_an_unknown_task_does_not_start(tmp_path, place):
    changes = {"evaluation.tasks": ["mini", "arc_eazy"], "evaluation.task_data": {}}
    settings = recipe_with({**changes, "storage.store": "s3://models/store"})
    starting = {
        "run": lambda: run_local(settings_from_dict(settings), tmp_path / "output", None),
        "submit": lambda: prepare(settings_from_dict(settings)),
        "resolve-base": lambda: resolve(settings),
    }
    with pytest.raises(
        SettingsError, match=r"arc_eazy is not one of lm-eval's tasks\. Did you mean .*arc_easy"
    ):
        starting[place]()
    assert not (tmp_path / "output").exists()


def test_names_of_presets_are_known_and_others_are_left_to_the_evaluation_where_lm_eval_is_not(monkeypatch):
    monkeypatch.setattr(task_data.importlib.util, "find_spec", lambda name: None)
    presets = EvaluationSettings(tasks=("mini", "llm", "commonsense", "mini_facts", "mmlu"))
    assert unknown_tasks(presets) == unknown_tasks(EvaluationSettings(tasks=("arc_eazy",))) == []


def test_checking_names_imports_neither_torch_nor_lm_eval():
    script = """
import sys
from core.settings.evaluation import EvaluationSettings
from core.evaluation.task_data import task_problems

assert task_problems(EvaluationSettings(tasks=("arc_easy", "mmlu"))) == []
print({"torch", "lm_eval"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "has no folder per split"),
        ({"validation": None}, "has no folder per split"),
        (
            {"train": [arc_item(0, 0)], "extra": [arc_item(0, 0)]},
            "extra, train, none of which is for testing",
        ),
        ({"validation": [{"goal": "a", "sol1": "b"}]}, "has the columns of the data set"),
        ({"validation": "{'not': JSON"}, "JSONDecodeError"),
        ({"validation": []}, "cannot be loaded"),
    ],
)
def test_data_that_does_not_fit_is_one_clear_line(llama, tokenizer, tmp_path, layout, message):
    for split, rows in layout.items():
        write(tmp_path / split, rows if isinstance(rows, list) else [])
        if isinstance(rows, str):
            (tmp_path / split / "data.jsonl").write_text(rows)
        elif rows is None:
            (tmp_path / split / "data.jsonl").rename(tmp_path / split / "data.csv")
    with pytest.raises(DataError, match=message) as error:
        evaluate_tasks(llama, tokenizer, settings_for(tmp_path))
    assert "\n" not in str(error.value)
    assert "arc_easy" in str(error.value)


def test_withheld_answers_are_an_error_instead_of_an_accuracy_of_zero(llama, tokenizer, tmp_path):
    write(tmp_path / "validation", [{"goal": "open a jar", "sol1": "turn it", "sol2": "sing", "label": -1}])
    with pytest.raises(DataError, match=r"task_data.piqa=.*answer -1, but choices 0 to 1\. Name a split"):
        evaluate_tasks(llama, tokenizer, settings_for(tmp_path, "piqa"))


def test_a_hub_that_cannot_be_reached_is_one_line_that_offers_local_data(llama, tokenizer, monkeypatch):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/nonexistent")
    with pytest.raises(
        DataError, match=r"commonsense_qa cannot be loaded.*set evaluation\.task_data\.comm"
    ) as error:
        evaluate_tasks(llama, tokenizer, EvaluationSettings(tasks=("commonsense_qa",)))
    assert "\n" not in str(error.value)
