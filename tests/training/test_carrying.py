"""The optimizer's moments travel from phase to phase, cut as the weights are."""

import contextlib
import copy
import functools
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import CheckpointError, SettingsError, StorageError
from core.model.checkpoint import Checkpoint
from core.model.config import layer_shapes
from core.model.families import family_of
from core.pruning.plan import LayerPlan
from core.pruning.surgery import prune_model, prune_tensors
from core.runs.run import Run
from core.settings.recipe import settings_from_dict
from core.steps.carrying import moments_before
from core.steps.prepare_data import run_prepare_data
from core.storage.garbage import find_garbage
from core.storage.publication import find_publication, open_publication
from core.storage.store import open_store
from core.training import recover as training
from core.training.moments import StoredMoments, load_moments, write_moments
from core.training.recover import recover
from core.training.rows import Rows
from tests.support.models import CONFIGS, random_tokens, tiny
from tests.support.project import recipe_with, resolve, run_phase
from tests.support.training import training_settings

KINDS = ("exp_avg", "exp_avg_sq")
HEADS = LayerPlan(query_heads=(0, 1, 4, 5), kv_heads=(0, 2), mlp_channels=tuple(range(1, 40, 3)))
CHANNELS = LayerPlan(query_heads=tuple(range(6)), kv_heads=(0, 1, 2), mlp_channels=(0, 7, 8, 39))
GONE = LayerPlan(query_heads=(), kv_heads=(), mlp_channels=())


def train(model, *, first_step, **callbacks):
    tokens = random_tokens(rows=12, seed=first_step)
    return recover(
        model,
        Rows(tokens, torch.ones_like(tokens)),
        training_settings(weight_decay=0.1, max_grad_norm=0.5),
        first_step=first_step,
        total_steps=20,
        **callbacks,
    )


def cut_by(model, layers, **options):
    return functools.partial(
        prune_tensors, family_of(model.config), layer_shapes(model.config), layers, **options
    )


def trained(name, folder):
    """A model after a phase, and its moments."""
    model = tiny(name)
    train(model, first_step=0, hand_on=functools.partial(write_moments, folder, model))
    return model, StoredMoments(folder)


def zero_what_goes(model, layers, tensors):
    """Set to 0, in place, what a plan takes out of tensors named as the model's parameters."""
    numbers = {name: torch.arange(t.numel()).view_as(t) for name, t in tensors.items()}
    stays = {before: kept for _, before, kept in cut_by(model, layers)(numbers, numbers.__getitem__)}
    for name, tensor in tensors.items():
        mask = torch.zeros(tensor.numel(), dtype=torch.bool)
        if name in stays:
            mask[stays[name].flatten()] = True
        tensor.masked_fill_(~mask.view_as(tensor), 0)


CASES = [(name, (HEADS, CHANNELS, HEADS)) for name in CONFIGS if name != "olmo2"]
CASES += [("olmo2", (CHANNELS,) * 3), ("llama", (HEADS, GONE, CHANNELS))]


@pytest.mark.parametrize(("name", "layers"), CASES, ids=[*(name for name, _ in CASES[:-1]), "a layer goes"])
def test_cut_moments_train_as_the_whole_model_does_with_what_went_at_zero(name, layers, tmp_path):
    """Weights of 0 that only meet weights of 0 get no gradient: the large model trains as the small one."""
    large, stored = trained(name, tmp_path / "moments")
    small = copy.deepcopy(prune_model(large, layers))
    with torch.no_grad():
        zero_what_goes(large, layers, dict(large.named_parameters()))

    def masked(optimizer):
        for key, parameter in large.named_parameters():
            moments = {kind: stored[f"{kind}.{key}"].clone() for kind in ("step", *KINDS)}
            optimizer.state[parameter] = moments
        for kind in KINDS:
            moments = {key: optimizer.state[p][kind] for key, p in large.named_parameters()}
            zero_what_goes(large, layers, moments)

    carry = functools.partial(load_moments, stored, cut_by(large, layers), small)
    expected, found = train(large, first_step=3, carry=masked), train(small, first_step=3, carry=carry)
    losses = [loss for _, loss, _ in expected.losses]
    assert [loss for _, loss, _ in found.losses] == pytest.approx(losses, rel=1e-7)
    after = dict(prune_model(large, layers).named_parameters())
    for key, parameter in small.named_parameters():
        torch.testing.assert_close(parameter, after[key], rtol=1e-5, atol=1e-7, msg=key)


def test_a_model_that_was_not_cut_refuses_moments_that_were(tmp_path):
    model, stored = trained("llama", tmp_path / "moments")
    assert {stored[name].item() for name in stored if name.startswith("step.")} == {3}
    carry = functools.partial(load_moments, stored, cut_by(model, (CHANNELS,) * 3), model)
    with pytest.raises(CheckpointError, match="moments are those of another model"):
        train(model, first_step=3, carry=carry)


def test_biases_that_a_repair_adds_start_without_moments(tmp_path):
    large, stored = trained("llama", tmp_path / "moments")
    layers = (HEADS, CHANNELS, HEADS)
    small = copy.deepcopy(prune_model(large, layers, biased=True))
    kept = []

    def carry(optimizer):
        load_moments(stored, cut_by(large, layers, biased=True), small, optimizer)
        kept.extend(name for name, p in small.named_parameters() if p not in optimizer.state)

    train(small, first_step=3, carry=carry)
    assert len(kept) == 6
    assert all(name.endswith(("o_proj.bias", "down_proj.bias")) for name in kept)


def lacks(tensors):
    return {key: tensor for key, tensor in tensors.items() if "layers.1.mlp.up_proj" not in key}


def other_shape(tensors):
    return tensors | {"exp_avg.model.norm.weight": torch.zeros(3)}


@pytest.mark.parametrize("damage", [lacks, other_shape])
def test_moments_that_do_not_fit_are_refused(damage, tmp_path):
    model, _ = trained("llama", tmp_path / "moments")
    path = tmp_path / "moments" / "moments-00001.safetensors"
    save_file(damage(load_file(path)), path, metadata={"format": "1"})
    whole = (LayerPlan(query_heads=tuple(range(6)), kv_heads=(0, 1, 2), mlp_channels=tuple(range(40))),) * 3
    carry = functools.partial(load_moments, StoredMoments(tmp_path / "moments"), cut_by(model, whole), model)
    with pytest.raises(CheckpointError, match=r"another model: model\.(norm|layers\.1)"):
        train(model, first_step=3, carry=carry)


def test_moments_of_a_newer_format_are_refused(tmp_path):
    save_file({"step.x": torch.ones(1)}, tmp_path / "moments-00001.safetensors", metadata={"format": "2"})
    with pytest.raises(CheckpointError, match="format '2', not 1"):
        StoredMoments(tmp_path)


def test_slicegpt_is_refused():
    recipe = recipe_with(
        {"training.optimizer_state": "carry", "prune.method": "slicegpt", "prune.amplitude": 0.0}
    )
    recipe["prune"] |= {"phases": 1}
    with pytest.raises(SettingsError, match=r"training\.optimizer_state=carry does not go with"):
        settings_from_dict(recipe)


@pytest.fixture
def begun(project, tmp_path, monkeypatch):
    """Begins, or takes up, a run of three phases that carries; returns its handle, base and data."""
    monkeypatch.chdir(project)

    def begin(store="store", **changes):
        recipe = recipe_with(
            {
                "prune.phases": 3,
                "training.tokens": "1920",
                "training.optimizer_state": "carry",
                "training.save_every": "1 steps",
                "storage.store": str(tmp_path / store),
            }
            | {name.replace("__", "."): value for name, value in changes.items()}
        )
        handle, base_uri = resolve(recipe)
        return handle, base_uri, run_prepare_data(run=handle, base_uri=base_uri)

    return begin


def moments_of(handle, phase):
    published = find_publication(Run.load(handle).phase_uri(phase, "moments"))
    return None if published is None else StoredMoments(published.fetch(Path("unused")))


def test_moments_lie_in_the_store_until_the_next_phase_has_trained(begun, tmp_path):
    handle, uri, data_uri = begun()
    uri = run_phase(handle, 1, uri, data_uri, tmp_path / "work")
    steps = {moments_of(handle, 1)[name].item() for name in moments_of(handle, 1) if "step." in name}
    assert steps == {1}
    uri = run_phase(handle, 2, uri, data_uri, tmp_path / "work")
    assert moments_of(handle, 1) is None
    second = moments_of(handle, 2)
    assert {second[name].item() for name in second if name.startswith("step.")} == {1 + 3}
    with Checkpoint(open_publication(uri).fetch(tmp_path / "fetched")).weights() as reader:
        for name in reader.names():
            assert list(second[f"exp_avg.{name}"].shape) == reader.shape(name)
    # A run that nobody works on: clean leaves what the next phase needs, and takes what lies beside it.
    stray = Path(Run.load(handle).phase_uri(2, "moments"), "stray.safetensors")
    stray.touch()
    Run.load(handle).release()
    garbage = find_garbage(open_store(Run.load(handle).store)).garbage
    assert [
        file.key.rsplit("/")[-1] for piece in garbage for file in piece.files if "moments" in file.key
    ] == ["stray.safetensors"]
    run_phase(handle, 3, uri, data_uri, tmp_path / "work")
    assert [moments_of(handle, phase) for phase in (1, 2, 3)] == [None] * 3


class KilledError(Exception):
    pass


def results(begin, folder, *, kills=(), **changes):
    """Run all phases; ``kills`` are the training steps at which the process is gone once.

    Returns each phase's digest, and its losses.
    """
    kills, handle = list(kills), None
    plain = training._train_step

    def killed(*arguments):
        if kills and arguments[-1].startswith(f"step {kills[0]} "):
            kills.pop(0)
            raise KilledError
        return plain(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_train_step", killed)
        for _ in range(len(kills) + 1):
            with contextlib.suppress(KilledError):
                handle, uri, data_uri = begin(**changes)
                for phase in (1, 2, 3):
                    uri = run_phase(handle, phase, uri, data_uri, folder / "work")
    assert not kills
    run = Run.load(handle)
    found = [open_publication(run.phase_uri(phase, "recovered")) for phase in (1, 2, 3)]
    return [each.digest for each in found], [each.read_json("report.json")["losses"] for each in found]


@pytest.mark.slow
def test_a_run_that_carries_and_is_killed_in_each_phase_is_the_same_to_the_last_bit(begun, tmp_path):
    undisturbed = results(begun, tmp_path, store="undisturbed")
    assert results(begun, tmp_path, store="killed", kills=(1, 2, 4, 5, 7)) == undisturbed
    _, reset = results(begun, tmp_path, store="reset", training__optimizer_state="reset")
    assert [a == b for a, b in zip(undisturbed[1], reset, strict=True)] == [True, False, False]


@pytest.mark.slow
def test_a_phase_whose_moments_are_gone_is_trained_again(begun, tmp_path, caplog):
    handle, uri, data_uri = begun()
    for phase in (1, 2):
        uri = run_phase(handle, phase, uri, data_uri, tmp_path / "work")
    run = Run.load(handle)
    digests = [open_publication(run.phase_uri(phase, "recovered")).digest for phase in (1, 2)]
    shutil.rmtree(run.phase_uri(2, "moments"))
    with pytest.raises(StorageError, match="moments is gone, and phase 3 trains with it"):
        moments_before(run, 3)
    with caplog.at_level(logging.INFO):
        handle, uri, data_uri = begun()
    assert "02/recovered was dropped, and is needed again" in caplog.text
    assert "01/recovered was dropped, and is needed again" in caplog.text, "phase 2 starts with its moments"
    for phase in (1, 2, 3):
        uri = run_phase(handle, phase, uri, data_uri, tmp_path / "again")
    assert [open_publication(run.phase_uri(phase, "recovered")).digest for phase in (1, 2)] == digests
