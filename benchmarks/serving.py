"""Speed of a pruned model compared with its reduction in parameters.

Prunes the demo's model to 80 % of its parameters with the default settings, once for each multiple that MLP
widths are rounded to. Measures prompts and decoding of the pruned and the dense model in turn, in PyTorch and
in llama.cpp. The share is the speedup of decoding at batch 1, divided by the reduction in parameters (a 1.2x
speedup with 1.25x fewer parameters is 0.96). Takes half an hour on a laptop; --multiples and --rounds shorten
it. --work keeps the models.

    python benchmarks/serving.py
    python benchmarks/serving.py --multiples 32 --rounds 3
"""

import argparse
import dataclasses
import json
from pathlib import Path

from demo import DEMO, parser_for, table_of
from rich.console import Console

from core.evaluation.speed.workload import Workload
from core.export.gguf_quantization import GgufDtype
from core.runs.record import SpeedRecord
from core.runs.run import Run
from core.settings.evaluation import EvaluationSettings
from core.settings.prune import PruneSettings
from core.settings.schema import Settings
from core.settings.storage import StorageSettings, TrackingSettings
from core.settings.training import TrainingSettings
from core.steps.speed import compare_speed
from core.storage.publication import open_publication
from pipelines.commands.benchmark import params_of, speed_table
from pipelines.local.run import run_local

GGUF_DTYPES: tuple[GgufDtype, ...] = ("f32", "f16", "q8_0")


def settings_of(multiple: int, target: str, work: Path) -> Settings:
    """Return the demo's recipe, without training and evaluation."""
    return dataclasses.replace(
        DEMO,
        prune=PruneSettings(target=target, phases=1, width_multiple=multiple),
        training=TrainingSettings(),
        evaluation=EvaluationSettings(),
        storage=StorageSettings(store=str(work / "store")),
        tracking=TrackingSettings(),
    )


def pruned(multiple: int, arguments: argparse.Namespace, console: Console) -> tuple[Path, Path]:
    """Return the folders of the dense model and of the one with widths in multiples of ``multiple``."""
    folder: Path = arguments.work
    settings = settings_of(multiple, arguments.target, folder)
    finished = run_local(settings, folder / f"multiple-{multiple}", console)
    run = Run.load({"store": finished.store, "key": finished.key})
    return open_publication(run.base_uri).fetch(folder), open_publication(run.uri("final")).fetch(folder)


def rows_of(multiple: int, arguments: argparse.Namespace, console: Console) -> list[dict[str, object]]:
    """Measure one pruned model; return a row for each runtime and number format."""
    base, checkpoint = pruned(multiple, arguments, console)
    params = (params_of(base), params_of(checkpoint))
    workload = Workload(
        rounds=arguments.rounds,
        threads=arguments.threads,
        new_tokens=arguments.new_tokens,
        dtype="float32",
    )
    console.rule(f"widths are multiples of {multiple}")
    found = [("float32", *compare_speed(base, checkpoint, workload, runtimes=["torch"]))]
    for dtype in GGUF_DTYPES:
        speed = compare_speed(base, checkpoint, workload, runtimes=["llama.cpp"], gguf_dtype=dtype)
        found.append((dtype, *speed))
    rows = []
    for dtype, record in found:
        console.print(f"[bold]{dtype}")
        console.print(speed_table(record, params))
        rows.append(row_of(multiple, dtype, record, params))
    return rows


def row_of(multiple: int, dtype: str, record: SpeedRecord, params: tuple[int, int]) -> dict[str, object]:
    """Return the row of one comparison."""
    ratio = params[0] / params[1]
    return {
        "width_multiple": multiple,
        "runtime": record.runtime,
        "dtype": dtype,
        "params": params,
        "params_ratio": round(ratio, 4),
        **{f"speedup {job}": round(value, 4) for job, value in record.speedups.items()},
        "share": round(record.speedups["decode 1"] / ratio, 4),
        "pruned_tokens_per_s": round(record.tokens_per_s["decode 1"][1], 2),
        "memory_ratio": round(record.memory_bytes[0] / record.memory_bytes[1], 4),
    }


def main() -> None:
    """Prune and measure; print a table and one JSON object."""
    parser = parser_for(__doc__)
    parser.add_argument("--target", default="80%", help="size after pruning (default: 80%%)")
    parser.add_argument(
        "--multiples",
        type=int,
        nargs="+",
        default=[1, 8, 32, 64],
        help="multiples that MLP widths are rounded to",
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds of measurement")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded after a prompt of 128")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: physical cores)")
    parser.add_argument("--work", type=Path, default=Path("output/serving"), help="for the pruned models")
    arguments = parser.parse_args()
    console = Console(stderr=True, highlight=False)
    rows = [row for multiple in arguments.multiples for row in rows_of(multiple, arguments, console)]
    headers = ("parameters", "reduction", "speedup", "share", "tokens/s")
    table = table_of("Decoding at batch 1", ["widths", "runtime", "weights"], headers)
    for row in rows:
        names = ("width_multiple", "runtime", "dtype")
        figures = ("params_ratio", "speedup decode 1", "share", "pruned_tokens_per_s")
        table.add_row(
            *(str(row[name]) for name in names),
            f"{row['params'][1]:,}",
            *(str(row[name]) for name in figures),
        )
    console.print(table)
    # The default of the settings, or else the last one requested.
    default = PruneSettings().width_multiple
    shown = default if default in arguments.multiples else arguments.multiples[-1]
    shares = {(row["runtime"], row["dtype"]): row["share"] for row in rows if row["width_multiple"] == shown}
    print(
        json.dumps(
            {
                "width_multiple": shown,
                "torch_speedup_share": shares["torch", "float32"],
                "llama_cpp_speedup_share": shares["llama.cpp", "f16"],
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
