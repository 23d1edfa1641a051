"""How fast a model writes its own calibration text, with keys and values in place and copied for each token.

    python benchmarks/writing.py [--model DIRECTORY] [--length 512] [--at-once 16 128] [--rounds 3]

Both ways write the same sequences in turn, by the same draws. The last line is one JSON object: for each
number of sequences at once the tokens per second and the peak memory of both ways, the ratio of their speeds,
and the share of tokens that are the same (a product in another order may turn a close draw).
"""

import itertools
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from demo import model_folder, parser_for, peak_bytes, restart_peak, table_of
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.model.build import load_model, load_tokenizer, pick_device
from core.pruning import self_calibration
from core.pruning.self_calibration import write_text

COPIED, RESERVED = "copied", "reserved"


def main() -> None:
    """Measure; print the table, and the figures as JSON in the last line."""
    parser = parser_for(__doc__)
    parser.add_argument("--model", help="checkpoint folder; default: the demo's model")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence (default: 512)")
    parser.add_argument("--at-once", type=int, nargs="+", default=[16, 128], help="default: 16 128")
    parser.add_argument("--rounds", type=int, default=3, help="times that each way is measured (default: 3)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = model_folder(arguments.model, Path(scratch))
        tokenizer = load_tokenizer(directory)
        model = load_model(directory, dtype=torch.float32, device=pick_device())
    figures = ["at once", "tokens/s", "MB beyond the weights", "faster by", "same tokens"]
    table = table_of(f"{arguments.length} tokens a sequence", ["keys and values"], figures)
    found = {}
    for at_once in arguments.at_once:
        speeds: dict[str, list[float]] = {COPIED: [], RESERVED: []}
        memory, texts = {}, {}
        for _, way in itertools.product(range(arguments.rounds), speeds):
            texts[way], seconds, memory[way] = written(way, model, tokenizer, at_once, arguments.length)
            speeds[way].append(texts[way].numel() / seconds)
        rates = {way: median(values) for way, values in speeds.items()}
        ratio = rates[RESERVED] / rates[COPIED]
        same = (texts[RESERVED] == texts[COPIED]).double().mean().item()
        for way, rate in rates.items():
            last = (f"{ratio:.2f}", f"{same:.1%}") if way == RESERVED else ("", "")
            table.add_row(way, str(at_once), f"{rate:.1f}", f"{memory[way] / 1e6:,.0f}", *last)
        found[at_once] = {"tokens_per_s": rates, "bytes": memory, "speed_ratio": ratio, "same_tokens": same}
    Console(highlight=False).print(table)
    print(json.dumps({"length": arguments.length, "at_once": found}))


def written(
    way: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, at_once: int, length: int
) -> tuple[Tensor, float, int]:
    """Return (S, T) tokens, the seconds that writing them took, and the memory that it took more."""
    restart_peak()
    before, started = peak_bytes(), time.perf_counter()
    asked = {"sequences": at_once, "length": length, "batch": at_once, "seed": 0}
    if way == RESERVED:
        text = write_text(model, tokenizer, **asked)
    else:
        with patch.object(self_calibration, "_reserve"):  # what transformers returns stays as it is
            text = write_text(model, tokenizer, **asked)
    return text, time.perf_counter() - started, peak_bytes() - before


if __name__ == "__main__":
    main()
