"""The training loop against transformers' own Trainer: tokens a second, and memory beyond what both hold.

All train the same model on the same texts in the same order, with AdamW, clipping and accumulation, in the
same precision, and must come to the same loss. The texts are random tokens. Plain text fills its rows, and
all of it is trained. Conversations have the lengths of common instructions; their prompts are masked. Of the
conversations of a step

* ``padded``: Trainer makes batches in their order, padded to the longest, as it does by default;
* ``grouped``: the same, where the step's conversations are sorted by length first, so that less is padding;
* ``trainer``: Trainer is given our packed rows, in which each conversation sees itself alone;
* ``recover``: our loop trains on these.

Tokens are those of the texts, without padding. For speed all take steps in turns, each in a process of its
own, and the median of a step's ratios counts. On a CPU a step's time is CPU time, which other work on the
machine changes little. Memory is the peak of a process of its own, less what was there before, gradients and
moments; there glibc gives back what is freed, so that the peak is what was in use.

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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from demo import model_folder, parser_for, peak_bytes, restart_peak, table_of
from numpy.typing import NDArray
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import DataCollatorForSeq2Seq, PreTrainedModel

from core.data.packing import Tokenized
from core.data.whole_packing import pack_whole
from core.model.build import load_model, load_tokenizer, pick_device
from core.settings.texts import TextSource
from core.settings.training import TrainingSettings
from core.training.recover import recover
from core.training.rows import Rows, documents_of

WAYS = {"text": ("trainer", "recover"), "conversations": ("padded", "grouped", "trainer", "recover")}
OURS = "recover"
RATE = 1e-5
MEDIAN_TOKENS, SPREAD = 162, 0.62
"""Of a conversation: log-normal, so that a twentieth has over 450 tokens, as of 999 of Alpaca's."""
FULLEST = 0.97
"""Share of rows that conversations fill."""
SHAPE = ("length", "batch", "micro_batch", "layers", "steps", "trained", "precision")
SHAPE += ("compile", "compile_trainer")
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


class Texts(NamedTuple):
    """What a way trains on."""

    rows: Rows
    """All steps' rows, as our loop takes them."""
    documents: list[Tokenized]
    """What they hold: as many in each step."""


class Measured(NamedTuple):
    """What was found of a way."""

    seconds: list[float]
    """Of each step but the first."""
    memory: float
    """Bytes, beyond what all ways hold."""
    loss: float


def main() -> None:
    """Measure; print the table, and the figures as JSON in the last line."""
    parser = parser_for(__doc__)
    parser.add_argument("--model", metavar="FOLDER", help="checkpoint folder (default: the demo's)")
    parser.add_argument("--length", type=int, default=512, help="tokens a row (default: 512)")
    parser.add_argument("--batch", type=int, default=4, help="rows an optimizer step (default: 4)")
    parser.add_argument("--micro-batch", type=int, default=2, help="rows a pass (default: 2)")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers that are left; 0 for all")
    parser.add_argument("--steps", type=int, default=7, help="steps, of which the first does not count")
    parser.add_argument("--trained", type=float, default=0.4, help="share of a conversation that is a reply")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="our loop with training.compile")
    parser.add_argument("--compile-trainer", action="store_true", help="Trainer with torch_compile")
    parser.add_argument("--worker", nargs=2, metavar=("WAY", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker, options)
        return
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        options.model = model_folder(options.model, Path(folder))
        results = {kind: compare(kind, options) for kind in WAYS}
    table = table_of("", ["texts", "way"], ["tokens/s", "memory beyond", "loss of step 2"])
    figures: dict[str, Any] = {"benchmark": "training", "device": pick_device().type}
    figures |= {name: getattr(options, name) for name in SHAPE} | {"threads": torch.get_num_threads()}
    figures |= {"tokens_ratio": {}, "memory_ratio": {}}
    for kind, found in results.items():
        tokens = (
            sum(len(d.ids) for d in texts_of(kind, options.length, 2**10, options).documents) / options.steps
        )
        ours = found[OURS]
        for way, of_way in found.items():
            rate, memory = tokens / median(of_way.seconds), f"{of_way.memory / 1e6:,.0f} MB"
            table.add_row(kind, way, f"{rate:,.0f}", memory, f"{of_way.loss:.5f}")
            if way != OURS:
                pairs = zip(of_way.seconds, ours.seconds, strict=True)
                named = f"{kind}/{way}"
                figures["tokens_ratio"][named] = round(median(a / b for a, b in pairs), 3)
                figures["memory_ratio"][named] = round(ours.memory / of_way.memory, 3)
    Console(highlight=False).print(table)
    print(json.dumps(figures))


def compare(kind: str, options: argparse.Namespace) -> dict[str, Measured]:
    """Return what each way takes."""
    beside = {}
    for way in WAYS[kind]:
        with worker(way, kind, options, steps=2, environment=GIVING_BACK) as run:
            [next_line(run) for _ in range(2)]
            beside[way] = json.loads(next_line(run))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS[kind]}
    with ExitStack() as started:
        runs = {
            way: started.enter_context(worker(way, kind, options, steps=options.steps)) for way in WAYS[kind]
        }
        for number in range(options.steps):
            for way, run in list(runs.items())[:: 1 if number % 2 else -1]:
                seconds[way].append(float(next_line(run)))
        for run in runs.values():
            next_line(run)
    return {way: Measured(found[1:], *beside[way]) for way, found in seconds.items()}


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
    few = argparse.Namespace(**vars(options) | {"steps": 1})
    # Libraries set up what they keep.
    train(way, model, texts_of("text", 8, model.config.vocab_size, few), few)
    texts = texts_of(kind, options.length, model.config.vocab_size, options)
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
    loss = train(way, model, texts, options)
    hook.remove()
    extra = peak(model) - before - 12 * sum(p.numel() for p in model.parameters())
    print(json.dumps((extra, loss)), flush=True)


def texts_of(kind: str, length: int, vocabulary: int, options: argparse.Namespace) -> Texts:
    """Return random texts."""
    generator, drawing = np.random.default_rng(1), np.random.default_rng(2)

    def lengths(number: int) -> NDArray[np.int64]:
        drawn = drawing.lognormal(np.log(MEDIAN_TOKENS), SPREAD, size=number)
        return drawn.clip(8, length).astype(np.int64)

    def document(tokens: int, trained: float = 1.0) -> Tokenized:
        ids = generator.integers(vocabulary, size=tokens, dtype=np.int32)
        counted = np.arange(tokens) >= max((1 - trained) * tokens, 1)
        return Tokenized(ids, counted.astype(np.uint8))

    if kind == "text":
        documents = [document(length) for _ in range(options.batch * options.steps)]
        ids, trained = (np.stack(column) for column in list(zip(*documents, strict=True))[:2])
        return Texts(Rows(torch.from_numpy(ids), torch.from_numpy(trained)), documents)
    documents, rows = [], []
    a_pass = round(FULLEST * options.micro_batch * length / lengths(10**5).mean())
    each = a_pass * options.batch // options.micro_batch
    for _ in range(options.steps):
        while True:  # until those of a step just fill its rows
            drawn = lengths(each)
            if not 0.95 <= drawn.sum() / (options.batch * length) <= 1:
                continue
            step = [document(tokens, options.trained) for tokens in drawn.tolist()]
            packed = list(pack_whole(step, length, opening=(), padding=0, held=options.batch))
            if len(packed) == options.batch:
                break
        documents += step
        rows += packed
    columns = [np.stack([getattr(row, name) for row in rows]) for name in ("ids", "trained", "starts")]
    return Texts(Rows(*map(torch.from_numpy, columns)), documents)


def train(way: str, model: PreTrainedModel, texts: Texts, options: argparse.Namespace) -> float:
    """Train in one of the ways; return the last loss."""
    if way == OURS:
        return with_recover(model, texts.rows, options)
    rows = texts.rows
    columns: dict[str, Any] = {"input_ids": rows.input_ids}
    columns["labels"] = rows.input_ids.long().masked_fill(rows.trained == 0, -100)
    if way == "trainer":
        if rows.starts is not None:
            columns["position_ids"] = documents_of(rows.starts).positions
        items = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return with_trainer(model, items, options.micro_batch, options)
    each = len(texts.documents) // options.steps
    batches = [texts.documents[first : first + each] for first in range(0, len(texts.documents), each)]
    if way == "grouped":
        batches = [sorted(batch, key=lambda document: len(document.ids)) for batch in batches]
    items = [
        {"input_ids": ids.tolist(), "labels": np.where(trained, ids, -100).tolist()}
        for batch in batches
        for ids, trained, _ in batch
    ]
    return with_trainer(model, items, each * options.micro_batch // options.batch, options)


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


def with_trainer(
    model: PreTrainedModel, items: list[dict[str, Any]], at_once: int, options: argparse.Namespace
) -> float:
    """Train by transformers' Trainer, some items a pass; return the last loss."""
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    pad = None
    if isinstance(items[0]["labels"], list):
        tokenizer = load_tokenizer(Path(options.model))
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        pad = DataCollatorForSeq2Seq(tokenizer)
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=options.batch // options.micro_batch,
            max_steps=options.steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=options.precision == "bfloat16",
            use_cpu=model.device.type == "cpu",
            torch_compile=options.compile_trainer,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=items, data_collator=pad)
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
