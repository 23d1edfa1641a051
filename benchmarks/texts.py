"""How fast prepare-data turns texts into packed rows, and in how much memory.

Texts and conversations are generated, of two sizes each; each is mixed, tokenized and packed whole by
``write_slices``, in a process of its own. Speed is megabytes of text a second of CPU time, all processes
together, which other work on the machine changes little. Memory is the largest sum over all processes of what
they hold for themselves (RssAnon): files that are mapped do not count, as the system takes that memory back.

The last line is a JSON object: MB per CPU second, peak memory in MB and their growth from the smaller to the
larger size, by kind. Linux only.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from core.data.mixture import write_slices
from core.settings.texts import TextSource

_ROW_CHARS = 2_000
_LENGTH = 1_024
_VOCABULARY = 8_000


def main() -> None:
    """Measure; print the table, and the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--megabytes", type=int, nargs=2, default=(20, 100), help="the smaller and the larger size"
    )
    parser.add_argument("--processes", type=int, default=2, help="processes that tokenize")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; without, one is trained")
    parser.add_argument(
        "--work", nargs=4, metavar=("KIND", "FILE", "MB", "TOKENIZER"), help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    if given.work:
        _prepare(*given.work, given.processes)
        return
    figures: dict[str, Any] = {"mb_per_cpu_s": {}, "mb_per_s": {}, "peak_mb": {}, "growth_mb": {}}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = given.tokenizer or _trained_tokenizer(Path(folder))
        for kind in ("texts", "conversations"):
            peaks = []
            for megabytes in given.megabytes:
                file = Path(folder) / "rows.jsonl"
                written = _generate(kind, file, megabytes)
                start, cpu = time.monotonic(), _cpu_s()
                command = ["--work", kind, str(file), str(megabytes), str(tokenizer)]
                peak, packed = _peak([*command, "--processes", str(given.processes)])
                seconds, cpu = time.monotonic() - start, _cpu_s() - cpu
                peaks.append(peak)
                print(
                    f"{kind:14} {written:7.1f} MB  {written / cpu:5.2f} MB/CPU s  "
                    f"{written / seconds:5.2f} MB/s  peak {peak:5.0f} MB  {packed}",
                    flush=True,
                )
            figures["mb_per_cpu_s"][kind] = round(written / cpu, 2)
            figures["mb_per_s"][kind] = round(written / seconds, 2)
            figures["peak_mb"][kind] = round(peaks[-1])
            figures["growth_mb"][kind] = round(peaks[-1] - peaks[0])
    print(json.dumps({**figures, "megabytes": list(given.megabytes), "processes": given.processes}))


def _generate(kind: str, file: Path, megabytes: int) -> float:
    """Write rows of prose about Python; return the megabytes of text."""
    rng, words = random.Random(0), " ".join(topics.values()).split()
    written = 0
    with file.open("w") as out:
        while written < megabytes * 10**6:
            start = rng.randrange(len(words) - 1_000)
            size = rng.randint(_ROW_CHARS // 8, 2 * _ROW_CHARS)
            text = f"{rng.random()} " + " ".join(words[start : start + size // 6])
            row: dict[str, Any] = {"text": text}
            if kind == "conversations":
                parts = [text[n : n + 500] for n in range(0, len(text), 500)]
                roles = ["user", "assistant"] * len(parts)
                row = {"messages": [{"role": r, "content": c} for r, c in zip(roles, parts, strict=False)]}
            written += len(text)
            out.write(json.dumps(row) + "\n")
    return written / 1e6


def _trained_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(topics.values(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def _prepare(kind: str, file: str, megabytes: str, tokenizer: str, processes: int) -> None:
    """Pack about as many tokens as the file holds; the process of its own."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    with open(file) as rows:
        head = [json.loads(next(rows)) for _ in range(200)]
    sample = [row.get("text") or "".join(m["content"] for m in row["messages"]) for row in head]
    a_token = sum(map(len, sample)) / sum(len(ids) for ids in loaded(sample)["input_ids"])
    sequences = int(int(megabytes) * 1e6 / a_token / _LENGTH)
    chat: dict[str, Any] = {"format": "chat", "field": "messages"} if kind == "conversations" else {}
    with tempfile.TemporaryDirectory() as out:
        report = write_slices(
            [TextSource(path=file, **chat)],
            loaded,
            sequence_length=_LENGTH,
            sequences=[sequences],
            packing="whole",
            seed=0,
            directory=Path(out),
            processes=processes,
        )
    source = report.sources[0]
    print(f"{report.tokens:,} tokens, {100 * report.padding:.2f} % padding, {source.passes} passes")


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _peak(arguments: list[str]) -> tuple[float, str]:
    """Run this program; return the largest sum of its processes' own memory, in MB, and its last line."""
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(map(_own_mb, _tree(process.pid))))
        time.sleep(0.2)
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit(f"the measured process ended with status {process.returncode}")
    return peak, process.stdout.read().splitlines()[-1]


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue  # it has ended
    return found


def _own_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")) / 1e3


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
