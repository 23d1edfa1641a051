"""The score engine against the straightforward way: time, memory beyond the weights, equality of the scores.

The straightforward way is full autograd (the gradients of all weights at once) and a second forward pass for
the layer similarities. Both get the same model, tokens and threads, in fresh processes that take turns. The
engine may keep some layer outputs for its backward pass, which takes more memory and less time. Run it on an
idle machine.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --model output/model --sequences 128 --repeat 3
    python benchmarks/scoring.py --device cuda --precision bfloat16 --sequences 512
"""

import argparse
import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from demo import model_folder, table_of
from rich.console import Console
from transformers import LlamaConfig, PreTrainedModel

from core.model.build import build_model, load_model
from core.model.config import layer_shapes
from core.model.families import family_of
from core.pruning.scoring.calibration import layer_similarity, measure
from core.pruning.scoring.criteria import LayerScoring
from core.pruning.scoring.statistics import Statistics

SYNTHETIC_1B = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128_256,
    tie_word_embeddings=True,
    max_position_embeddings=4096,
)
"""The sizes of Llama-3.2-1B, with random weights."""


def main() -> None:
    """Measure; print the tables, and the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(description="Measure the score engine against full autograd.")
    parser.add_argument("--model", action="append", help="checkpoint folder or synthetic-1b; may be repeated")
    parser.add_argument("--sequences", type=int, default=64, help="calibration sequences (default: 64)")
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence (default: 64)")
    parser.add_argument("--micro-batch", type=int, default=32, help="sequences per step (default: 32)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--keep-share",
        type=float,
        default=0.15,
        metavar="SHARE",
        help="memory for kept outputs, as a share of the reference's memory (default: 0.15)",
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs, of which the median counts (default: 3)")
    parser.add_argument("--worker", nargs=3, metavar=("WAY", "OUT", "KEEP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as folder:
        results = {
            Path(model).name: compare(model, arguments, Path(folder))
            for model in arguments.model or [demo_model(Path(folder))]
        }
        if not arguments.model:  # fewer tokens: the straightforward way takes 14 GB as it is
            arguments.sequences, arguments.micro_batch = arguments.sequences // 4, arguments.micro_batch // 2
            results["synthetic-1b"] = compare("synthetic-1b", arguments, Path(folder))
    figures = {
        "benchmark": "scoring",
        "cores": os.cpu_count(),
        "device": arguments.device,
        "precision": arguments.precision,
        "repeat": arguments.repeat,
        "models": results,
        **{
            name: max(result[name] for result in results.values())
            for name in ("time_ratio", "memory_ratio", "max_rel_diff")
        },
    }
    print(json.dumps(figures))


def demo_model(folder: Path) -> str:
    """Return the folder of the demo's model, unpacked below ``folder``."""
    return model_folder(None, folder).rename(folder / "SmolLM2-135M").as_posix()


def compare(model: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both ways in turns and return their medians and ratios."""
    runs: dict[str, list[dict[str, Any]]] = {"reference": [], "engine": []}
    for number in range(arguments.repeat):
        for way in ("reference", "engine") if number % 2 == 0 else ("engine", "reference"):
            out = folder / f"{way}.safetensors"
            keep = int(arguments.keep_share * runs["reference"][0]["extra_bytes"]) if runs["reference"] else 0
            command = [sys.executable, __file__, "--model", model, "--worker", way, out, str(keep)]
            for option in ("sequences", "length", "micro_batch", "precision", "device"):
                command += [f"--{option.replace('_', '-')}", getattr(arguments, option)]
            run = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
            runs[way].append(json.loads(run.stdout.splitlines()[-1]))
    seconds = {way: median(run["seconds"] for run in found) for way, found in runs.items()}
    memory = {way: median(run["extra_bytes"] for run in found) for way, found in runs.items()}
    engine = min(runs["engine"], key=lambda run: run["seconds"])
    difference = largest_difference(*(Statistics.load(folder / f"{way}.safetensors") for way in runs))
    show(Path(model).name, seconds, memory, engine, difference)
    return {
        "tokens": arguments.sequences * arguments.length,
        "reference_s": round(seconds["reference"], 2),
        "engine_s": round(seconds["engine"], 2),
        "reference_bytes": int(memory["reference"]),
        "engine_bytes": int(memory["engine"]),
        "weight_bytes": engine["weight_bytes"],
        "engine_parts_s": engine["parts_s"],
        "floor_s": round(engine["floor_s"], 2),
        "matmul_flops_per_s": round(engine["flops_per_s"]),
        "time_ratio": round(seconds["engine"] / seconds["reference"], 3),
        "memory_ratio": round(memory["engine"] / memory["reference"], 3),
        "max_rel_diff": difference,
    }


def largest_difference(reference: Statistics, engine: Statistics) -> float:
    """Return the largest relative difference of a score or a similarity."""
    pairs = [(reference.similarities, engine.similarities)]
    for a, b in zip(reference.scores, engine.scores, strict=True):
        pairs += [(getattr(a, k), getattr(b, k)) for k in ("query_heads", "kv_groups", "mlp_channels")]
    return max(((b - a).abs() / a.abs().clamp_min(1e-30)).max().item() for a, b in pairs)


def work(arguments: argparse.Namespace) -> None:
    """Measure one way in this process."""
    way, out, keep = arguments.worker
    model = open_model(arguments.model[0], getattr(torch, arguments.precision), arguments.device)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.sequences, arguments.length)
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
    run = reference if way == "reference" else functools.partial(measure, keep_bytes=int(keep))
    run(model, tokens[:1, :8], micro_batch=1)  # libraries set up what they keep
    parts = LogTimes()
    logging.getLogger("core.progress").addHandler(parts)
    logging.getLogger("core.progress").setLevel(logging.INFO)
    weights = sum(p.nbytes for p in model.parameters())
    before = reset_peak(arguments.device)
    started = time.perf_counter()
    statistics = run(model, tokens, micro_batch=arguments.micro_batch)
    seconds = time.perf_counter() - started
    extra = peak(arguments.device) - before
    statistics.save(Path(out))
    rate = matmul_rate(model, arguments.micro_batch * arguments.length)
    report = {
        "seconds": seconds,
        "extra_bytes": extra,
        "weight_bytes": weights,
        "parts_s": {**parts.seconds, "head": round(seconds - sum(parts.seconds.values()), 2)},
        "flops_per_s": rate,
        "floor_s": floor_flops(model, tokens.numel(), arguments.length) / rate,
    }
    print(json.dumps(report))


class LogTimes(logging.Handler):
    """Collects the durations of passes that the engine logs."""

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self.seconds: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Handle a line like "forward: 30 layers in 6.0 s"."""
        if record.msg.startswith("%s: %s in") and isinstance(record.args, tuple):
            self.seconds[str(record.args[0])] = round(float(str(record.args[2])), 2)


def open_model(name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Load a checkpoint or make the synthetic model, with every page of the weights in memory."""
    torch.manual_seed(0)
    if name == "synthetic-1b":
        model = build_model(SYNTHETIC_1B, dtype=dtype).to(device)
    else:
        model = load_model(Path(name), dtype=dtype, device=device)
    for parameter in model.parameters():
        parameter.data = parameter.detach().clone()
    model.tie_weights()
    return model


def reference(model: PreTrainedModel, tokens: torch.Tensor, *, micro_batch: int) -> Statistics:
    """Score a model with the gradients of all weights and a second forward pass for similarities."""
    model.requires_grad_(True)
    losses = []
    for batch in tokens.to(model.device).split(micro_batch):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
        )
        loss = loss / tokens[:, 1:].numel()
        loss.backward()
        losses.append(loss.item())
    family, shapes = family_of(model.config), layer_shapes(model.config)
    layers = list(model.get_submodule(family.layers).children())
    similarities = torch.zeros(len(layers), dtype=torch.float64)

    def compare_states(index: int, inputs: Any, output: Any) -> None:
        similarities[index] += layer_similarity(inputs[0], output).double().sum().cpu()

    hooks = [
        layer.register_forward_hook(lambda _, inputs, output, i=index: compare_states(i, inputs, output))
        for index, layer in enumerate(layers)
    ]
    with torch.no_grad():
        for batch in tokens.to(model.device).split(micro_batch):
            model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    scores = []
    for layer, shape in zip(layers, shapes, strict=True):
        scoring = LayerScoring("taylor_l1", family, shape, layer)
        scoring.add({name: (p, p.grad) for name, p in scoring.weights.items()}, tokens=tokens.numel())
        scores.append(scoring.scores())
    model.zero_grad(set_to_none=True)
    return Statistics(
        similarities=similarities / tokens.numel(),
        scores=tuple(scores),
        loss=sum(losses),
        tokens=tokens.numel(),
    )


def floor_flops(model: PreTrainedModel, tokens: int, length: int) -> float:
    """Return the operations that no exact way can avoid; a multiply-add counts as two.

    Each layer runs forward and backward, which costs two forwards; the head runs forward, and backward for
    its input only. The engine's recomputation is extra: up to one more forward of the layers.
    """
    config = model.config
    layers = model.get_submodule(family_of(config).layers)
    matrices = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    heads = sum(shape.query_heads for shape in layer_shapes(config))
    attention = 2 * heads * config.head_dim * length
    return 2.0 * tokens * (3 * (matrices + attention) + 2 * config.hidden_size * config.vocab_size)


def matmul_rate(model: PreTrainedModel, rows: int) -> float:
    """Return the operations per second of the largest layer's matrix product on this machine."""
    weight = max((p for p in model.model.layers[0].parameters() if p.dim() == 2), key=torch.numel).detach()
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    best = 0.0
    for _ in range(10):
        synchronise(weight.device)
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        synchronise(weight.device)
        best = max(best, 2.0 * rows * weight.numel() / (time.perf_counter() - started))
    return best


def synchronise(device: str | torch.device) -> None:
    """Wait until an accelerator has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: str) -> int:
    """Reset the peak memory use, and return the current use."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: str) -> int:
    """Return the peak memory use since ``reset_peak``."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return status("VmHWM")


def status(name: str) -> int:
    """Return a memory figure of this process, in bytes."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
    return int(line.split()[1]) * 1024


def show(
    name: str, seconds: dict[str, float], memory: dict[str, float], engine: dict[str, Any], difference: float
) -> None:
    """Print the measurements."""
    console = Console(highlight=False)
    table = table_of("", [name], ["seconds", "memory beyond the weights"])
    for way in ("reference", "engine"):
        table.add_row(way, f"{seconds[way]:.1f}", f"{memory[way] / 1e6:,.0f} MB")
    ratios = [figures["engine"] / figures["reference"] for figures in (seconds, memory)]
    table.add_row("ratio", *(f"{ratio:.3f}" for ratio in ratios))
    console.print(table)
    parts = ", ".join(f"{part} {value:.1f} s" for part, value in engine["parts_s"].items())
    console.print(
        f"engine: {parts}; arithmetic floor {engine['floor_s']:.1f} s at {engine['flops_per_s'] / 1e9:,.0f} "
        f"GFLOP/s; largest relative difference {difference:.1e}"
    )


if __name__ == "__main__":
    main()
