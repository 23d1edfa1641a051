"""Distillation within prune-step: towards the dense base model, on texts of its own, rounded once."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.errors import DataError
from core.model.build import load_model
from core.model.checkpoint import CheckpointReader, save_model
from core.runs.gathering import collect_record
from core.runs.record import DistillationRecord
from core.runs.run import Run
from core.steps import distilling
from core.steps.prepare_data import run_prepare_data
from core.training.distillation import distill
from tests.support.project import recipe_with, resolve, run_phase

STEPS, BATCH, RATE = 10, 4, 5e-4
CHANGES = {
    "training.tokens": "0",
    "training.sources": [],
    "prune.phases": 2,
    "prune.target": "70%",
    "prune.distill_steps": STEPS,
    "prune.distill_rate": RATE,
    "prune.distill_batch_tokens": str(24 * BATCH),
    "storage.keep": "all",
}


def run_phases(project, folder, changes=None, phases=2):
    """Run phases of a recipe; returns the run and what each has published of its cut."""
    recipe = recipe_with(CHANGES | {"storage.store": str(folder / "store")} | (changes or {}))
    with contextlib.chdir(project):
        handle, uri = resolve(recipe)
        data_uri = run_prepare_data(run=handle, base_uri=uri)
        for phase in range(1, phases + 1):
            uri = run_phase(handle, phase, uri, data_uri, folder)
    run = Run.load(handle)
    return run, [Path(run.phase_uri(phase, "pruned")) for phase in range(1, phases + 1)]


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def divergence(student, teacher, tokens):
    with torch.no_grad():
        p, q = (torch.distributions.Categorical(logits=of(tokens).logits) for of in (teacher, student))
    return torch.distributions.kl_divergence(p, q).mean().item()


@pytest.fixture(scope="module")
def distilled(project, tmp_path_factory):
    return run_phases(project, tmp_path_factory.mktemp("distilled"))


@pytest.fixture(scope="module")
def repaired(project, tmp_path_factory):
    return run_phases(project, tmp_path_factory.mktemp("repaired"), {"prune.distill_steps": 0}, phases=1)


def pool_of(run, phase=1):
    pool = load_file(Path(run.uri("data"), "calibration.safetensors"))["input_ids"].long()
    generator = torch.Generator().manual_seed(run.settings.seed * 1_000_003 + (phase - 1) * 1000 + 999)
    return pool[torch.randperm(len(pool), generator=generator)]


def test_a_phase_is_the_repaired_cut_distilled_towards_the_dense_model(distilled, repaired, project):
    run, (first, _) = distilled
    pool = pool_of(run)
    held_out = len(pool) // 8
    student, teacher = load_model(repaired[1][0]), load_model(project / "base")
    before = divergence(student, teacher, pool[-held_out:])
    distill(
        student,
        teacher,
        pool[:-held_out][-STEPS * BATCH :],
        steps=STEPS,
        rate=RATE,
        batch=BATCH,
        micro_batch=BATCH,
        autocast=False,
        seed=run.settings.seed + 1,
    )
    found = load_model(first)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-3, atol=1e-4)
    report = report_of(first)
    assert report["divergence_cut"] == pytest.approx(before, rel=1e-4)
    assert report["divergence_distilled"] == pytest.approx(
        divergence(found, teacher, pool[-held_out:]), rel=1e-4
    )
    assert report["divergence_distilled"] < before
    assert report["distill_tokens"] == STEPS * BATCH * 24
    assert len(report["divergences"]) == STEPS
    assert report["params"] == sum(p.numel() for p in found.parameters())


def test_later_phases_still_aim_at_the_dense_model(distilled, project):
    run, (_, second) = distilled
    held_out = pool_of(run, 2)[-(len(pool_of(run, 2)) // 8) :]
    found, dense = load_model(second), load_model(project / "base")
    assert report_of(second)["divergence_distilled"] == pytest.approx(
        divergence(found, dense, held_out), rel=1e-4
    )


def test_what_it_cost_and_brought_is_recorded_and_tracked(distilled):
    run, folders = distilled
    record = collect_record(run, "", [0, 1, 2])
    dense, *phases = record.phases
    assert (dense.repair_s, dense.distillation) == (0.0, None)
    for phase, folder in zip(phases, folders, strict=True):
        report = report_of(folder)
        assert phase.repair_s == report["repair_s"]
        assert phase.distillation == DistillationRecord(
            seconds=report["distill_s"],
            tokens=STEPS * BATCH * 24,
            before=report["divergence_cut"],
            after=report["divergence_distilled"],
        )
        assert 0 < phase.repair_s + phase.distillation.seconds < phase.seconds["pruned"]


@pytest.mark.parametrize("format_", [torch.bfloat16, torch.float32])
def test_the_result_has_the_number_format_of_the_base_and_is_rounded_once(
    format_, project, tmp_path, monkeypatch
):
    half = load_model(project / "base", dtype=format_)
    save_model(half, tmp_path / "half", companions=project / "base", provenance={})
    seen = []

    def distill_here(student, teacher, tokens, **given):
        seen.append({p.dtype for p in student.parameters()})
        report = distill(student, teacher, tokens, **given)
        seen.append({name: p.detach().clone() for name, p in student.named_parameters()})
        return report

    monkeypatch.setattr("core.training.distillation.distill", distill_here)
    _, (folder,) = run_phases(
        project, tmp_path, {"model.base": str(tmp_path / "half"), "prune.phases": 1}, phases=1
    )
    assert seen[0] == {torch.float32}
    with CheckpointReader(folder) as reader:
        for name in reader.names():
            assert torch.equal(reader.tensor(name), seen[1][name].to(format_)), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(format_).removeprefix("torch.")


def test_without_a_repair_a_cut_is_distilled_too(project, tmp_path):
    _, (folder,) = run_phases(project, tmp_path, {"prune.repair": "none"}, phases=1)
    report = report_of(folder)
    assert "repair_s" not in report
    assert report["divergence_distilled"] < report["divergence_cut"]


def test_more_than_one_pass_over_the_texts_is_said(project, tmp_path, caplog):
    said = "learns by heart what comes again"
    run, _ = run_phases(project, tmp_path / "many", {"prune.distill_steps": 40}, phases=1)
    tokens = (len(pool_of(run)) - min(32, len(pool_of(run)) // 8)) * 24
    assert f"goes {40 * BATCH * 24 / tokens:.2f} times over its {tokens:,} tokens, and {said}" in caplog.text
    caplog.clear()
    run_phases(project, tmp_path / "few", {"prune.distill_steps": 2}, phases=1)
    assert said not in caplog.text


def test_the_texts_of_a_distillation_are_not_those_of_the_repair_or_of_its_measure():
    pool = torch.arange(100)[:, None]
    trained, held_out = distilling._divided(pool, 40)
    assert len(trained) == 40
    assert held_out.flatten().tolist() == list(range(88, 100))
    assert trained.flatten().tolist() == list(range(48, 88))  # a repair of 48 sequences shares none
    trained, held_out = distilling._divided(pool[:2], 40)
    assert (trained.tolist(), held_out.tolist()) == ([[0]], [[1]])
    with pytest.raises(DataError, match=r"calibration\.source gives one sequence"):
        distilling._divided(pool[:1], 40)
