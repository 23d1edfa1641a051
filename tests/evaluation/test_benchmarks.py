"""Benchmarks are scored as a loop over single predictions scores them."""

import logging
import math
import re
from types import SimpleNamespace

import pytest
import torch

from core import progress
from core.errors import CheckpointError
from core.evaluation.benchmarks import chosen_items, evaluate_tasks, measure_tasks
from core.settings.evaluation import EvaluationSettings
from tests.support.benchmarks import QUESTIONS, arc_item, log_likelihood, preferences, settings_for, write


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
            "chance": pytest.approx(sum(1 / len(choices) for _, choices in QUESTIONS) / 7),
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


def test_a_limit_draws_items_with_the_seed(llama, tokenizer, tmp_path):
    write(tmp_path / "validation", [arc_item(n, 0) for n in range(7)])

    def items(limit, seed=0):
        settings = settings_for(tmp_path, limit=limit)
        found = measure_tasks(lambda: (llama, tokenizer), settings, seed=seed).items.tasks["arc_easy"]
        return dict(
            zip(found.items, zip(*(m.values for m in found.metrics.values()), strict=True), strict=True)
        )

    everything = items(0)
    assert len(everything) == 7
    assert items(100) == everything
    drawn = [items(3, seed) for seed in range(8)]
    assert len({frozenset(each) for each in drawn}) > 3
    for seed, three in enumerate(drawn):
        five = items(5, seed)
        assert (len(three), len(five)) == (3, 5)
        assert three.items() <= five.items() <= everything.items()


def test_each_item_is_drawn_as_often_as_any_other_and_each_task_draws_its_own():
    drawn = [chosen_items("piqa", 10, limit=3, seed=seed) for seed in range(600)]
    times = [sum(n in each for each in drawn) for n in range(10)]
    assert all(abs(count - 180) < 4 * math.sqrt(600 * 0.3 * 0.7) for count in times)
    assert all(each == sorted(each) for each in drawn)
    assert drawn != [chosen_items("arc_easy", 10, limit=3, seed=seed) for seed in range(600)]
    assert drawn[7] == [0, 1, 3]  # the choice is part of what a run's figures mean: no version may change it


def test_evaluating_again_gives_the_same_numbers_and_prints_nothing(llama, tokenizer, tmp_path, capfd):
    write(tmp_path / "validation", [arc_item(n, 0) for n in range(7)])
    first = evaluate_tasks(llama, tokenizer, settings_for(tmp_path))
    assert evaluate_tasks(llama, tokenizer, settings_for(tmp_path)) == first
    assert capfd.readouterr() == ("", "")


def test_the_log_reports_progress(llama, tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_INTERVAL_S", 0.0)
    write(tmp_path / "validation", [arc_item(n, 0) for n in range(7)])
    with caplog.at_level(logging.INFO):
        evaluate_tasks(llama, tokenizer, settings_for(tmp_path))
    reported = [message.split(",")[0] for message in caplog.messages if " of 7 items" in message]
    assert reported == [f"benchmarks: {n} of 7 items" for n in range(1, 7)]
    assert any(message.startswith("benchmarks: 7 items in ") for message in caplog.messages)


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


@pytest.mark.parametrize("stride", [1, 5, 16, 100])
def test_windows_that_slide_give_each_token_the_context_that_the_stride_leaves(
    llama, tokenizer, tmp_path, stride
):
    llama.config.max_position_embeddings = length = 16
    page = "Iron is a metal that rusts in air and water " * 2
    write(tmp_path / "test", [{"page": page}])
    found = evaluate_tasks(llama, tokenizer, settings_for(tmp_path, "wikitext", stride=stride))["wikitext"]
    ids = tokenizer.encode("<|im_end|>", add_special_tokens=False) + tokenizer.encode(page)
    step, total, first = min(stride, length), 0.0, 1
    while first < len(ids):  # the first window predicts all that it reads, the others `step` tokens each
        last = min(first + (length if first == 1 else step), len(ids))
        start = max(0, last - 1 - length)
        for place in range(first, last):
            with torch.no_grad():
                logits = llama(torch.tensor([ids[start:place]])).logits[0, -1].double()
            total += float(logits[ids[place]] - torch.logsumexp(logits, 0))
        first = last
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / len(re.split(r"\s+", page))), rel=1e-5)
    bits = -total / math.log(2) / len(page.encode())
    assert (found["bits_per_byte"], found["byte_perplexity"]) == (
        pytest.approx(bits, rel=1e-5),
        pytest.approx(2**bits, rel=1e-5),
    )


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
