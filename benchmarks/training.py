"""The training loop against transformers' own Trainer: tokens a second, and memory beyond what both hold.

Both train the same model on the same rows in the same order, with AdamW, clipping and accumulation, in the
same precision. The rows are random tokens: one document a row, all of it trained, as in plain text; or
several to a row, each of which sees itself alone, and a part of each trained, as in conversations whose
prompts are masked. Both must come to the same loss.

For speed they take steps in turns, each in a process of its own, and the median of the ratios of such pairs
counts. On a CPU a step's time is CPU time, which other work on the machine changes little. Memory is the peak
of a process of its own, less what was there before, gradients and moments; there glibc gives back what is
freed, so that the peak is what was in use.

    python benchmarks/training.py
    python benchmarks/training.py --model FOLDER --length 1024 --micro-batch 8 --precision bfloat16
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
SHAPE = ("length", "batch", "micro_batch", "layers", "steps", "trained", "precision", "compile")
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def main() -> None:
    """Measure; print the table, and the figures as JSON in the last line."""
    parser = parser_for(__doc__)
    parser.add_argument("--model", metavar="FOLDER", help="checkpoint folder (default: the demo's)")
    parser.add_argument("--length", type=int, default=256, help="tokens a row (default: 256)")
    parser.add_argument("--batch", type=int, default=8, help="rows an optimizer step (default: 8)")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows a pass (default: 4)")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers that are left; 0 for all")
    parser.add_argument("--steps", type=int, default=9, help="steps, of which the first does not count")
    parser.add_argument("--trained", type=float, default=0.4, help="share of a conversation that is a reply")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="our loop with training.compile")
    parser.add_argument("--worker", nargs=2, metavar=("WAY", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker, options)
        return
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        options.model = model_folder(options.model, Path(folder))
        results = {kind: compare(kind, options) for kind in KINDS}
    table = table_of("", ["rows", "way"], ["tokens/s", "memory beyond", "loss of step 2"])
    figures: dict[str, Any] = {"benchmark": "training", "device": pick_device().type}
    figures |= {name: getattr(options, name) for name in SHAPE} | {"threads": torch.get_num_threads()}
    figures |= {"tokens_ratio": {}, "memory_ratio": {}}
    for kind, (seconds, memory, losses) in results.items():
        for way in WAYS:
            rate = options.batch * options.length / median(seconds[way])
            table.add_row(kind, way, f"{rate:,.0f}", f"{memory[way] / 1e6:,.0f} MB", f"{losses[way]:.5f}")
        pairs = zip(seconds["trainer"], seconds["recover"], strict=True)
        figures["tokens_ratio"][kind] = round(median(theirs / ours for theirs, ours in pairs), 3)
        figures["memory_ratio"][kind] = round(memory["recover"] / memory["trainer"], 3)
    Console(highlight=False).print(table)
    print(json.dumps(figures))


def compare(
    kind: str, options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, float]]:
    """Return the seconds of each way's steps, its memory beyond what both hold, and its loss."""
    memory, losses = {}, {}
    for way in WAYS:
        with worker(way, kind, options, steps=2, environment=GIVING_BACK) as run:
            [next_line(run) for _ in range(2)]
            memory[way], losses[way] = json.loads(next_line(run))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with (
        worker("trainer", kind, options, steps=options.steps) as theirs,
        worker("recover", kind, options, steps=options.steps) as ours,
    ):
        for number in range(options.steps):
            turns = [("trainer", theirs), ("recover", ours)]
            for way, run in turns if number % 2 else turns[::-1]:
                seconds[way].append(float(next_line(run)))
        for run in (theirs, ours):
            next_line(run)
    return {way: found[1:] for way, found in seconds.items()}, memory, losses


@contextmanager
def worker(
    way: str, kind: str, options: argparse.Namespace, *, steps: int, environment: dict[str, str] | None = None
) -> "Iterator[subprocess.Popen[str]]":
    """Start a process that takes a step of training each time that it gets a line, and answers with one."""
    command = [sys.executable, __file__, "--worker", way, kind, "--model", str(options.model)]
    for name in SHAPE:
        value = steps if name == "steps" else getattr(options, name)
        if value is not False:
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | (environment or {}), **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def next_line(run: "subprocess.Popen[str]") -> str:
    """Let a worker go on; return what it says then."""
    assert run.stdin is not None
    assert run.stdout is not None
    print(file=run.stdin, flush=True)
    line = run.stdout.readline()
    if not line:
        raise SystemExit(f"the measured process ended with status {run.wait()}")
    return line


def work(way: str, kind: str, options: argparse.Namespace) -> None:
    """Be a worker: print the seconds of each step, then memory and loss."""
    torch.manual_seed(0)
    model = load_model(Path(options.model), dtype=torch.float32, device=pick_device())
    if options.layers:
        del model.get_decoder().layers[options.layers :]
        model.config.num_hidden_layers = options.layers
    for parameter in model.parameters():
        parameter.data = parameter.detach().clone()  # every page is in memory
    model.tie_weights()
    train = with_trainer if way == "trainer" else with_recover
    few = argparse.Namespace(**vars(options) | {"steps": 1})
    train(model, rows_of(kind, 8, model.config.vocab_size, few), few)  # libraries set up what they keep
    model.zero_grad(set_to_none=True)
    gc.collect()
    sys.stdin.readline()
    before, started = reset_peak(model), now(model)

    def pause(*_: Any) -> None:
        nonlocal started
        print(now(model) - started, flush=True)
        sys.stdin.readline()
        started = now(model)

    hook = register_optimizer_step_post_hook(pause)
    loss = train(model, rows_of(kind, options.length, model.config.vocab_size, options), options)
    hook.remove()
    extra = peak(model) - before - 12 * sum(p.numel() for p in model.parameters())
    print(json.dumps((extra, loss)), flush=True)


def rows_of(kind: str, length: int, vocabulary: int, options: argparse.Namespace) -> Rows:
    """Return random rows; those of conversations hold several, each a prompt and its reply."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (options.batch * options.steps, length), generator=generator)
    trained, starts = torch.ones_like(ids, dtype=torch.uint8), torch.zeros_like(ids, dtype=torch.uint8)
    if kind == "text":
        return Rows(ids, trained)
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
        teacher="none",
        precision=options.precision,
        compile=options.compile,
    )
    return recover(model, rows, settings, first_step=0, total_steps=options.steps).losses[-1][1]


def with_trainer(model: PreTrainedModel, rows: Rows, options: argparse.Namespace) -> float:
    """Train by transformers' Trainer; return the last loss."""
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    columns = {"input_ids": rows.input_ids, "labels": rows.input_ids.masked_fill(rows.trained == 0, -100)}
    if rows.starts is not None:
        columns["position_ids"] = positions_of(rows.starts)
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
    """Return the time once the device has nothing left to do; on a CPU, what this process had of it."""
    if model.device.type != "cuda":
        return time.process_time()
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
