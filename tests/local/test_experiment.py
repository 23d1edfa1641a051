"""Experiments: what their files come to, and the table of what is in the store."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from core.experiments.collecting import find_runs, found_runs
from core.experiments.definition import SHIPPED, load_experiment, shipped_experiments
from core.storage.store import open_store
from pipelines.cli import main
from tests.support.project import command_line, run_all
from tests.support.servers import killed_at_the_end

pytestmark = pytest.mark.slow

FILE = {
    "title": "Two methods",
    "recipe": "recipe.yaml",
    "seeds": 2,
    "axes": {
        "method": {"Ours": {}, "FLAP": {"prune.method": "flap", "prune.repair": "bias"}},
        "removed": {"25 %": {"prune.target": "75%"}},
    },
    "set": {"prune.phases": 1, "prune.amplitude": 0.02, "prune.repair": "none", "training.tokens": 0},
    "metrics": ["params", "perplexity"],
    "picture": {"x": "removed", "y": "perplexity", "by": "method"},
    "published": {
        "base": "base",
        "source": "a paper",
        "figures": [{"method": "FLAP", "perplexity": 321}, {"params": "12.3M"}],
    },
    "elsewhere": {"axes": {"removed": {"25 %": {"prune.target": "70%"}}}},
}


def write(folder, **changes):
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(FILE | changes, sort_keys=False))
    return path


def experiment(*arguments):
    return CliRunner().invoke(main, ["experiment", *map(str, arguments)])


def errors_of(result, status=2):
    assert result.exit_code == status, result.output
    return [line.removeprefix("error: ") for line in result.stderr.splitlines()]


@pytest.fixture
def path(folder):
    return write(folder)


@pytest.fixture(scope="module")
def three_done(project, tmp_path_factory):
    """A project in which all runs but the last are done, and the records of those that are."""
    folder = shutil.copytree(project, tmp_path_factory.mktemp("experiment") / "project")
    path, records = write(folder), {}
    with contextlib.chdir(folder):
        for cell in load_experiment(path).cells[:3]:
            _, final = run_all(cell.settings.to_dict(), folder / "artifacts" / cell.key)
            records[cell.name] = json.loads(Path(final, "record.json").read_text())
    return folder, path, records


@pytest.fixture
def collected(three_done, monkeypatch, tmp_path):
    folder, path, records = three_done
    monkeypatch.chdir(folder)
    result = experiment(path, "--collect", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    return result, tmp_path / "out", records


@pytest.mark.parametrize("name", shipped_experiments())
def test_a_shipped_experiment_can_be_run_on_its_base_and_on_another(name):
    path = SHIPPED / f"{name}.yaml"
    own = load_experiment(path)
    other = load_experiment(path, ["model.base=organisation/model"])
    assert len(own.cells) == len(other.cells)
    assert {cell.settings.model.base for cell in other.cells} == {"organisation/model"}
    assert other.published == ()
    assert all(cell.settings.prune.target.endswith("%") for cell in other.cells) or "llama-3.2" in name
    pictured = {own.picture.x, own.picture.by} - {""}
    assert pictured <= {*own.axes, *(["layer"] if own.sensitivity else [])}
    assert own.picture.y in own.metrics


def test_compared_systems_get_what_ours_gets():
    """All but what a method decides is the same in all rows of the comparison."""
    cells = load_experiment(SHIPPED / "table1.yaml", seeds=1).cells
    for cell in cells:
        alike = next(each for each in cells if each.labels["removed"] == cell.labels["removed"])
        assert cell.settings.prune.target == alike.settings.prune.target
        for section in ("model", "calibration", "training", "evaluation"):
            assert getattr(cell.settings, section) == getattr(alike.settings, section)
    methods = {cell.labels["method"]: cell.settings.prune.method for cell in cells}
    assert list(methods.values()) == ["adapt-pruner", "adapt-pruner", "llm-pruner", "flap", "slicegpt"]


def test_cells_are_all_combinations_with_the_overrides_of_their_labels(path):
    cells = load_experiment(path, ["calibration.sequences=9"]).cells
    shown = [(c.name, c.settings.prune.method, c.settings.prune.repair, c.settings.seed) for c in cells]
    assert shown == [
        ("Ours, removed 25 %, seed 0", "adapt-pruner", "none", 0),
        ("Ours, removed 25 %, seed 1", "adapt-pruner", "none", 1),
        ("FLAP, removed 25 %, seed 0", "flap", "bias", 0),
        ("FLAP, removed 25 %, seed 1", "flap", "bias", 1),
    ]
    assert {cell.settings.calibration.sequences for cell in cells} == {9}
    assert len({cell.key for cell in cells}) == 4
    assert cells[0].key != load_experiment(path).cells[0].key
    assert [c.name for c in load_experiment(path, seeds=1, only=["method=FLAP"]).cells] == [cells[2].name]


def test_another_base_model_takes_what_holds_elsewhere_and_no_published_figure(path):
    here, there = load_experiment(path), load_experiment(path, ["model.base=another"])
    assert {cell.settings.prune.target for cell in here.cells} == {"75%"}
    assert {cell.settings.prune.target for cell in there.cells} == {"70%"}
    assert here.published == (({"method": "FLAP"}, {"perplexity": 321.0}), ({}, {"params": 12_300_000.0}))
    assert "Published: a paper" in here.notes
    assert (there.published, there.notes) == ((), ())


def test_labels_that_yaml_takes_for_numbers_are_the_same_labels_elsewhere(folder):
    axes = {"A": {0.01: {"prune.amplitude": 0.01}, 0.02: {"prune.amplitude": 0.02}}}
    elsewhere = {"axes": {"A": {0.01: {"prune.target": "60%"}}}}
    changes = {"axes": axes, "elsewhere": elsewhere, "seeds": 1, "published": {"base": "x"}, "picture": None}
    cells = load_experiment(write(folder, **changes)).cells
    shown = [(c.labels["A"], c.settings.prune.amplitude, c.settings.prune.target) for c in cells]
    assert shown == [("0.01", 0.01, "60%"), ("0.02", 0.02, "75%")]


def test_names_are_listed_and_an_unknown_one_is_refused(folder):
    assert {line.split()[0] for line in experiment().stdout.splitlines()} == set(shipped_experiments())
    (line,) = errors_of(experiment("tabel1"))
    assert line.startswith("tabel1 is neither an experiment nor a file. Known experiments: figure1")


def test_the_cell_whose_settings_are_refused_is_named(folder):
    axes = FILE["axes"] | {"removed": {"25 %": {"prune.target": "75%"}, "much": {"prune.target": "0%"}}}
    (line,) = errors_of(experiment(write(folder, axes=axes)))
    assert line.startswith("cell Ours, much, seed 0 (and 3 more): prune.target=0% must lie between")


@pytest.mark.parametrize(
    ("changes", "arguments", "expected"),
    [
        ({"colour": "red"}, [], "two.yaml: colour: unexpected keyword argument."),
        ({"axes": {}}, [], "two.yaml: axes: there is none. Name one with a label for each row"),
        ({"axes": {"method": {}}}, [], "two.yaml: axes.method: has no label."),
        ({"seeds": 0}, [], "two.yaml: seeds: 0 is no number of runs. Give 1 or more."),
        ({"set": {"seed": 5}}, [], "two.yaml: set.seed: seeds are counted from 0. Leave it out, and give "),
        (
            {"axes": {"size": {"S": {"prune": {"phases": 1}}}}},
            [],
            "two.yaml: axes.size.S.prune: would replace",
        ),
        ({"axes": [1]}, [], "two.yaml: axes: input should be a valid dictionary."),
        ({"recipe": "no.yaml"}, [], "no.yaml cannot be read"),
        ({}, ["--set=prune.method=flap", "--set=prune.repair=bias"], "(and 1 more) have equal settings"),
        (
            {},
            ["--only=method=Flap"],
            "--only method=Flap fits no cell. Known: method=Ours, FLAP; removed=25 %.",
        ),
        ({}, ["--collect", "--submit"], "--collect and --submit are both given."),
        ({}, ["--parallel=4", "--host=http://h"], "--parallel and --host need --submit. Add it, or leave "),
        ({"metrics": ["perplexity", "parms"]}, [], "metrics: parms must be one of params, tokens, "),
        ({"picture": {"x": "q", "y": "params"}}, [], "picture.x: q must be one of method"),
        ({"picture": {"x": "method", "y": "wiki"}}, [], "picture.y: wiki must be one of "),
        ({"published": {"base": "base", "figures": [{"method": "X"}]}}, [], "'X' is no label of method"),
        ({"published": {"base": "base", "figures": [{"params": "many"}]}}, [], "'many' is not a count"),
    ],
)
def test_what_is_wrong_with_an_experiment_is_told_in_a_line(folder, changes, arguments, expected):
    (line,) = errors_of(experiment(write(folder, **changes), *arguments))
    assert expected in line
    assert not (folder / "output").exists()


def test_there_is_nothing_to_collect_without_a_store(path):
    (line,) = errors_of(experiment(path, "--collect"), status=1)
    assert line.startswith("storage.store=store is not there, so there is nothing to collect. Run the exp")


def test_the_table_has_mean_and_spread_over_the_seeds_beside_what_was_published(collected):
    _, out, records = collected
    rows = {
        tuple(row["labels"].values()): row for row in json.loads((out / "table.json").read_text())["rows"]
    }
    assert list(rows) == [("dense",), ("Ours", "25 %"), ("FLAP", "25 %")]
    ours = [records[f"Ours, removed 25 %, seed {seed}"]["phases"] for seed in (0, 1)]
    measured = [phases[-1]["perplexity"] for phases in ours]
    assert measured[0] != measured[1]
    found = rows["Ours", "25 %"]["metrics"]["perplexity"]
    assert found["values"] == measured
    assert found["mean"] == pytest.approx(sum(measured) / 2)
    assert found["spread"] == pytest.approx(abs(measured[0] - measured[1]) / 2**0.5)
    assert found["published"] is None
    flap = rows["FLAP", "25 %"]
    assert (flap["done"], flap["asked"]) == (1, 2)
    assert flap["metrics"]["perplexity"]["published"] == 321
    assert flap["metrics"]["perplexity"]["spread"] is None
    assert rows[("dense",)]["metrics"]["params"]["mean"] == ours[0][0]["params"]
    assert rows[("dense",)]["metrics"]["params"]["published"] == 12_300_000


def test_the_files_say_what_is_not_done(collected):
    result, out, records = collected
    missing = "FLAP, removed 25 %, seed 1: not started"
    assert missing in result.stdout.splitlines()
    markdown, page = (out / "table.md").read_text(), (out / "table.html").read_text()
    assert "3 of 4 runs are done" in markdown
    assert re.search(r"^\| FLAP \| 25 % \| 1 of 2 \| ", markdown, re.MULTILINE)
    assert f"* {missing}" in markdown
    assert f"<li>{missing}</li>" in page
    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert [row["method"] for row in rows] == ["dense", "Ours", "FLAP"]
    assert float(rows[2]["perplexity"]) == records["FLAP, removed 25 %, seed 0"]["phases"][-1]["perplexity"]
    assert rows[2]["perplexity_spread"] == ""


def test_the_page_is_whole_by_itself(collected):
    _, out, _ = collected
    page = (out / "table.html").read_text()
    assert page.count("<svg") == 1
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert (out / "table.svg").read_text() in page
    assert "FLAP (published)" in page


def test_a_run_is_found_by_what_changes_its_result_and_no_other(three_done, monkeypatch):
    folder, path, _ = three_done
    monkeypatch.chdir(folder)

    def states(*overrides):
        return [found.state for found in found_runs(load_experiment(path, overrides).cells).values()]

    assert states() == ["done"] * 3 + ["not started"]
    assert states("tracking.experiment=other", "calibration.micro_batch=2") == states()
    assert states("calibration.sequences=11") == ["not started"] * 4
    measured = "measured under other settings, phase 1 of 1"
    assert states("evaluation.perplexity_windows=4") == [measured] * 3 + ["not started"]


def test_a_number_format_that_was_settled_is_that_of_the_run(folder):
    changes = dict.fromkeys(("calibration.precision", "training.precision", "evaluation.precision"), "auto")
    path = write(folder, set=FILE["set"] | changes)
    cells = load_experiment(path, seeds=1, only=["method=Ours"]).cells
    run_all(cells[0].settings.to_dict(), folder / "artifacts")
    assert found_runs(cells)[cells[0].key].state == "done"
    other = load_experiment(path, ["training.precision=bfloat16"], seeds=1, only=["method=Ours"]).cells
    settled = found_runs(cells)[cells[0].key].run.settings.training.precision
    assert (found_runs(other)[other[0].key].state == "done") == (settled == "bfloat16")


def test_a_base_model_that_has_changed_makes_other_runs(three_done, monkeypatch):
    folder, path, _ = three_done
    monkeypatch.chdir(folder)
    cells, store = load_experiment(path).cells, open_store("store")
    (revision,) = {run.run.revision for run in find_runs(cells, store).values() if run.run}
    assert [f.state for f in find_runs(cells, store, revision=revision).values()].count("done") == 3
    assert {f.state for f in find_runs(cells, store, revision="another").values()} == {"not started"}


def test_of_runs_that_began_at_two_revisions_the_last_active_one_counts(three_done, monkeypatch, tmp_path):
    folder, path, _ = three_done
    copy = shutil.copytree(folder, tmp_path / "project")
    monkeypatch.chdir(copy)
    cell = load_experiment(path).cells[0]
    first = found_runs([cell])[cell.key].run
    runs = copy / "store" / "runs"
    shutil.copytree(runs / first.key, runs / "other")
    told = json.loads((runs / "other" / "run.json").read_text())
    (runs / "other" / "run.json").write_text(json.dumps(told | {"key": "other", "revision": "moved"}))
    for revision, earlier in (("moved", first.key), (first.revision, "other")):
        for file in filter(Path.is_file, runs.rglob("*")):
            os.utime(file, times=(0, 10**9 + (earlier not in file.parts)))
        assert found_runs([cell])[cell.key].run.revision == revision


def test_single_layers_are_studied_once_the_runs_are_done(three_done, monkeypatch, tmp_path):
    folder, _, _ = three_done
    monkeypatch.chdir(folder)
    changes = {"sensitivity": {"sparsity": 0.4}, "metrics": ["perplexity"], "published": {"base": "base"}}
    path = write(folder, **changes, picture={"x": "layer", "y": "perplexity", "by": "method"})
    result = experiment(path, "--only", "method=Ours", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "2 runs, of which 2 are done" in result.stderr
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    ours = {"method": "Ours", "removed": "25 %"}
    layers = [{"layer": str(layer)} for layer in range(3)]
    assert [row["labels"] for row in rows] == [
        *({"method": "dense"} | layer for layer in layers),
        *(ours | layer for layer in layers),
    ]
    assert {(row["done"], row["asked"]) for row in rows} == {(2, 2)}
    files = sorted((tmp_path / "out").glob("*/sensitivity.json"))
    studies = [json.loads(file.read_text()) for file in files]
    assert [(study["sparsity"], len(study["layers"])) for study in studies] == [(0.4, 3)] * 4
    of_ours = [study["layers"][2]["perplexity"] for study in studies if study["model"].endswith("final")]
    assert sorted(rows[5]["metrics"]["perplexity"]["values"]) == sorted(of_ours)
    written = [file.stat().st_mtime_ns for file in files]
    assert experiment(path, "--only", "method=Ours", "--output", tmp_path / "out").exit_code == 0
    assert [file.stat().st_mtime_ns for file in files] == written
    write(folder, **(changes | {"sensitivity": {"sparsity": 0.2}}), picture={"x": "layer", "y": "perplexity"})
    result = experiment(path, "--only", "method=Ours", "--seeds", "1", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    others = sorted({*(tmp_path / "out").glob("*/sensitivity.json")} - {*files})
    assert [json.loads(file.read_text())["sparsity"] for file in others] == [0.2] * 2
    weaker = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert {(row["done"], row["asked"]) for row in weaker} == {(1, 1)}
    for part in (slice(3), slice(3, 6)):  # of the base model, and of ours
        found = [row["metrics"]["perplexity"]["mean"] for row in weaker[part]]
        assert found != [row["metrics"]["perplexity"]["values"][0] for row in rows[part]]


def started(folder, path):
    """Start the command as its user does; all its processes form one group."""
    command, environment = command_line("experiment", path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def test_a_killed_experiment_goes_on_and_a_run_that_fails_stops_no_other(folder):
    methods = {"Too small": {"prune.target": "1k"}, **FILE["axes"]["method"]}
    path = write(folder, axes={"removed": FILE["axes"]["removed"], "method": methods})
    cells = {cell.name: cell for cell in load_experiment(path).cells}
    output = folder / "output" / "experiments" / "two"
    log = output / cells["removed 25 %, Ours, seed 1"].key / "run.log"
    with killed_at_the_end(started(folder, path)) as process:
        while not log.exists() or "prune-step: started" not in log.read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    assert not (output / "table.md").exists()
    before = experiment(path, "--collect").stdout
    assert "removed 25 %, Ours, seed 1: interrupted, phase 1 of 1" in before.splitlines()

    with started(folder, path) as process:
        shown, told = process.communicate()
    assert process.returncode == 1, told
    assert "6 runs, of which 1 are done" in told.splitlines()
    assert "error: 2 of 6 runs have failed, as said above." in told
    assert re.search("calibrate: already done", log.read_text())
    for seed in (0, 1):
        (line,) = [
            line for line in shown.splitlines() if line.startswith(f"removed 25 %, Too small, seed {seed}: ")
        ]
        assert "failed: resolve-base failed: prune.target=1,000 parameters cannot be reached" in line
    rows = json.loads((output / "table.json").read_text())["rows"]
    assert [(row["labels"].get("method"), row["done"]) for row in rows] == [
        (None, 1),
        ("Too small", 0),
        ("Ours", 2),
        ("FLAP", 2),
    ]
    for row in rows[2:]:
        assert len(set(row["metrics"]["perplexity"]["values"])) == 2
    assert {found.state for found in found_runs([cells["removed 25 %, FLAP, seed 1"]]).values()} == {"done"}
