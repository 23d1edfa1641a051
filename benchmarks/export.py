"""Cost of an export against writing as many bytes: a random Llama, a billion parameters, unequal layers.

Each round exports in every format. After each export it writes a file of the same size from memory; both are
timed until the bytes are on the disk. The ratio is the median over the rounds. The sizes are close to those
of Llama-3.2-1B, with bfloat16 weights. Needs 10 GB of disk.

    python benchmarks/export.py --companions output/demo/base
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from demo import parser_for, table_of
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig

from core.export.exported import Exported
from core.export.gguf import export_gguf
from core.export.padded import export_padded
from core.model.checkpoint import write_checkpoint
from core.model.config import config_with_layers
from core.model.shape import LayerShape

HIDDEN, HEAD_DIM, VOCABULARY = 2048, 64, 128_256
LAYERS = tuple(
    LayerShape(query_heads=32 - 4 * (i % 3), kv_heads=8 - i % 3, mlp_width=8192 - 32 * i) for i in range(16)
)
BLOCK = 64 * 2**20
FORMATS: dict[str, Callable[[Path, Path], Exported]] = {
    "gguf bf16": lambda source, output: export_gguf(source, output, dtype="bf16"),
    "gguf f16": lambda source, output: export_gguf(source, output, dtype="f16"),
    "gguf q8_0": lambda source, output: export_gguf(source, output, dtype="q8_0"),
    "gguf f32": lambda source, output: export_gguf(source, output, dtype="f32"),
    "padded": export_padded,
}


def parts() -> Iterator[dict[str, Tensor]]:
    """Make the weights, one layer at a time."""
    pool = (torch.randn(VOCABULARY * HIDDEN) * 0.02).to(torch.bfloat16)

    def take(*shape: int) -> Tensor:
        return pool[: torch.Size(shape).numel()].view(shape).clone()

    for index, layer in enumerate(LAYERS):
        queries, keys = layer.query_heads * HEAD_DIM, layer.kv_heads * HEAD_DIM
        weights = {
            "self_attn.q_proj": (queries, HIDDEN),
            "self_attn.k_proj": (keys, HIDDEN),
            "self_attn.v_proj": (keys, HIDDEN),
            "self_attn.o_proj": (HIDDEN, queries),
            "mlp.gate_proj": (layer.mlp_width, HIDDEN),
            "mlp.up_proj": (layer.mlp_width, HIDDEN),
            "mlp.down_proj": (HIDDEN, layer.mlp_width),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        yield {f"model.layers.{index}.{name}.weight": take(*shape) for name, shape in weights.items()}
    yield {"model.embed_tokens.weight": take(VOCABULARY, HIDDEN), "model.norm.weight": take(HIDDEN)}


def make_checkpoint(folder: Path, companions: Path) -> None:
    """Write the random checkpoint."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=len(LAYERS),
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    config = config_with_layers(config, LAYERS)
    write_checkpoint(folder, config, parts(), len(LAYERS) + 1, companions=companions, provenance={})


def export_seconds(name: str, source: Path, output: Path) -> tuple[float, int]:
    """Return the seconds an export takes, and the bytes it writes."""
    start = time.perf_counter()
    exported = FORMATS[name](source, output)
    seconds = time.perf_counter() - start
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink()
    return seconds, exported.size_bytes


def write_seconds(size_bytes: int, path: Path) -> float:
    """Return the seconds it takes to write this many bytes from memory."""
    block = os.urandom(2**20) * (BLOCK // 2**20)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size_bytes // BLOCK):
            file.write(block)
        file.write(block[: size_bytes % BLOCK])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def main() -> None:
    """Measure; print a table and one JSON object."""
    parser = parser_for(__doc__)
    parser.add_argument("--companions", type=Path, required=True, help="checkpoint whose tokenizer is copied")
    parser.add_argument("--rounds", type=int, default=3, help="exports per format")
    parser.add_argument("--work", type=Path, help="folder to write to (default: a temporary one)")
    arguments = parser.parse_args()
    console = Console(stderr=True, highlight=False)
    pairs: dict[str, list[tuple[float, float, int]]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="adapt-pruner-") as scratch:
        folder = Path(scratch)
        make_checkpoint(folder / "model", arguments.companions)
        for turn in range(arguments.rounds):
            for name in FORMATS:
                seconds, size = export_seconds(name, folder / "model", folder / "exported")
                plain = write_seconds(size, folder / "plain")
                pairs.setdefault(name, []).append((seconds, plain, size))
                console.print(f"round {turn + 1}: {name} {seconds:.1f} s, writing alone {plain:.1f} s")
    table = table_of("", ["format"], ["bytes", "export, s", "writing, s", "ratio"])
    ratios = {}
    for name, rounds in pairs.items():
        ratios[name] = statistics.median(seconds / plain for seconds, plain, _ in rounds)
        medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
        table.add_row(
            name, f"{medians[2]:,}", f"{medians[0]:.2f}", f"{medians[1]:.2f}", f"{ratios[name]:.2f}"
        )
    console.print(table)
    print(json.dumps({"write_ratio": {name: round(ratio, 3) for name, ratio in ratios.items()}}))


if __name__ == "__main__":
    main()
