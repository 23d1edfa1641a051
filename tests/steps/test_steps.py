"""The steps of a run, called in this process: keys, exact sizes, what is kept."""

import collections
import contextlib
import dataclasses
import itertools
import json
import shutil
import uuid
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.evaluation.items import read_items
from core.model.build import load_model
from core.model.checkpoint import CheckpointReader, save_model
from core.runs.gathering import collect_record
from core.runs.run import Run
from core.steps.finalize import run_finalize
from core.steps.needs_run import run_needs_run
from core.steps.prepare_data import run_prepare_data
from core.steps.publish import run_publish
from core.storage.publication import find_publication, open_publication
from core.storage.store import LocalStore, open_store
from tests.support.project import (
    CHANNEL_PARAMS,
    NO_TRAINING,
    Artifact,
    evaluate,
    kept_groups,
    recipe_with,
    resolve,
    run_all,
    run_phase,
)


def test_the_key_follows_from_what_can_change_the_result(project, tmp_path):
    def key(changes):
        with contextlib.chdir(project):
            return resolve(recipe_with(changes | {"storage.store": str(tmp_path / uuid.uuid4().hex)}))[0][
                "key"
            ]

    first = key({})
    assert key({"name": "another", "storage.keep": "all", "tracking.model_name": "m"}) == first
    others = [key({"seed": 8}), key({"prune.target": "70%"}), key({"prune.phases": 3})]
    assert len({first, *others}) == 4


def test_a_run_that_starts_again_takes_up_the_settings_outside_its_key(project, tmp_path):
    store = {"storage.store": str(tmp_path / "store")}
    with contextlib.chdir(project):
        resolve(recipe_with(store | {"name": "first", "tracking.model_name": "wrong"}))
        handle, _ = resolve(recipe_with(store | {"name": "second"}))
    settings = Run.load(handle).settings
    assert (settings.name, settings.tracking.model_name) == ("second", "")


@pytest.mark.parametrize(
    ("wanted", "format_"),
    [("auto", torch.bfloat16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)],
)
def test_checkpoints_say_the_number_format_of_their_weights(project, tmp_path, monkeypatch, wanted, format_):
    folder = shutil.copytree(project, tmp_path / "project")
    base = folder / "base"
    half = load_model(base, dtype=torch.bfloat16)
    save_model(half, folder / "half", companions=base, provenance={})
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    recipe = recipe_with(
        {"model.base": "half", "model.dtype": wanted, "prune.phases": 1, "storage.keep": "all"}
    )
    with contextlib.chdir(folder):
        handle, base_uri = resolve(recipe)
        run_phase(handle, 1, base_uri, run_prepare_data(run=handle, base_uri=base_uri), tmp_path)
        run = Run.load(handle)
        checkpoints = [
            open_publication(run.phase_uri(1, step)).fetch(tmp_path / step)
            for step in ("pruned", "recovered")
        ]
    for checkpoint, written in zip(checkpoints, (torch.float32, format_), strict=True):
        with CheckpointReader(checkpoint) as reader:
            assert {reader.tensor(name).dtype for name in reader.names()} == {written}
        stock = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
        assert {p.dtype for p in stock.parameters()} == {written}


PRUNE_ONLY = NO_TRAINING | {"prune.phases": 3, "seed": 3}


@pytest.fixture(scope="module")
def pruned_only(project, tmp_path_factory):
    """Runs of three phases without training, by their attention unit, target and steps a phase."""
    runs = {}

    def run(unit, target, steps_per_phase):
        if unit not in runs:
            folder = tmp_path_factory.mktemp("pruned-only")
            changes = {
                "prune.attention_unit": unit,
                "prune.target": target,
                "prune.steps_per_phase": steps_per_phase,
                "prune.repair": "none",
                "storage.store": str(folder / "store"),
                "storage.keep": "all",
            }
            if unit == "none":  # the same result from layers and layer inputs that lie on disk
                changes |= {"calibration.weights": "streamed", "calibration.state_memory": "0"}
            with contextlib.chdir(project):
                handle, final = run_all(recipe_with(PRUNE_ONLY | changes), folder)
            runs[unit] = Run.load(handle), Path(final)
        return runs[unit]

    return run


@pytest.mark.parametrize(
    ("unit", "target", "steps_per_phase"),
    [("kv_group", "75%", 3), ("query_head", "82%", 1), ("none", "85%", 2)],
)
def test_without_training_the_result_is_cut_out_of_the_base_model(
    pruned_only, project, unit, target, steps_per_phase
):
    run, final = pruned_only(unit, target, steps_per_phase)
    base, model = load_model(project / "base"), load_model(final)
    wanted = float(target.rstrip("%")) / 100 * sum(p.numel() for p in base.parameters())
    assert abs(sum(p.numel() for p in model.parameters()) - wanted) <= CHANNEL_PARAMS / 2
    head_dim, weights = base.config.head_dim, dict(base.named_parameters())
    for index, (query, kv, channels) in enumerate(kept_groups(run, 3)):
        per_group, left = 6 // 3, len(query) // len(kv)
        if unit == "none":
            assert (query, kv) == (list(range(6)), list(range(3)))
        if unit == "query_head":
            assert kv == [0, 1, 2]
        if unit == "kv_group":
            assert left == per_group
        assert [head // per_group for head in query] == [head for head in kv for _ in range(left)]
        rows = {
            name: torch.tensor([head * head_dim + i for head in heads for i in range(head_dim)])
            for name, heads in (("q_proj", query), ("k_proj", kv), ("v_proj", kv), ("o_proj", query))
        }
        rows |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), torch.tensor(channels))
        for name, weight in model.model.layers[index].named_parameters():
            full = weights.pop(f"model.layers.{index}.{name}")
            module = name.split(".")[-2]
            if module in ("o_proj", "down_proj"):
                full = full[:, rows[module]]
            elif module in rows:
                full = full[rows[module]]
            assert torch.equal(weight, full), name
    for name, full in weights.items():  # those outside the layers
        assert torch.equal(model.get_parameter(name), full), name
    record = json.loads((final / "record.json").read_text())
    if steps_per_phase == 1:
        check_accumulation(record["phases"], run.dense)
    assert all(phase["perplexity"] == phase["perplexity_pruned"] for phase in record["phases"][1:])
    assert not any(phase["tokens"] or phase["losses"] for phase in record["phases"])
    assert find_publication(run.phase_uri(3, "recovered")) is None


def check_accumulation(phases, dense):
    """Each phase adds dS - A(dS) * I to the sparsity before it, and one number to all for the exact size."""
    prunable = dense.num_params() - dense.outside_params - sum(dense.layer_params for _ in dense.layers)
    before = [0.0] * len(dense.layers)
    for last, phase in itertools.pairwise(phases):
        step = (last["params"] - phase["target_params"]) / prunable
        spread = 0.01 / 0.02 * step
        shifts = [
            now - then + spread * importance
            for now, then, importance in zip(phase["sparsity"], before, phase["importance"], strict=True)
        ]
        assert shifts == pytest.approx([shifts[0]] * len(shifts), abs=1e-9)
        before = phase["sparsity"]


@pytest.mark.parametrize("keep", ["all", "last", "best", "2"])
def test_finalize_keeps_the_checkpoints_that_were_asked_for(pruned_only, tmp_path, keep):
    run, final = pruned_only("kv_group", "75%", 3)
    phases = json.loads((final / "record.json").read_text())["phases"][1:]
    best = min(phases, key=lambda phase: phase["perplexity"])["phase"]
    store = tmp_path / "store"
    shutil.copytree(run.store, store)
    moved = dataclasses.replace(
        run,
        store=str(store),
        settings=dataclasses.replace(
            run.settings, storage=dataclasses.replace(run.settings.storage, keep=keep)
        ),
    )
    moved.save()
    open_store(moved.store).write_bytes("jobs/j.json", json.dumps(moved.handle()).encode())
    run_finalize(store=moved.store, job="j", succeeded=True)
    kept = {"all": {1, 2, 3}, "last": set(), "best": {best}, "2": {2}}[keep]
    for phase in (1, 2, 3):
        uri = moved.phase_uri(phase, "pruned")
        assert find_publication(uri) is not None
        assert Path(uri, "model-00001-of-00004.safetensors").exists() == (phase in kept)
        for uri in (
            *(moved.phase_uri(phase, step) for step in ("calibrated", "scored")),
            moved.measured_uri(phase),
        ):
            open_publication(uri).fetch(tmp_path / "unused")
    assert load_model(open_publication(moved.uri("final")).fetch(tmp_path / "unused")) is not None
    assert not list(open_store(moved.store).list("jobs/"))


def test_a_run_that_failed_keeps_what_it_has(project, tmp_path):
    recipe = recipe_with(PRUNE_ONLY | {"storage.store": str(tmp_path / "store"), "storage.keep": "last"})
    with contextlib.chdir(project):
        handle, base_uri = resolve(recipe, job="failed")
        data_uri = run_prepare_data(run=handle, base_uri=base_uri)
        checkpoint_uri = run_phase(handle, 1, base_uri, data_uri, tmp_path)
        run_finalize(store=handle["store"], job="failed", succeeded=False)
        assert run_needs_run(run=handle, being_done_by="").phase
        open_publication(checkpoint_uri).fetch(tmp_path / "unused")


def test_publish_hands_the_ui_what_runs_are_compared_by_and_the_address_of_the_checkpoint(
    pruned_only, project, tmp_path
):
    run, final = pruned_only("kv_group", "75%", 3)
    dense, *_, last = json.loads((final / "record.json").read_text())["phases"]
    result, model = Artifact(tmp_path / "result"), Artifact(tmp_path / "model")
    with contextlib.chdir(project):
        run_publish(
            run=run.handle(),
            checkpoint_uri="file:///unused",
            result=result,
            report=Artifact(tmp_path / "report"),
            model=model,
        )
    found = result.metadata
    assert found["parameters"] == last["params"]
    assert found["share of parameters"] == pytest.approx(last["params"] / dense["params"])
    assert found["perplexity"] == last["perplexity"]
    assert all(isinstance(value, int | float) for value in found.values())
    assert len(found) <= 6 + len(last["tasks"])
    assert model.metadata["checkpoint_uri"] == run.uri("final")
    assert json.loads(Path(model.path).read_text())["checkpoint_uri"] == run.uri("final")


def test_an_evaluation_hands_its_figures_a_table_and_a_picture_to_the_ui_also_when_it_was_done_before(
    pruned_only, project, tmp_path
):
    run, final = pruned_only("kv_group", "75%", 3)
    phases = json.loads((final / "record.json").read_text())["phases"]
    for phase in (0, 2):
        with contextlib.chdir(project):
            figures = evaluate(run.handle(), phase, "file:///unused", "file:///unused", tmp_path / str(phase))
        assert figures.metadata["params"] == phases[phase]["params"]
        assert figures.metadata["perplexity"] == phases[phase]["perplexity"]
        windows = read_items(open_publication(run.measured_uri(phase))).texts["perplexity"]
        assert windows.metrics["perplexity"].over_all() == phases[phase]["perplexity"]
        name = f"phase {phase}" if phase else "dense model"
        summary = (tmp_path / str(phase) / "summary").read_text()
        heading, table = summary.split("\n\n")
        assert heading == f"# {run.settings.name}, {name}"
        dense, own = (f"{phases[i]['params']:,}" for i in (0, phase))
        assert f"| parameters | {dense} | {own} |" in table if phase else f"| parameters | {dense} |" in table
        picture = (tmp_path / str(phase) / "picture").read_text()
        assert f"{run.settings.name}, {name}" in picture
        assert "<svg" in picture
        widths = {str(layer["mlp_width"]) for layer in phases[phase]["layers"]}
        assert all(f">{width}</text>" in picture for width in widths)
        # The report so far went when the last one was published, and does not come back.
        assert not (final.parent / "report.html").exists()
        assert (final / "report.html").exists()


def test_a_record_reads_each_published_file_once(pruned_only, monkeypatch):
    run, final = pruned_only("kv_group", "75%", 3)
    read, read_bytes = collections.Counter(), LocalStore.read_bytes

    def counting(store, key):
        read[store.uri, key] += 1
        return read_bytes(store, key)

    monkeypatch.setattr(LocalStore, "read_bytes", counting)
    collect_record(run, str(final), range(4))
    assert set(read.values()) == {1}
    # Manifest and report of the dense evaluation and of four steps a phase, its plan; no trained checkpoint.
    assert len(read) == 2 + 3 * (4 * 2 + 1 + 1)
