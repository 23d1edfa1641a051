"""What a phase learns reaches the next one unrounded; what leaves the run has the format asked for."""

import contextlib
import shutil

import pytest
import torch

from core.model.build import load_model
from core.model.checkpoint import Checkpoint, save_model
from core.model.config import load_config
from core.runs.run import Run
from core.steps.prepare_data import run_prepare_data
from core.storage.publication import open_publication
from tests.support.project import recipe_with, resolve, run_phase

PLACES = [(1, "pruned"), (1, "recovered"), (2, "pruned"), (2, "recovered")]
RATE = 1e-4


@pytest.fixture
def half(tmp_path, project):
    """A project whose base model is in bfloat16."""
    folder = shutil.copytree(project, tmp_path / "project")
    network = load_model(Checkpoint(folder / "base"), dtype=torch.bfloat16)
    save_model(network, folder / "half", companions=folder / "base", provenance={})
    return folder


def checkpoints(folder, scratch, **changes):
    """Run two phases; return each checkpoint as its tensors by name."""
    settings = {
        "model.base": "half",
        "prune.repair": "none",
        "training.learning_rate": RATE,
        "training.min_learning_rate": RATE,
        "storage.keep": "all",
    }
    with contextlib.chdir(folder):
        handle, base_uri = resolve(recipe_with(settings | changes))
        data_uri = run_prepare_data(run=handle, base_uri=base_uri)
        uri = base_uri
        for phase in (1, 2):
            uri = run_phase(handle, phase, uri, data_uri, scratch)
        run = Run.load(handle)
        folders = {
            (phase, step): open_publication(run.phase_uri(phase, step)).fetch(scratch / f"{step}{phase}")
            for phase, step in PLACES
        }
    found = {}
    for place, path in folders.items():
        with Checkpoint(path).weights() as reader:
            found[place] = {name: reader.tensor(name).clone() for name in reader.names()}
        assert {load_config(path).dtype} == {tensor.dtype for tensor in found[place].values()}
    return found


def is_rounded(tensors):
    return all(torch.equal(it, it.bfloat16().to(it.dtype)) for it in tensors.values())


def test_what_a_phase_learns_reaches_the_next_unrounded(half, tmp_path):
    found = checkpoints(half, tmp_path)
    formats = [next(iter(found[place].values())).dtype for place in PLACES]
    assert formats == [torch.float32] * 3 + [torch.bfloat16]
    assert is_rounded(found[1, "pruned"])
    learned, next_phase = found[1, "recovered"], found[2, "pruned"]
    assert not is_rounded(learned)
    whole = [name for name in learned if learned[name].shape == next_phase[name].shape]
    assert len(whole) > 9
    assert all(torch.equal(learned[name], next_phase[name]) for name in whole)


def test_rounding_between_phases_is_what_earlier_versions_did(half, tmp_path):
    found = checkpoints(half, tmp_path, **{"model.dtype_between_phases": "same"})
    assert {tensor.dtype for place in PLACES for tensor in found[place].values()} == {torch.bfloat16}


def test_a_repair_is_rounded_by_the_final_checkpoint_alone(half, tmp_path):
    changes = {"training.tokens": "0", "training.sources": [], "prune.repair": "ridge"}
    with contextlib.chdir(half):
        handle, base_uri = resolve(recipe_with({"model.base": "half", "storage.keep": "all"} | changes))
        data_uri = run_prepare_data(run=handle, base_uri=base_uri)
        uri, formats = base_uri, []
        for phase in (1, 2):
            uri = run_phase(handle, phase, uri, data_uri, tmp_path)
            formats.append(Checkpoint(open_publication(uri).fetch(tmp_path / f"p{phase}")).dtype)
    assert formats == [torch.float32, torch.bfloat16]


def test_a_base_that_another_run_wrote_between_its_phases_keeps_its_own_format(half, tmp_path):
    """Its provenance says what the other run's final checkpoint is."""
    network = load_model(Checkpoint(half / "half"), dtype=torch.float32)
    provenance = {"run": "another", "final_dtype": "bfloat16"}
    save_model(network, half / "wide", companions=half / "half", provenance=provenance)
    found = checkpoints(half, tmp_path, **{"model.base": "wide"})
    assert {tensor.dtype for tensor in found[2, "recovered"].values()} == {torch.float32}
