"""The training loop against transformers' own Trainer: tokens a second, and memory beyond what both hold.

Both train the same model on the same rows in the same order, with AdamW, clipping and accumulation, in the
same precision, in fresh processes that take turns. The rows are random tokens: one document a row, all of it
trained, as in plain text; or several to a row, each of which sees itself alone, and a part of each trained,
as in conversations whose prompts are masked. Memory is the peak, less what was there before, gradients and
moments. Both must come to the same loss.

    python benchmarks/training.py
    python benchmarks/training.py --model FOLDER --length 1024 --micro-batch 8 --precision bfloat16
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from demo import model_folder, parser_for, peak_bytes, restart_peak, table_of
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from core.model.build import load_model, pick_device
from core.settings.texts import TextSource
from core.settings.training import TrainingSettings
from core.training.recover import recover
from core.training.rows import Rows, positions_of

WAYS, KINDS = ("trainer", "recover"), ("text", "conversations")
RATE, DOCUMENTS = 1e-5, 4


def main() -> None:
    """Measure; print the table, and the figures as JSON in the last line."""
    parser = parser_for(__doc__)
    parser.add_argument("--model", metavar="FOLDER", help="checkpoint folder (default: the demo's)")
    parser.add_argument("--length", type=int, default=256, help="tokens a row (default: 256)")
    parser.add_argument("--batch", type=int, default=8, help="rows an optimizer step (default: 8)")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows a pass (default: 4)")
    parser.add_argument("--steps", type=int, default=4, help="steps, of which the first does not count")
    parser.add_argument("--trained", type=float, default=0.4, help="share of a conversation that is a reply")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeat", type=int, default=3, help="runs, of which the median counts (default: 3)")
    parser.add_argument("--worker", nargs=2, metavar=("WAY", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(*options.worker, options)))
        return
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        options.model = model_folder(options.model, Path(folder))
        results = {kind: compare(kind, options) for kind in KINDS}
    table = table_of("", ["rows", "way"], ["tokens/s", "memory beyond", "last loss"])
    for kind, found in results.items():
        for way in WAYS:
            rate, extra, loss = found[way]
            table.add_row(kind, way, f"{rate:,.0f}", f"{extra / 1e6:,.0f} MB", f"{loss:.5f}")
    Console(highlight=False).print(table)
    shape = {name: getattr(options, name) for name in ("length", "batch", "micro_batch", "steps", "trained")}
    figures: dict[str, Any] = {"benchmark": "training", "device": pick_device().type, **shape}
    figures |= {"threads": torch.get_num_threads(), "precision": options.precision, "repeat": options.repeat}
    for place, name in enumerate(("tokens_ratio", "memory_ratio")):
        figures[name] = {
            kind: round(found["recover"][place] / found["trainer"][place], 3)
            for kind, found in results.items()
        }
    print(json.dumps(figures))


def compare(kind: str, options: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """Run both ways in turns; return the medians of tokens a second, extra memory and last loss of each."""
    runs: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for number in range(options.repeat):
        for way in WAYS if number % 2 == 0 else WAYS[::-1]:
            command = [sys.executable, __file__, "--worker", way, kind]
            for name in ("model", "length", "batch", "micro_batch", "steps", "trained", "precision"):
                command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[way].append(json.loads(run.stdout.splitlines()[-1]))
    medians = {way: [median(column) for column in zip(*found, strict=True)] for way, found in runs.items()}
    return {way: (rate, extra, loss) for way, (rate, extra, loss) in medians.items()}


def work(way: str, kind: str, options: argparse.Namespace) -> tuple[float, float, float]:
    """Measure one way on one kind of rows in this process."""
    torch.manual_seed(0)
    model = load_model(Path(options.model), dtype=torch.float32, device=pick_device())
    for parameter in model.parameters():
        parameter.data = parameter.detach().clone()  # every page is in memory
    model.tie_weights()
    train = with_trainer if way == "trainer" else with_recover
    few = argparse.Namespace(**vars(options) | {"steps": 1})
    train(model, rows_of(kind, 8, model.config.vocab_size, few), few)  # libraries set up what they keep
    model.zero_grad(set_to_none=True)
    gc.collect()
    ends: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(now(model)))
    before = reset_peak(model)
    loss = train(model, rows_of(kind, options.length, model.config.vocab_size, options), options)
    extra = peak(model) - before - 12 * sum(p.numel() for p in model.parameters())
    hook.remove()
    a_step = median(end - start for start, end in pairwise(ends))
    return options.batch * options.length / a_step, extra, loss


def rows_of(kind: str, length: int, vocabulary: int, options: argparse.Namespace) -> Rows:
    """Return random rows; those of conversations hold several, each a prompt and its reply."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (options.batch * options.steps, length), generator=generator)
    trained, starts = torch.ones_like(ids, dtype=torch.uint8), torch.zeros_like(ids, dtype=torch.uint8)
    starts[:, 0] = 1
    if kind == "text":
        return Rows(ids, trained, starts)
    each = length // DOCUMENTS
    starts[:, ::each] = 1
    trained[:] = torch.arange(length) % each >= (1 - options.trained) * each
    return Rows(ids, trained, starts)


def with_recover(model: PreTrainedModel, rows: Rows, options: argparse.Namespace) -> float:
    """Train by our loop; return the last loss."""
    settings = TrainingSettings(
        tokens=str(rows.input_ids.numel()),
        sources=(TextSource(path="random"),),
        sequence_length=rows.input_ids.shape[1],
        global_batch=options.batch,
        micro_batch=options.micro_batch,
        learning_rate=RATE,
        min_learning_rate=RATE,
        warmup_share=0,
        decay_share=0,
        precision=options.precision,
    )
    return recover(model, rows, settings, first_step=0, total_steps=options.steps).losses[-1][1]


def with_trainer(model: PreTrainedModel, rows: Rows, options: argparse.Namespace) -> float:
    """Train by transformers' Trainer; return the last loss."""
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    ids, positions = rows.input_ids, positions_of(rows.starts if rows.starts is not None else rows.trained)
    labels = ids.masked_fill(rows.trained == 0, -100)
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.micro_batch,
            gradient_accumulation_steps=options.batch // options.micro_batch,
            max_steps=options.steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=options.precision == "bfloat16",
            use_cpu=model.device.type == "cpu",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        items = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        trainer = Trainer(model=model, args=arguments, train_dataset=items)
        trainer.log = lambda logs, *_: trainer.state.log_history.append(logs)  # it prints them otherwise
        trainer.train()
    return float([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])


def now(model: PreTrainedModel) -> float:
    """Return the time once the device has nothing left to do."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def reset_peak(model: PreTrainedModel) -> int:
    """Let ``peak`` start again; return what is in use."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        return torch.cuda.memory_allocated(model.device)
    restart_peak()
    return peak_bytes()


def peak(model: PreTrainedModel) -> int:
    """Return the most memory in use since ``reset_peak``."""
    return torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else peak_bytes()


if __name__ == "__main__":
    main()
