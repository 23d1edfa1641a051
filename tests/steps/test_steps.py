"""The steps of a run, called in this process: keys, exact sizes, what is kept."""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import re
import shutil
import sys
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from components.calibrate import calibrate
from components.prune_step import prune_step
from components.score_layers import score_layers
from core.errors import IntegrityError, TrackingError
from core.model.build import load_model
from core.model.checkpoint import CheckpointReader, save_model
from core.model.layerwise import LayerwiseModel
from core.pruning.plan import Plan
from core.pruning.repair import Repair
from core.pruning.surgery import prune_model
from core.runs.run import Run
from core.steps.finalize import run_finalize
from core.steps.needs_run import run_needs_run
from core.steps.prepare_data import run_prepare_data
from core.steps.prune_step import run_prune_step
from core.steps.records import collect_record
from core.steps.score_layers import run_score_layers
from core.storage.publication import find_publication, open_publication
from core.storage.store import LocalStore, open_store
from core.tracking.client import connect
from tests.support.evidence import note
from tests.support.project import (
    CHANNEL_PARAMS,
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


PRUNE_ONLY = {"training.tokens": "0", "training.sources": [], "prune.phases": 3, "seed": 3}


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
        assert run_needs_run(run=handle, being_done_by="")
        open_publication(checkpoint_uri).fetch(tmp_path / "unused")


@pytest.fixture
def calibrated(project, tmp_path, monkeypatch):
    """A run whose first phase is calibrated, what its next tasks are handed, and the artifact of it."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # tasks set it
    recipe = recipe_with(PRUNE_ONLY | {"storage.store": str(tmp_path / "store"), "seed": 4})
    handle, base_uri = resolve(recipe)
    data_uri = run_prepare_data(run=handle, base_uri=base_uri)
    given = {"run": handle, "phase": 1, "checkpoint_uri": base_uri}
    statistics = Artifact(tmp_path / "statistics")
    calibrate.python_func(**given, data_uri=data_uri, statistics=statistics)
    return Run.load(handle), given, data_uri, statistics


def test_what_artifacts_hold_changes_nothing_as_steps_read_publications(calibrated, tmp_path):
    run, given, data_uri, statistics = calibrated
    plan, model = Artifact(tmp_path / "plan"), Artifact(tmp_path / "model")
    published = Path(run.phase_uri(1, "calibrated"), "statistics.safetensors")
    assert Path(statistics.path).read_bytes() == published.read_bytes()
    Path(statistics.path).write_bytes(b"changed")
    score_layers.python_func(**given, data_uri=data_uri, statistics=statistics, plan=plan)
    content = Path(run.phase_uri(1, "scored"), "plan.json").read_bytes()
    assert Path(plan.path).read_bytes() == content
    Path(plan.path).write_bytes(b"changed")
    uri = prune_step.python_func(**given, data_uri=data_uri, plan=plan, pruned=model)
    planned = json.loads(content)
    assert sum(p.numel() for p in load_model(Path(uri)).parameters()) == planned["params_after"]
    assert planned["statistics"] == hashlib.sha256(published.read_bytes()).hexdigest()


def test_what_a_cut_leaves_is_repaired_on_the_calibration_corpus(calibrated, project, tmp_path):
    run, given, data_uri, _ = calibrated
    run_score_layers(**given, data_uri=data_uri, plan=Artifact(tmp_path / "plan"))
    uri = run_prune_step(**given, data_uri=data_uri, model=Artifact(tmp_path / "model"))
    plan = Plan.load(Path(run.phase_uri(1, "scored"), "plan.json"))
    pool = load_file(Path(data_uri, "calibration.safetensors"))["input_ids"].long()
    base = load_model(project / "base")
    cut, found = prune_model(base, plan.layers).state_dict(), load_model(Path(uri)).state_dict()
    cut = {name: tensor.clone() for name, tensor in cut.items()}
    repair = Repair(LayerwiseModel(base), pool, ridge=run.settings.prune.ridge)
    changed = set()
    for index, layer in enumerate(plan.layers):
        for name, change in repair.layer(index, layer).items():
            cut[f"model.layers.{index}.{name}"] += change
            changed.add(name)
    assert "mlp.down_proj.weight" in changed <= {"mlp.down_proj.weight", "self_attn.o_proj.weight"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, cut[name], rtol=1e-4, atol=1e-5)


def test_statistics_and_a_plan_that_were_changed_where_they_are_published_are_named(calibrated, tmp_path):
    run, given, data_uri, _ = calibrated
    published = Path(run.phase_uri(1, "calibrated"), "statistics.safetensors")
    intact = published.read_bytes()
    published.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=r"calibrated/statistics\.safetensors"):
        run_score_layers(**given, data_uri=data_uri, plan=Artifact(tmp_path / "plan"))
    published.write_bytes(intact)
    run_score_layers(**given, data_uri=data_uri, plan=Artifact(tmp_path / "plan"))
    plan = Path(run.phase_uri(1, "scored"), "plan.json")
    plan.write_text(plan.read_text().replace("[0, 1", "[0, 2", 1))
    with pytest.raises(IntegrityError, match=r"scored/plan\.json"):
        run_prune_step(**given, data_uri=data_uri, model=Artifact(tmp_path / "model"))
    assert find_publication(run.phase_uri(1, "pruned")) is None


MACHINE = {"seconds", "tokens_per_s", "repair_s", "distill_s", "mask_s"}
MACHINE |= {"step_tokens_per_s", "model_flops_per_s", "peak_memory_bytes"}
"""What depends on the machine and its other work."""


def logged(uri):
    """Return every MLflow run's status, curves (less those of ``MACHINE``) and files, by phase and step."""
    client, found = connect(uri), {}
    experiment = client.get_experiment_by_name("adapt-pruner").experiment_id
    for run in client.search_runs([experiment], max_results=1000):
        names = set(run.data.metrics) - MACHINE
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
        curves = {name: [(point.step, point.value) for point in curve] for name, curve in histories.items()}
        files = [file.path for file in client.list_artifacts(run.info.run_id)]
        which = tuple(run.data.tags.get(f"adapt_pruner.{tag}") for tag in ("phase", "step"))
        found[which] = (run.info.status, curves, files)
    return found


def test_an_outage_of_mlflow_costs_no_result_and_no_figure(project, tmp_path, monkeypatch, caplog):
    """Each kind of request fails the first time for a run, which is left as a kill would leave it."""
    from mlflow import MlflowClient

    monkeypatch.chdir(project)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def recipe(name):
        places = {"storage.store": str(tmp_path / name), "tracking.uri": f"sqlite:///{tmp_path}/{name}.db"}
        return recipe_with({"prune.phases": 1, **places})

    run_all(recipe("expected"), tmp_path / "artifacts")
    failed = set()

    def failing(name):
        real = getattr(MlflowClient, name)

        def fails_once(client, run_id, *arguments, **named):
            if arguments == ("FAILED",):
                raise ConnectionError("Connection refused")
            if (name, run_id) not in failed:
                failed.add((name, run_id))
                raise ConnectionError("Connection refused")
            return real(client, run_id, *arguments, **named)

        return fails_once

    for name in ("log_batch", "log_artifact", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, failing(name))
    caplog.set_level(logging.DEBUG, logger="core.steps.frame")
    ended, tries = False, 0
    while not ended:
        tries += 1
        with contextlib.suppress(TrackingError):
            run_all(recipe("outage"), tmp_path / "artifacts")
            ended = True
    computed = re.findall(r"computing \S+/runs/[0-9a-f]+/(\S+)", caplog.text)
    steps = [f"phases/01/{step}" for step in ("calibrated", "scored", "pruned", "recovered", "evaluated")]
    computed = [re.sub("-[0-9a-f]{8}$", "", place) for place in computed]
    assert computed == ["held-out", "data", "phases/00/evaluated", *steps, "final"]
    assert tries > 2 * len(computed)
    assert logged(f"sqlite:///{tmp_path}/outage.db") == logged(f"sqlite:///{tmp_path}/expected.db")
    curves = logged(f"sqlite:///{tmp_path}/outage.db")
    assert {"similarity", "calibration_loss"} <= curves["1", "calibrate"][1].keys()
    assert {"importance", "sparsity", "attention_removed"} <= curves["1", "score-layers"][1].keys()
    assert {"loss", "learning_rate", "tokens"} <= curves["1", "recover-train"][1].keys()
    assert {status for status, *_ in curves.values()} == {"FINISHED"}
    note(
        "Kills", "MLflow is away at the end of each step", "nothing is computed again; all figures are logged"
    )


def test_an_evaluation_hands_its_figures_a_table_and_a_picture_to_the_ui_also_when_it_was_done_before(
    pruned_only, project, tmp_path
):
    run, final = pruned_only("kv_group", "75%", 3)
    phases = json.loads((final / "record.json").read_text())["phases"]
    for phase in (0, 2):
        with contextlib.chdir(project):
            metrics = evaluate(run.handle(), phase, "file:///unused", "file:///unused", tmp_path / str(phase))
        assert metrics.metadata["params"] == phases[phase]["params"]
        assert metrics.metadata["perplexity"] == phases[phase]["perplexity"]
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
