"""Sources of made-up texts, and their documents as a training draws them."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers.processors import TemplateProcessing

from core.data.drawing import Draw
from core.data.rows import open_rows
from core.data.samples import write_calibration_pool
from core.data.workers import Reader, Workers
from core.settings.texts import TextSource


def drawn(source, tokenizer, *, seed=0):
    """Return the texts of one pass, in the order of the seed."""
    with open_rows(source, seed=seed) as rows:
        workers = Workers([Reader(source=source, rows=rows, tokenizer=tokenizer)], 0)
        documents = list(Draw(source, 0, workers, rows=len(rows), seed=seed).one_pass())
    return [tokenizer.decode(document.ids[:-1]) for document in documents]


def documents(seed: int, count: int, words: tuple[int, int]) -> list[str]:
    """Make documents that no other call makes, of a random number of words."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(*words, count)
    return [f"{seed}:{n} " + " ".join(map(str, rng.integers(0, 10**4, size))) for n, size in enumerate(sizes)]


def text_source(path: Path, texts: list[str], weight: float = 1.0) -> TextSource:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextSource(path=str(path), weight=weight)


def pool(source: TextSource, tokenizer, path: Path, **changes) -> np.ndarray:
    """The rows of a calibration pool, of which there are as many as the call says."""
    asked = {"sequence_length": 40, "packing": False, "documents": 1000, "at_least": 1, "seed": 2} | changes
    count = write_calibration_pool(source, tokenizer, path=path / "pool", **asked)
    rows = load_file(path / "pool")["input_ids"]
    assert (rows.dtype, rows.shape) == (np.int32, (count, asked["sequence_length"]))
    return rows


def chat_source(path: Path, count: int) -> TextSource:
    rows = [{"q": f"question {n}", "a": f"answer {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextSource(path=str(path), format="instruction", prompt_fields=("q",), response_field="a")


def with_begin_token(tokenizer) -> int:
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    return begin
