"""A process that asks the hub, by the names of functions: ``python -m tests.support.hub_client FOLDER``."""

import json
import os
import sys
import time
import traceback
import urllib.request
from pathlib import Path

import huggingface_hub
import numpy as np

from core.bases.importing import import_base
from core.data.rows import open_rows, stream_rows
from core.data.samples import write_calibration_pool
from core.data.texts import iter_conversations, iter_documents
from core.errors import AdaptPrunerError
from core.model.build import load_tokenizer
from core.settings.model import ModelSettings
from core.settings.texts import TextSource
from tests.support.hub import TOKEN


def rows(path, *, seed=None, **source):
    """All rows in the order of the files, or fetched and in random order."""
    if seed is None:
        return list(stream_rows(TextSource(path=path, **source)))
    with open_rows(TextSource(path=path, **source), seed=seed) as fetched:
        return fetched.read(np.random.default_rng(seed).permutation(len(fetched)))


def few(path, most):
    with open_rows(TextSource(path=path), most_rows=most) as fetched:
        return fetched.read(range(len(fetched)))


def documents(path, **source):
    return list(iter_documents(TextSource(path=path, **source)))


def conversations(path):
    return list(iter_conversations(TextSource(path=path, format="chat", field="messages")))


def pool(path, *, tokenizer, to):
    return write_calibration_pool(
        TextSource(path=path),
        load_tokenizer(Path(tokenizer)),
        sequence_length=12,
        packing=True,
        documents=30,
        at_least=5,
        seed=3,
        path=Path(to),
    )


def base(name, *, store, revision=""):
    return import_base(ModelSettings(base=name, revision=revision), store)


def stop():
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/stop").read()
    huggingface_hub.close_session()  # which holds open connections
    time.sleep = lambda seconds: None  # the client tries again and again, for 23 s


def with_token(call, *arguments, **options):
    os.environ["HF_TOKEN"] = TOKEN
    try:
        return globals()[call](*arguments, **options)
    finally:
        del os.environ["HF_TOKEN"]


def client(folder):
    """Make the calls of ``cases.json`` one after another, and note what came of each in ``answers.json``.

    The hub's client reads HF_ENDPOINT when it is imported: this must be a process of its own.
    """
    import datasets

    # After a shuffled stream the library waits 5 s for threads that might crash the end of the process.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    answers = {}
    for name, call, arguments, options in json.loads((folder / "cases.json").read_text()):
        try:
            answers[name] = {"value": globals()[call](*arguments, **options)}
        except AdaptPrunerError as error:
            answers[name] = {"error": type(error).__name__, "text": str(error)}
        except Exception:
            answers[name] = {"error": "", "text": traceback.format_exc()}
    (folder / "answers.json").write_text(json.dumps(answers))
    os._exit(0)


if __name__ == "__main__":
    client(Path(sys.argv[1]))
