"""A run survives an upgrade, and changes of what does not belong to its key."""

import copy
import json
import logging
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from core.errors import AdaptPrunerError, FormatError
from core.pruning.plan import Plan
from core.runs.overview import list_runs
from core.runs.record import RunRecord
from core.runs.run import Run
from core.storage.garbage import find_garbage
from core.storage.manifest import Manifest
from core.storage.publication import open_publication
from core.storage.store import open_store
from core.untrusted import check_format
from tests.support.project import run_all

STORES = sorted((Path(__file__).resolve().parents[1] / "stores").glob("*.tar.xz"))
assert STORES, "else every test of an old store would be skipped"


@pytest.fixture(params=STORES, ids=lambda path: path.name.partition(".")[0])
def old(request, tmp_path, monkeypatch):
    """The folder of a project whose run an older version has begun (see tests/support/old_store.py)."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


@pytest.fixture
def go_on(old, caplog):
    """Call all steps of a recipe; return its run and the publications that were computed."""

    def run_steps(**changes):
        recipe = json.loads((old / "recipe.json").read_text())
        # As the older version did.
        former = {"prune__criterion": "taylor_l1", "prune__repair": "none", "training__packing": "cut"}
        former |= {"training__teacher": "none", "model__dtype_between_phases": "same"}
        for name, value in (former | changes).items():
            *sections, key = name.split("__")
            place = recipe
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "core"):
            handle, _ = run_all(recipe, old / "artifacts", job="old")
        found = re.findall(r"computing \S*runs/[0-9a-f]+/(\S+)", caplog.text)
        return Run.load(handle), [re.sub("-[0-9a-f]{8}$", "", place) for place in found]

    return run_steps


LEFT = ["phases/02/recovered", "phases/02/evaluated", "final"]
"""What the stored run has yet to compute."""


def test_a_run_of_an_older_version_resumes_in_the_middle_of_its_training(old, go_on, caplog):
    (began,) = list_runs(open_store(old / "store"))
    run, computed = go_on()
    assert (run.key, computed) == (began.key, LEFT)
    assert "resumed at step 6 of 12" in caplog.text
    assert Run.is_done(run.handle())
    assert [run.key] == [found.key for found in list_runs(open_store(old / "store"))]
    assert find_garbage(open_store(old / "store")).foreign == []


def test_a_stored_run_has_the_settings_that_its_version_knew(old):
    (began,) = list_runs(open_store(old / "store"))
    stored = Path(old, "store", "runs", began.key, "run.json").read_text()
    assert '"repair"' not in stored
    assert "dtype_between_phases" not in stored
    assert '"packing": "' not in stored  # calibration.packing is a bool
    run = Run.load({"store": "store", "key": began.key, "job": "old"})
    assert (run.settings.prune.repair, run.settings.training.packing) == ("none", "cut")
    assert run.settings.model.dtype_between_phases == "same"
    assert Run.key_of(run.revision, run.settings) == began.key


def test_files_without_a_format_are_read_as_the_first(old, go_on):
    for path in [
        *old.glob("store/**/MANIFEST.json"),
        *old.glob("store/runs/*/run.json"),
        *old.glob("store/jobs/*"),
    ]:
        data = json.loads(path.read_text())
        assert data.pop("format") == 1
        path.write_text(json.dumps(data))
    assert go_on()[1] == LEFT


def test_every_json_file_of_a_store_carries_its_format(old, go_on):
    go_on()
    foreign = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    foreign += ("model.safetensors.index.json", "adapt_pruner.json")
    files = [path for path in (old / "store").rglob("*.json") if path.name not in foreign]
    assert {path.name for path in files} >= {
        "run.json",
        "DONE.json",
        "plan.json",
        "record.json",
        "report.json",
    }
    assert {path.name for path in files if json.loads(path.read_text()).get("format") != 1} == set()


def test_memory_settings_resume_the_same_run(go_on, caplog):
    run, computed = go_on(
        calibration__micro_batch=2,
        calibration__weights="streamed",
        calibration__state_memory="100MB",
        training__micro_batch=1,
        training__gradient_checkpointing=True,
        evaluation__batch_size=2,
    )
    assert computed == LEFT
    assert "resumed at step 6 of 12" in caplog.text
    assert run.settings.training.micro_batch == 1


def test_what_is_measured_otherwise_is_measured_again_and_nothing_else_is_computed(old, go_on):
    run, _ = go_on(storage__keep="all")
    first = record_of(run)
    other, computed = go_on(storage__keep="all", evaluation__perplexity_length=16)
    measured = ["held-out", *(f"phases/0{phase}/evaluated" for phase in (0, 1, 2)), "report"]
    assert (other.key, computed) == (run.key, measured)
    second = record_of(other)
    for before, after in zip(first.phases, second.phases, strict=True):
        assert before.perplexity != after.perplexity
        assert (before.params, before.losses, before.layers) == (after.params, after.losses, after.layers)
    assert [phase.perplexity_pruned is None for phase in second.phases] == [True, False, False]
    assert record_of(run) == first  # publications do not change
    assert find_garbage(open_store(old / "store")).foreign == []
    assert go_on(storage__keep="all", evaluation__perplexity_length=16)[1] == []
    assert go_on(storage__keep="all")[1] == []


def test_in_the_middle_of_a_run_what_is_measured_may_change_too(go_on):
    run, computed = go_on(evaluation__perplexity_length=16)
    assert computed == ["held-out", "phases/00/evaluated", "phases/01/evaluated", *LEFT]
    assert run.report_uri() == run.uri("final")


def test_checkpoints_that_were_not_kept_are_not_measured_again_but_the_final_one_is(go_on, caplog):
    run, _ = go_on(storage__keep="last")
    other, computed = go_on(storage__keep="last", evaluation__perplexity_length=16)
    assert computed[-1] == "report"
    assert "not measured: storage.keep=last has kept no checkpoint" in caplog.text
    dense, first, last = record_of(other).phases
    assert dense.perplexity > 1
    assert last.perplexity > 1
    assert (first.perplexity, first.perplexity_pruned, last.perplexity_pruned) == (None, None, None)
    assert record_of(other).checkpoint_uri == run.uri("final")


def record_of(run):
    return RunRecord.from_dict(open_publication(run.report_uri()).read_json("record.json"))


def test_another_result_is_another_run(old, go_on):
    run, _ = go_on()
    recipe = json.loads((old / "recipe.json").read_text())
    assert Run.load(run.handle()).settings.prune.repair == "none"
    assert go_on_key(recipe, "prune", "repair", "ridge") != run.key
    recipe["prune"]["repair"] = "none"
    assert go_on_key(recipe, "training", "learning_rate", 0.02) != run.key
    assert go_on_key(recipe, "training", "precision", "bfloat16") != run.key


def go_on_key(recipe, section, name, value):
    from core.settings.recipe import settings_from_dict

    changed = copy.deepcopy(recipe)
    changed[section][name] = value
    return Run.key_of("revision", settings_from_dict(changed))


@pytest.mark.parametrize("found", [0, 2, "1", None, 1.5])
def test_another_format_is_refused_with_one_line(found):
    with pytest.raises(
        FormatError, match=r"^x\.json is of format .*, and this version .* reads up to 1\. Use"
    ):
        check_format({"format": found}, 1, "x.json")


@pytest.mark.parametrize("name", ["run.json", "DONE.json", "MANIFEST.json", "plan.json", "record.json"])
def test_a_file_of_a_newer_version_is_refused_with_one_line(old, name, tmp_path):
    (path,) = [*old.glob(f"store/runs/*/{name}"), *old.glob(f"store/runs/*/phases/01/scored/{name}")][:1] or [
        tmp_path / name
    ]
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | {"format": 2}))
    run = {"store": "store", "key": next(old.glob("store/runs/*")).name, "job": "old"}
    readers = {
        "run.json": lambda: Run.load(run),
        "DONE.json": lambda: done(run, path),
        "MANIFEST.json": lambda: open_publication(str(path.parent)),
        "plan.json": lambda: Plan.load(path),
        "record.json": lambda: RunRecord.from_dict(json.loads(path.read_text())),
    }
    with pytest.raises(AdaptPrunerError, match="is of format 2, and this version") as error:
        readers[name]()
    assert len(str(error.value).splitlines()) == 1
    assert "damaged" not in str(error.value)


def done(handle, content):
    run = Run.load(handle)
    shutil.copyfile(content, Path(run.store, run.folder, "DONE.json"))
    final = Path(run.store, run.folder, "final", "MANIFEST.json")
    final.parent.mkdir()
    final.write_text(Manifest(files=()).to_json())
    return run.is_complete()


def test_a_manifest_keeps_its_digest_whatever_its_format():
    text = Manifest(files=()).to_json()
    without = {name: value for name, value in json.loads(text).items() if name != "format"}
    assert Manifest.from_json(json.dumps(without)).digest == Manifest.from_json(text).digest
