import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core import progress
from core.errors import CheckpointError, DataError
from core.evaluation.benchmarks import evaluate_tasks
from core.evaluation.task_data import task_problems
from core.settings.evaluation import EvaluationSettings

QUESTIONS = [
    ("Which of these is a metal?", ["iron", "a wooden spoon", "water", "air in a bottle"]),
    ("What do plants need to grow?", ["light", "noise and smoke", "plastic"]),
    ("Where does the sun rise?", ["in the east", "in the west", "at the pole", "nowhere at all"]),
    ("What boils at 100 degrees?", ["water", "gold", "the sea bed", "a stone", "salt"]),
    ("Which animal lays eggs?", ["a hen", "a horse", "a common house cat", "no animal"]),
    ("What does a thermometer measure?", ["temperature", "time", "the age of a tree", "weight"]),
    ("Which planet do we live on?", ["Earth", "Mars", "Jupiter or one of its moons", "Venus"]),
]


@pytest.fixture
def llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def arc_item(number, answer):
    question, choices = QUESTIONS[number]
    labels = list("ABCDE")[: len(choices)]
    return {
        "id": str(number),
        "question": question,
        "choices": {"text": choices, "label": labels},
        "answerKey": labels[answer],
    }


def write(folder, rows, form="jsonl"):
    folder.mkdir(parents=True)
    if form == "jsonl":
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    import datasets

    data = datasets.Dataset.from_list(rows)
    if form == "parquet":
        data.select(range(2)).to_parquet(folder / "0000.parquet")
        data.select(range(2, len(rows))).to_parquet(folder / "0001.parquet")
    else:
        data.save_to_disk(folder)


def settings_for(folder, *tasks, **others):
    tasks = tasks or ("arc_easy",)
    return EvaluationSettings(tasks=tasks, task_data={task: str(folder) for task in tasks}, **others)


def log_likelihood(model, tokenizer, context, continuation):
    """Log-probability of the continuation's tokens, each from a forward pass of its own."""
    before, tokens = tokenizer.encode(context), tokenizer.encode(context + continuation)
    total = 0.0
    for position in range(len(before), len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:position]])).logits[0, -1].double()
        total += float(logits[tokens[position]] - torch.logsumexp(logits, 0))
    return total


def preferences(model, tokenizer):
    """For each question the choice of highest log-likelihood, and of highest log-likelihood per character."""
    plain, normed = [], []
    for question, choices in QUESTIONS:
        scores = [
            log_likelihood(model, tokenizer, f"Question: {question}\nAnswer:", f" {choice}")
            for choice in choices
        ]
        per_character = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        plain.append(scores.index(max(scores)))
        normed.append(per_character.index(max(per_character)))
    return plain, normed


@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow"])
def test_accuracies_are_what_a_loop_over_single_predictions_gives(llama, tokenizer, tmp_path, form):
    plain, normed = preferences(llama, tokenizer)
    assert sum(a != b for a, b in zip(plain, normed, strict=True)) >= 3  # the two metrics differ
    answers = [*plain[:3], *normed[3:6], (plain[6] + 1) % 4]
    write(tmp_path / "validation", [arc_item(n, answer) for n, answer in enumerate(answers)], form)

    result = evaluate_tasks(llama, tokenizer, settings_for(tmp_path, batch_size=3))

    acc = sum(a == b for a, b in zip(plain, answers, strict=True)) / 7
    acc_norm = sum(a == b for a, b in zip(normed, answers, strict=True)) / 7
    assert result == {
        "arc_easy": {
            "acc": pytest.approx(acc),
            "acc_stderr": pytest.approx(math.sqrt(acc * (1 - acc) / 6)),
            "acc_norm": pytest.approx(acc_norm),
            "acc_norm_stderr": pytest.approx(math.sqrt(acc_norm * (1 - acc_norm) / 6)),
        }
    }


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_every_single_answer_is_the_loops(llama, tokenizer, tmp_path, batch_size):
    plain, normed = preferences(llama, tokenizer)
    write(tmp_path / "plain/test", [arc_item(n, answer) for n, answer in enumerate(plain)])
    write(tmp_path / "normed/test", [arc_item(n, answer) for n, answer in enumerate(normed)])
    plain_result = evaluate_tasks(llama, tokenizer, settings_for(tmp_path / "plain", batch_size=batch_size))
    normed_result = evaluate_tasks(llama, tokenizer, settings_for(tmp_path / "normed", batch_size=batch_size))
    assert plain_result["arc_easy"]["acc"] == 1
    assert normed_result["arc_easy"]["acc_norm"] == 1


def test_the_limit_takes_items_from_the_front(llama, tokenizer, tmp_path):
    plain, _ = preferences(llama, tokenizer)
    right = [arc_item(n, answer) for n, answer in enumerate(plain)]
    wrong = [arc_item(n, (answer + 1) % len(QUESTIONS[n][1])) for n, answer in enumerate(plain)]
    write(tmp_path / "validation", right[:2] + wrong[2:])
    accuracies = [
        evaluate_tasks(llama, tokenizer, settings_for(tmp_path, limit=limit))["arc_easy"]["acc"]
        for limit in (2, 4, 0, 100)
    ]
    assert accuracies == [1, 1 / 2, pytest.approx(2 / 7), pytest.approx(2 / 7)]


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


def test_evaluating_again_gives_the_same_numbers_and_prints_nothing(llama, tokenizer, tmp_path, capfd):
    write(tmp_path / "validation", [arc_item(n, 0) for n in range(7)])
    first = evaluate_tasks(llama, tokenizer, settings_for(tmp_path))
    assert evaluate_tasks(llama, tokenizer, settings_for(tmp_path)) == first
    assert capfd.readouterr() == ("", "")


def test_the_log_reports_progress(llama, tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_INTERVAL_S", 0.0)
    write(tmp_path / "validation", [arc_item(n, 0) for n in range(7)])
    answers = sum(len(choices) for _, choices in QUESTIONS)
    with caplog.at_level(logging.INFO):
        evaluate_tasks(llama, tokenizer, settings_for(tmp_path))
    reported = [message for message in caplog.messages if f" of {answers} answers" in message]
    assert len(reported) == answers - 1
    assert reported[4].startswith(f"benchmarks: 5 of {answers} answers")


def test_whole_documents_are_scored_in_windows_of_the_models_own_length(llama, tokenizer, tmp_path):
    from lm_eval.models.huggingface import HFLM

    page = "Iron is a metal that rusts in air and water"
    write(tmp_path / "short/test", [{"page": page}])
    score = log_likelihood(llama, tokenizer, "<|im_end|>", page)
    short = evaluate_tasks(llama, tokenizer, settings_for(tmp_path / "short", "wikitext"))["wikitext"]
    assert short["word_perplexity"] == pytest.approx(math.exp(-score / len(page.split())), rel=1e-4)

    llama.config.max_position_embeddings = 16
    long = " ".join([page] * 5)
    write(tmp_path / "long/test", [{"page": long}])
    shapes = set()
    hook = llama.model.layers[0].register_forward_pre_hook(lambda _, inputs: shapes.add(inputs[0].shape[:2]))
    found = evaluate_tasks(llama, tokenizer, settings_for(tmp_path / "long", "wikitext"))["wikitext"]
    hook.remove()
    assert {rows for rows, _ in shapes} == {1}
    assert max(length for _, length in shapes) == 16
    theirs = HFLM(pretrained=llama, tokenizer=tokenizer, backend="causal", softmax_dtype="float32")
    request = SimpleNamespace(args=(long,))
    score = theirs.loglikelihood_rolling([request], disable_tqdm=True)[0]
    assert found["word_perplexity"] == pytest.approx(math.exp(-score / len(long.split())), rel=1e-4)


def test_a_task_with_examples_and_two_filters_keeps_the_filters_apart(llama, tokenizer, tmp_path):
    llama.config.max_position_embeddings = 2048
    rows = [{"question": f"What is {n} plus 1?", "answer": f"It is so.\n#### {n + 1}"} for n in range(7)]
    write(tmp_path / "train", rows)
    write(tmp_path / "test", rows[:1])
    prompts = []
    llama.generation_config.eos_token_id = None
    original = llama.generate

    def generate(input_ids, **options):
        prompts.append(tokenizer.decode(input_ids[0]))
        return original(input_ids=input_ids, **{**options, "max_length": input_ids.shape[1] + 3})

    llama.generate = generate
    result = evaluate_tasks(llama, tokenizer, settings_for(tmp_path, "gsm8k", limit=1))
    assert set(result["gsm8k"]) == {"exact_match_strict-match", "exact_match_flexible-extract"}
    assert prompts[0].count("####") == 5
    assert prompts[0].endswith("Question: What is 0 plus 1?\nAnswer:")


def test_logits_that_are_not_numbers_are_an_error(llama, tokenizer, tmp_path):
    write(tmp_path / "validation", [arc_item(0, 0)])
    llama.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="are not numbers"):
        evaluate_tasks(llama, tokenizer, settings_for(tmp_path))


def test_no_tasks_no_results(llama, tokenizer):
    assert evaluate_tasks(llama, tokenizer, EvaluationSettings()) == {}


@pytest.mark.slow  # lm-eval indexes all of its 14,000 files for a group
def test_a_group_gives_its_average_and_a_tag_its_members(llama, tokenizer, tmp_path):
    # Without a folder per subject, all 19 read the same items: each answer is right once, and one twice.
    question = {"question": "Is iron a metal?", "choices": ["no", "yes", "both", "none"]}
    write(tmp_path / "mmlu/test", [{**question, "answer": answer} for answer in (0, 1, 2, 3, 3)])
    plain, _ = preferences(llama, tokenizer)
    for subset, shift in (("ARC-Easy", 0), ("ARC-Challenge", 1)):
        rows = [arc_item(n, (answer + shift) % len(QUESTIONS[n][1])) for n, answer in enumerate(plain)]
        write(tmp_path / f"arc/{subset}/test", rows)
    settings = EvaluationSettings(
        tasks=("mmlu_stem", "ai2_arc"),
        task_data={"mmlu_stem": str(tmp_path / "mmlu"), "ai2_arc": str(tmp_path / "arc")},
    )
    result = evaluate_tasks(llama, tokenizer, settings)
    assert list(result) == ["mmlu_stem", "arc_challenge", "arc_easy"]
    assert 1 / 5 <= result["mmlu_stem"]["acc"] <= 2 / 5
    assert result["mmlu_stem"]["acc_stderr"] > 0
    assert (result["arc_easy"]["acc"], result["arc_challenge"]["acc"]) == (1, 0)


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
