"""A small store of a run that was stopped while phase 2 trained, as a file that later versions must resume.

``python -m tests.support.old_store tests/stores/format-1.tar.xz`` writes it. Do so for a new format only,
beside the old ones: each file stands for the stores that people have.
"""

import contextlib
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

from tests.support.project import evaluate, make_project, recipe_with, resolve, run_phase

RECIPE = recipe_with(
    {
        "model.dtype": "bfloat16",
        "prune.target": "90%",
        "training.tokens": "2304",
        "training.save_every": "1 steps",
        "training.precision": "auto",
    }
)
"""Twelve optimizer steps in two phases."""

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


SAVED = 3 + 2
"""States that are saved: between the four steps of phase 1, and two in phase 2."""


class StoppedError(Exception):
    """Ends the training."""


def write_store(folder, tokenizer):
    """Begin the recipe in ``folder``, and stop in phase 2 when two states of its training were saved."""
    from core.training.resume import SavedStates

    make_project(folder, tokenizer, sizes=SIZES)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    save, saved = SavedStates.save, []

    def stop(states, *given):
        if len(saved) == SAVED:
            raise StoppedError
        save(states, *given)
        states._publisher.submit(int).result()
        saved.append(states)

    with contextlib.chdir(folder), contextlib.suppress(StoppedError):
        from core.steps.prepare_data import run_prepare_data

        SavedStates.save = stop
        try:
            run, base_uri = resolve(RECIPE, job="old")
            data_uri = run_prepare_data(run=run, base_uri=base_uri)
            evaluate(run, 0, base_uri, data_uri, folder / "artifacts")
            checkpoint = run_phase(run, 1, base_uri, data_uri, folder / "artifacts")
            run_phase(run, 2, checkpoint, data_uri, folder / "artifacts")
        finally:
            SavedStates.save = save


def main(path):
    from tests.conftest import define_tokenizer, tokenizer_of

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "project")
        write_store(folder, tokenizer_of(define_tokenizer()))
        with tarfile.open(path, "w:xz") as archive:
            for name in ("base", "held-out.txt", "recipe.json", "store"):
                archive.add(folder / name, name)


if __name__ == "__main__":
    main(*sys.argv[1:])
