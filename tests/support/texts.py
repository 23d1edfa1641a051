"""The documents of a source as a training draws them."""

from core.data.drawing import Draw
from core.data.rows import open_rows
from core.data.workers import Reader, Workers


def drawn(source, tokenizer, *, seed=0):
    """Return the texts of one pass, in the order of the seed."""
    with open_rows(source, seed=seed) as rows:
        workers = Workers([Reader(source=source, rows=rows, tokenizer=tokenizer)], 0)
        documents = list(Draw(source, 0, workers, rows=len(rows), seed=seed).one_pass())
    return [tokenizer.decode(document.ids[:-1]) for document in documents]
