"""The estimated memory of steps against their measured peaks, in fresh processes on the CPU.

python benchmarks/memory.py
python benchmarks/memory.py --model output/demo/base --only training
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from demo import peak_bytes, restart_peak
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, Qwen2Config

from core.machine.memory import available_bytes
from core.model.build import build_model, load_model
from core.model.checkpoint import Checkpoint, save_model
from core.model.config import config_with_layers, layer_shapes
from core.pruning.plan import LayerPlan
from core.quantities import parse_count
from core.settings.calibration import CalibrationSettings
from core.settings.evaluation import EvaluationSettings
from core.settings.prune import PruneSettings
from core.settings.texts import TextSource
from core.settings.training import TrainingSettings
from core.steps.footprint import evaluation_footprint, scoring_footprint, training_footprint
from core.steps.prune_footprint import distill_batch, distillation_footprint, repair_footprint

MODELS = {
    "SmolLM2-135M, 10 layers": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
        tie_word_embeddings=True,
    ),
    "SmolLM2-360M, 8 layers": LlamaConfig(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=8,
        num_attention_heads=15,
        num_key_value_heads=5,
        vocab_size=49_152,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-0.5B, 4 layers": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=4,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=False,
    ),
}
"""Layers of real sizes, but fewer, with random weights; the Qwen here has an output head of its own."""

SHAPES = {
    "training": [
        ("SmolLM2-135M, 10 layers", dict(micro_batch=4, sequence_length=256, precision="bfloat16")),
        ("SmolLM2-135M, 10 layers", dict(micro_batch=8, sequence_length=256, precision="float32")),
        (
            "SmolLM2-135M, 10 layers",
            dict(micro_batch=2, sequence_length=1024, precision="float32", gradient_checkpointing=True),
        ),
        ("SmolLM2-360M, 8 layers", dict(micro_batch=2, sequence_length=256, precision="float32")),
        ("Qwen2.5-0.5B, 4 layers", dict(micro_batch=2, sequence_length=512, precision="bfloat16")),
        (
            "SmolLM2-135M, 10 layers",
            dict(micro_batch=4, sequence_length=128, precision="float32", teacher="base", temperature=2.0),
        ),
        (
            "SmolLM2-135M, 10 layers",
            dict(micro_batch=4, sequence_length=256, precision="float32", lora_rank=8),
        ),
    ],
    "scoring": [
        ("SmolLM2-135M, 10 layers", dict(sequences=64, sequence_length=64, precision="float32")),
        ("SmolLM2-135M, 10 layers", dict(sequences=128, sequence_length=128, precision="bfloat16")),
        (
            "SmolLM2-135M, 10 layers",
            dict(sequences=128, sequence_length=128, precision="float32", state_memory="300MB"),
        ),
        (
            "SmolLM2-360M, 8 layers",
            dict(sequences=64, sequence_length=128, precision="float32", weights="streamed"),
        ),
        (
            "Qwen2.5-0.5B, 4 layers",
            dict(sequences=64, sequence_length=128, precision="float32", micro_batch=8),
        ),
    ],
    "repair": [
        ("SmolLM2-135M, 10 layers", dict(repair_tokens="16k", sequence_length=64, precision="float32")),
        (
            "SmolLM2-135M, 10 layers",
            dict(repair_tokens="16k", sequence_length=64, precision="bfloat16", state_memory="0"),
        ),
        (
            "SmolLM2-360M, 8 layers",
            dict(repair_tokens="16k", sequence_length=128, precision="float32", weights="streamed"),
        ),
        ("Qwen2.5-0.5B, 4 layers", dict(repair_tokens="8k", sequence_length=128, precision="float32")),
    ],
    "distillation": [
        ("SmolLM2-135M, 10 layers", dict(micro_batch=8, sequence_length=128, precision="float32")),
        ("SmolLM2-135M, 10 layers", dict(micro_batch=2, sequence_length=128, precision="bfloat16")),
        ("SmolLM2-360M, 8 layers", dict(micro_batch=4, sequence_length=128, precision="float32")),
        ("Qwen2.5-0.5B, 4 layers", dict(micro_batch=8, sequence_length=64, precision="bfloat16")),
    ],
    "evaluation": [
        ("SmolLM2-135M, 10 layers", dict(batch_size=8, perplexity_length=512, precision="float32")),
        ("SmolLM2-135M, 10 layers", dict(batch_size=32, perplexity_length=512, precision="bfloat16")),
        ("SmolLM2-135M, 10 layers", dict(batch_size=2, perplexity_length=2048, precision="float32")),
        ("SmolLM2-360M, 8 layers", dict(batch_size=8, perplexity_length=512, precision="float32")),
        ("Qwen2.5-0.5B, 4 layers", dict(batch_size=8, perplexity_length=256, precision="float32")),
    ],
}


def main() -> None:
    """Measure; print the table, and the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(description="Compare estimated and measured memory.")
    parser.add_argument("--only", choices=SHAPES, action="append", help="a step; may be repeated")
    parser.add_argument("--work", nargs=3, metavar=("STEP", "NUMBER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        step, number, folder = arguments.work
        print(json.dumps(_work(step, int(number), Path(folder))))
        return
    table = Table("step", "model", "settings", "estimate", "peak", "estimate / peak")
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in MODELS.items():
            torch.manual_seed(0)
            save_model(build_model(config), Path(folder, name.split(",")[0]), companions=None, provenance={})
        for step in arguments.only or SHAPES:
            for number, (name, settings) in enumerate(SHAPES[step]):
                found = _measure(step, number, folder)
                print(f"{step} {number + 1} of {len(SHAPES[step])}: {found}", file=sys.stderr)
                ratios.setdefault(step, []).append(round(found["estimate"] / found["peak"], 3))
                sizes = [f"{found[key] / 1e9:.2f} GB" for key in ("estimate", "peak")]
                text = ", ".join(f"{key}={value}" for key, value in settings.items())
                table.add_row(step, name, text, *sizes, f"{ratios[step][-1]:.2f}")
    Console(width=150).print(table)
    worst = max(abs(ratio - 1) for found in ratios.values() for ratio in found)
    print(json.dumps({**ratios, "worst_error": round(worst, 3)}))


def _measure(step: str, number: int, folder: str) -> dict[str, int]:
    command = [sys.executable, __file__, "--work", step, str(number), folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _work(step: str, number: int, folder: Path) -> dict[str, int]:
    """Do a step's work in this process; returns bytes above what the process had before."""
    name, settings = SHAPES[step][number]
    config = Checkpoint(folder / name.split(",")[0]).config
    estimate, work = _PREPARE[step](config, folder / name.split(",")[0], settings)
    before = psutil.Process().memory_info().rss
    restart_peak()
    work()
    return {"estimate": estimate, "peak": peak_bytes() - before}


def _training(config: Any, folder: Path, settings: dict[str, Any]) -> tuple[int, Any]:
    from core.training.adapters import add_adapters
    from core.training.objective import load_teacher
    from core.training.recover import recover
    from core.training.rows import Rows

    batch, length = settings["micro_batch"], settings["sequence_length"]
    training = TrainingSettings(
        tokens=str(4 * batch * length),
        sources=(TextSource(path="x"),),
        global_batch=2 * batch,
        **{"teacher": "none"} | settings,
    )

    taught = training.teacher == "base"

    def work() -> None:
        model = load_model(Checkpoint(folder), dtype=torch.float32)
        if training.lora_rank:
            add_adapters(model, training.lora_rank)
        teacher = load_teacher(folder, training, model.device) if taught else None
        ids = torch.randint(0, config.vocab_size, (4 * batch, length))
        starts = torch.zeros_like(ids)
        starts[:, [0, length // 2]] = 1  # two documents a row, which a mask keeps apart
        rows = Rows(ids, torch.ones_like(ids), starts)
        recover(model, rows, training, teacher=teacher, first_step=0, total_steps=2)

    dense = config if taught else None
    return training_footprint(config, dense, training, device="cpu").device_bytes, work


def _scoring(config: Any, folder: Path, settings: dict[str, Any]) -> tuple[int, Any]:
    from core.pruning.scoring.measurement import MeasuredCheckpoint

    calibration, prune = CalibrationSettings(**settings), PruneSettings()
    tokens = torch.randint(0, config.vocab_size, (calibration.sequences, calibration.sequence_length))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[calibration.precision]

    def work() -> None:
        checkpoint = Checkpoint(folder)
        MeasuredCheckpoint(checkpoint, calibration, prune, dtype=dtype, seed=0).measure(tokens)

    free = available_bytes()
    estimate = scoring_footprint(config, calibration, prune, device="cpu", free_bytes=free)
    return estimate.device_bytes, work


def _evaluation(config: Any, folder: Path, settings: dict[str, Any]) -> tuple[int, Any]:
    from core.evaluation.perplexity import perplexity

    evaluation = EvaluationSettings(perplexity=TextSource(path="x"), **settings)
    batch, length = evaluation.batch_size, evaluation.perplexity_length
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[evaluation.precision]

    def work() -> None:
        windows = torch.randint(0, config.vocab_size, (2 * batch, length))
        perplexity(load_model(Checkpoint(folder), dtype=dtype), windows, batch_size=batch)

    return evaluation_footprint(config, evaluation, device="cpu").device_bytes, work


def _cut_of(config: Any, share: float) -> tuple[LayerPlan, ...]:
    return tuple(
        LayerPlan(
            query_heads=tuple(range(layer.query_heads)),
            kv_heads=tuple(range(layer.kv_heads)),
            mlp_channels=tuple(range(round(layer.mlp_width * (1 - share)))),
        )
        for layer in layer_shapes(config)
    )


def _repair(config: Any, folder: Path, settings: dict[str, Any]) -> tuple[int, Any]:
    from core.pruning.repair import Repair
    from core.pruning.scoring.measurement import state_memory
    from core.pruning.surgery import open_pruned

    prune = PruneSettings(repair_tokens=settings["repair_tokens"])
    own = {name: value for name, value in settings.items() if name != "repair_tokens"}
    calibration = CalibrationSettings(**own)
    shape = (-(-parse_count(prune.repair_tokens) // calibration.sequence_length), calibration.sequence_length)
    tokens = torch.randint(0, config.vocab_size, shape)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[calibration.precision]

    def work() -> None:
        streamed = calibration.weights == "streamed"
        model = open_pruned(Checkpoint(folder), dtype=dtype, device=torch.device("cpu"), streamed=streamed)
        states = tokens.numel() * config.hidden_size * dtype.itemsize
        repair = Repair(model, tokens, ridge=0.1, keep_bytes=state_memory(calibration) - states)
        for index, plan in enumerate(_cut_of(config, 0.2)):
            repair.layer(index, plan)

    free = available_bytes()
    return repair_footprint(config, calibration, prune, device="cpu", free_bytes=free).device_bytes, work


def _distillation(config: Any, folder: Path, settings: dict[str, Any]) -> tuple[int, Any]:
    from core.pruning.surgery import prune_model
    from core.training.distillation import distill

    calibration, prune = CalibrationSettings(**settings), PruneSettings()
    batch = distill_batch(calibration, prune)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[calibration.precision]
    cut = _cut_of(config, 0.2)
    save_model(
        prune_model(load_model(Checkpoint(folder)), cut), folder / "cut", companions=None, provenance={}
    )

    def work() -> None:
        student = load_model(Checkpoint(folder / "cut"), dtype=torch.float32)
        teacher = load_model(Checkpoint(folder), dtype=dtype)
        tokens = torch.randint(0, config.vocab_size, (2 * batch, calibration.sequence_length))
        distill(
            student,
            teacher,
            tokens,
            steps=2,
            rate=1e-4,
            batch=batch,
            micro_batch=calibration.micro_batch,
            autocast=calibration.precision == "bfloat16",
            seed=0,
        )

    smaller = config_with_layers(config, [plan.shape() for plan in cut])
    return distillation_footprint(smaller, config, calibration, prune, device="cpu").device_bytes, work


_PREPARE = {
    "training": _training,
    "scoring": _scoring,
    "repair": _repair,
    "distillation": _distillation,
    "evaluation": _evaluation,
}

if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
