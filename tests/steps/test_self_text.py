"""The base model's own text: written once a run, and what repairs and distillations are computed from."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import core.training.distillation
from core.errors import OutOfMemoryError, SettingsError, StorageError
from core.model.build import load_model, load_tokenizer
from core.model.checkpoint import Checkpoint
from core.pruning.self_calibration import write_text
from core.runs.gathering import collect_record
from core.settings.prune import PruneSettings, slices_or_ranks
from core.steps import measuring, prune_footprint, self_text
from core.steps.needs import needs_of_tasks
from core.steps.prune_footprint import repair_footprint, writing_footprint
from tests.steps.test_distilling import run_phases
from tests.steps.test_needs import settings_with

LENGTH, ROWS = 24, 9
GENERATED = {"prune.generated_tokens": str(LENGTH * ROWS - 5)}
REPAIRED = GENERATED | {"prune.distill_steps": 0}


def tokens_of(run):
    return load_file(Path(run.uri("generated"), "generated.safetensors"))["input_ids"]


@pytest.fixture(scope="module")
def seen():
    """What each repair was computed from."""
    return []


@pytest.fixture(scope="module")
def generated(project, tmp_path_factory, seen):
    with pytest.MonkeyPatch.context() as patch:
        check = measuring.opened_for_repair

        def noted(*args, **options):
            model, tokens = check(*args, **options)
            seen.append(tokens)
            return model, tokens

        patch.setattr("core.steps.prune_step.opened_for_repair", noted)
        return run_phases(project, tmp_path_factory.mktemp("generated"), REPAIRED)


def test_the_base_model_writes_it_once_and_each_phase_repairs_on_it_too(generated, seen, project):
    run, _ = generated
    written = tokens_of(run)
    base = project / "base"
    again = write_text(
        load_model(base), load_tokenizer(base), sequences=ROWS, length=LENGTH, batch=4, seed=run.settings.seed
    )
    assert torch.equal(written.long(), again)
    assert len(seen) == 2
    for tokens in seen:
        assert torch.equal(tokens[-ROWS:], written.long())
        assert len(tokens) > ROWS
    assert not torch.equal(seen[0][:-ROWS], seen[1][:-ROWS])


class KilledError(Exception):
    pass


def test_a_killed_attempt_is_gone_on_with_and_a_damaged_one_is_not_used(
    generated, project, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "core.steps.self_text")
    changes = REPAIRED | {"calibration.micro_batch": 1}  # 8 of the 9 sequences at once
    monkeypatch.setattr(prune_footprint, "_WRITTEN_FOR_EACH_SCORED", 2)
    monkeypatch.setattr(self_text, "_KEPT_EVERY_S", 0)
    keep = self_text._KeptText.keep

    def killed(self, tokens):
        self._began -= 1000
        keep(self, tokens)
        if len(tokens) == 6:
            raise KilledError

    places = set()
    for damaged in (False, True):
        folder = tmp_path / str(damaged)
        with monkeypatch.context() as patch:
            patch.setattr(self_text._KeptText, "keep", killed)
            with pytest.raises(KilledError):
                run_phases(project, folder, changes, phases=1)
        (kept,) = folder.rglob("generated/_resume")
        (part,) = kept.rglob("generated.safetensors")
        places.add(part.relative_to(kept).parts[0])
        if damaged:
            part.write_bytes(part.read_bytes()[:-1] + b"x")
        caplog.clear()
        run, _ = run_phases(project, folder, changes, phases=1)
        said = "6 sequences of an earlier attempt are not used" if damaged else "goes on after 6 sequences"
        assert said in caplog.text
        assert torch.equal(tokens_of(run), tokens_of(generated[0]))
        assert not kept.exists()
        report = json.loads(Path(run.uri("generated"), "report.json").read_text())
        assert (report["seconds"] > 1000) is not damaged
    assert places == {"000006"}


@pytest.mark.parametrize(
    ("call", "error"),
    [("publish", StorageError("the store is away.")), ("save_file", OSError("No space left on device"))],
)
def test_text_that_cannot_be_kept_is_written_all_the_same(call, error, tmp_path, monkeypatch, caplog):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(self_text, "_KEPT_EVERY_S", 0)
    kept = self_text._KeptText(str(tmp_path / "store"), tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(self_text, call, fails)
        kept.keep(torch.ones(2, 3, dtype=torch.long))
    assert f"2 sequences are written, but not kept: {error}" in caplog.text
    kept.keep(torch.ones(4, 3, dtype=torch.long))
    assert kept.newest().shape == (4, 3)


def test_it_changes_the_repair_and_its_time_is_told_with_the_first_phase(generated, project, tmp_path):
    run, (first, _) = generated
    _, (without,) = run_phases(project, tmp_path, {"prune.distill_steps": 0}, phases=1)
    weights = [load_model(folder).state_dict() for folder in (first, without)]
    changed = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert changed
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
    report = json.loads(Path(run.uri("generated"), "report.json").read_text())
    assert report["tokens"] == ROWS * LENGTH
    phases = collect_record(run, first.as_uri(), phases=[1, 2]).phases
    assert phases[0].seconds["generated"] == report["seconds"]
    assert "generated" not in phases[1].seconds


def test_a_distillation_takes_it_when_the_corpus_is_used_up(project, tmp_path, monkeypatch):
    taken, distill = [], core.training.distillation.distill

    def noted(student, teacher, tokens, **options):
        taken.append(tokens)
        return distill(student, teacher, tokens, **options)

    monkeypatch.setattr(core.training.distillation, "distill", noted)
    for steps in (3, 100):
        changes = GENERATED | {"prune.distill_steps": steps}
        run, _ = run_phases(project, tmp_path / str(steps), changes, phases=1)
    corpus = load_file(Path(run.uri("data"), "calibration.safetensors"))["input_ids"]
    few, all_there_are = taken
    assert len(few) == 3 * 4
    assert {tuple(row) for row in few.tolist()} <= {tuple(row) for row in corpus.tolist()}
    held_out = (len(corpus) + ROWS) // 8
    assert len(all_there_are) == len(corpus) + ROWS - held_out
    assert torch.equal(all_there_are[:ROWS], tokens_of(run).long())


def test_a_base_model_that_does_not_fit_is_one_line_with_a_way_out(project, tmp_path, monkeypatch):
    monkeypatch.setattr(self_text, "available_bytes", lambda device: 10_000)
    with pytest.raises(OutOfMemoryError, match=r"prune\.generated_tokens=0, which begins another run"):
        run_phases(project, tmp_path, REPAIRED, phases=1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"generated_tokens": "-5"}, "generated_tokens=-5 is not a count. Give one such as 128k, or 0."),
        ({"generated_tokens": "many"}, "generated_tokens=many is not a count. Give one such as 128k, or 0."),
        (
            {"generated_tokens": "1k", "repair": "none"},
            "recipe has none. Set repair to ridge, or generated_tokens to 0.",
        ),
        (
            {"generated_tokens": "1k", "method": "magnitude"},
            "recipe has none. Set distill_steps, or generated",
        ),
    ],
)
def test_what_is_wrong_is_said(changes, says):
    with pytest.raises(SettingsError, match=says):
        PruneSettings(**changes)


@pytest.mark.parametrize("hidden_size", ["100%", "75%"])
def test_masks_are_learnt_on_the_corpus_alone(hidden_size):
    given = {"method": "sheared-llama", "phases": 1, "hidden_size": hidden_size}
    with pytest.raises(SettingsError, match="Set distill_steps, or generated_tokens to 0"):
        PruneSettings(generated_tokens="1k", **given)
    assert not slices_or_ranks(PruneSettings(**given))


@pytest.mark.parametrize(
    "changes",
    [{"repair": "none", "distill_steps": 3}, {"method": "slicegpt", "phases": 1}, {"method": "grail"}],
)
def test_what_takes_it_may_ask_for_it(changes):
    assert PruneSettings(generated_tokens="1k", **changes).generates


def test_pods_are_planned_for_it(project):
    config = Checkpoint(project / "base").config
    before, after = (
        settings_with(prune__generated_tokens=tokens, prune__repair_tokens="240", cluster={"gpus": 0})
        for tokens in ("0", "24k")
    )
    calibration = dataclasses.replace(after.calibration, precision="float32")
    parts = [
        repair_footprint(config, calibration, of.prune, device="cpu", free_bytes=10**9).parts["hidden states"]
        for of in (before, after)
    ]
    assert parts[1] > 50 * parts[0]
    assert needs_of_tasks(config, after)["prune-step"].device_bytes >= (
        needs_of_tasks(config, before)["prune-step"].device_bytes
    )
    one, eight = (writing_footprint(config, calibration, size, device="cpu") for size in (1, 8))
    assert eight.parts["weights"] == one.parts["weights"]
    assert eight.parts["keys and values"] == 8 * one.parts["keys and values"]
