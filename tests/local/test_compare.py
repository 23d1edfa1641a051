"""``adapt-pruner compare`` on made-up runs in a store."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from core.evaluation.items import GroupMetric, ItemResults, Items, MetricItems
from core.evaluation.observed import observed
from core.runs.finding import place_of
from pipelines.cli import main
from tests.support.project import call
from tests.support.stored_runs import write_run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "store"
    keys = {
        "demo": write_run(folder, "demo", phases=2, layers=3, speed=True),
        "twin": write_run(folder, "twin", phases=2, layers=3, settings={"prune.method": "flap"}),
        "weak": write_run(folder, "weak", phases=2, layers=3, skill=0.1),
        "half": write_run(folder, "half", phases=3, layers=3, done=1),
        "bare": write_run(folder, "bare", phases=2, layers=3, done=0),
    }
    for place in (folder / "runs" / keys["bare"] / "phases").iterdir():
        for file in place.rglob("*"):
            if file.is_file():
                file.unlink()
    return folder, keys


def compare(*arguments, code=0, **environment):
    result = CliRunner().invoke(main, ["compare", *map(str, arguments)], env=environment)
    assert result.exit_code == code, result.output
    return result.output


def rows_of(output):
    """The first words of the lines of the table."""
    return [line.split()[0] for line in output.splitlines()[1:] if line.startswith(" ") and line.split()]


def test_a_store_is_compared_whole_and_each_run_says_how_far_it_is(store):
    folder, keys = store
    output = compare(folder)
    assert set(keys) <= set(rows_of(output))
    assert "half: interrupted, phase 1 of 3; its figures are those of phase 1." in output
    assert "bare: interrupted, phase 0 of 2; not evaluated." in output


def test_a_run_that_an_older_version_has_measured_shows_what_it_was_published_with(tmp_path):
    def perplexities():
        compare(tmp_path / "store", "--csv", tmp_path / "c.csv")
        return [row["perplexity"] for row in csv.DictReader((tmp_path / "c.csv").open())]

    run = tmp_path / "store" / "runs" / write_run(tmp_path / "store", "old", phases=2, layers=3)
    before = perplexities()
    done, manifest = (json.loads((run / name).read_text()) for name in ("DONE.json", "final/MANIFEST.json"))
    (run / "DONE.json").write_text(json.dumps(done | {"measured": ["otherwise"]}))
    (run / "final/MANIFEST.json").write_text(json.dumps(manifest | {"metadata": {"measured": "otherwise"}}))
    for place in (run / "phases").glob("*/evaluated*"):
        shutil.rmtree(place)
    assert perplexities() == before
    assert "" not in before


def test_a_run_that_two_stores_hold_has_two_names(store, tmp_path):
    folder, keys = store
    other = tmp_path / "copied"
    shutil.copytree(folder, other)
    place = f"runs/{keys['demo']}"
    compare(f"{folder}/{place}", f"{other}/{place}", "--against", f"{other}/{place}", "--csv", tmp_path / "c")
    dense, *rows = csv.DictReader((tmp_path / "c").open())
    assert [row["run"] for row in rows] == [f"demo in {where}/{place}" for where in (folder, other)]
    assert rows[0]["perplexity"] == rows[1]["perplexity"] != dense["perplexity"]
    assert [bool(row["perplexity_difference"]) for row in rows] == [True, False]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["demo"], ["demo"]),
        (["prune.method=flap"], ["twin"]),
        (["evaluation.speed=false"], ["demo", "twin", "weak", "half", "bare"]),
        (["weak", "demo", "weak"], ["weak", "demo"]),
        (["SmolLM2-135M"], ["demo", "twin", "weak", "half", "bare"]),
        (["KEY of half"], ["half"]),
        (["PLACE of twin", "demo"], ["twin", "demo"]),
    ],
)
def test_runs_are_found_by_name_key_base_setting_and_place(store, wanted, found):
    folder, keys = store
    for i, text in enumerate(wanted):
        if " of " in text:
            kind, _, name = text.partition(" of ")
            wanted[i] = keys[name][:6] if kind == "KEY" else f"{folder}/runs/{keys[name]}/final"
    rows = [name for name in rows_of(compare(*wanted, "--store", folder)) if name in keys]
    assert rows == found if len(found) < 5 else set(rows) == set(found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["dem", "wea", "--store", "STORE"],
            ["dem: no such run", "Near: demo", "wea: no such run"],
        ),
        (["none/runs/0123456789ab"], ["none is not a folder"]),
        (["/nowhere"], ["/nowhere is not a folder"]),
        (["--store", "STORE", "--against", "SmolLM2-135M", "demo"], ["names 5 runs", "Give the key of one"]),
        (["models:/a@b", "--store", "STORE"], ["no tracking URI is given"]),
        (["demo", "--store", "STORE", "--html", "STORE"], ["cannot be written"]),
    ],
)
def test_what_is_not_there_is_said_with_what_is_near(store, arguments, said):
    folder, _ = store
    arguments = [str(folder) if each == "STORE" else each for each in arguments]
    code = 1 if arguments[0].startswith("models:") else 2
    output = compare(*arguments, code=code, MLFLOW_TRACKING_URI="")
    assert all(text in output for text in said), output


def test_differences_from_a_run_come_with_their_significance(store, tmp_path):
    folder, keys = store
    files = {kind: tmp_path / f"c.{kind}" for kind in ("csv", "markdown", "html")}
    options = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    output = compare(folder, "--against", "demo", *options)
    rows = {row["run"]: row for row in csv.DictReader(files["csv"].open())}
    assert rows["weak"]["perplexity_verdict"] == rows["weak"]["accuracy_verdict"] == "worse"
    assert rows["twin"]["accuracy_verdict"] == "no difference shown"
    assert rows["demo"]["accuracy_verdict"] == rows["bare"]["perplexity_verdict"] == ""
    assert "speed in torch" in rows["demo"]
    phase = folder / "runs" / keys["weak"] / "phases" / "02"
    report = json.loads(next(phase.glob("evaluated-*/report.json")).read_text())
    assert float(rows["weak"]["perplexity"]) == report["perplexity"]
    assert float(rows["weak"]["arc_easy"]) == report["tasks"]["arc_easy"]["acc_norm,none"]
    # A preset is the mean of its tasks.
    ends = ("difference", "difference_low", "difference_high", "verdict")
    assert [rows["weak"][f"both_{end}"] for end in ends] == [rows["weak"][f"accuracy_{end}"] for end in ends]
    # Compared with a run that is not asked for, that one has a row, too.
    rows = rows_of(compare("weak", "--store", folder, "--against", "demo"))
    assert [name for name in rows if name in keys] == ["demo", "weak"]
    assert "paired bootstrap" in output
    assert "| weak |" in files["markdown"].read_text()
    assert "Pareto front" in files["html"].read_text()


def test_a_group_pools_the_items_of_its_members():
    def answers(*values):
        metric = MetricItems(kind="mean", values=values)
        return ItemResults(items=tuple(f"{i}" for i in range(len(values))), metrics={"acc": metric})

    pooled = GroupMetric(members=(("a", "acc"), ("b", "acc")), by_size=True)
    items = Items(tasks={"a": answers(1.0, 0.0), "b": answers(0.0, 0.0, 1.0)}, groups={"g": {"acc": pooled}})
    (found,) = observed(items, "g", "acc").values()
    assert list(found.ids) == ["a/0", "a/1", "b/0", "b/1", "b/2"]
    assert list(found.values) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert observed(items, "g", "acc_norm") == observed(items, "c", "acc") == {}


def test_a_report_of_a_run_so_far_compares_it_with_another_one(store, tmp_path):
    folder, _ = store
    path = tmp_path / "report.html"
    command = ["report", "half", "--store", str(folder), "--against", "weak", "-o", str(path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "interrupted, phase 1 of 3" in result.output
    html = path.read_text()
    assert "Compared with weak" in html
    assert "], better</td>" in html
    assert "Width of every layer" in html
    assert CliRunner().invoke(main, [*command[:4], "-o", str(path)]).exit_code == 0
    assert "Compared with" not in path.read_text()


def test_a_damaged_run_spoils_no_other(store, tmp_path):
    folder = tmp_path / "store"
    write_run(folder, "good", phases=1, layers=2)
    bad = write_run(folder, "bad", phases=1, layers=2)
    record = folder / "runs" / bad / "final" / "record.json"
    record.write_text(record.read_text().replace("0", "1", 1))
    output = compare(folder)
    assert {"good", "bad"} <= set(rows_of(output))
    assert "bad: " in output
    assert "record.json" in output
    (folder / "runs" / bad / "run.json").write_text("{")
    assert "damaged" in compare(folder)


def test_a_registered_version_is_found_by_its_alias(store, tmp_path):
    from core.tracking.client import connect

    folder, keys = store
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    client.create_registered_model("tiny")
    checkpoint = f"{folder}/runs/{keys['twin']}/final"
    client.create_model_version("tiny", source=checkpoint, tags={"checkpoint_uri": checkpoint})
    client.set_registered_model_alias("tiny", "candidate", "1")
    for model in ("models:/tiny@candidate", "models:/tiny/1"):
        assert [name for name in rows_of(compare(model, "--tracking-uri", uri)) if name in keys] == ["twin"]
    said = compare("models:/tiny@champion", "--tracking-uri", uri, code=1)
    assert "models:/tiny@champion is not in the registry" in said
    assert "tiny" in compare("models:/tin@candidate", "--tracking-uri", uri, code=1)


@pytest.mark.parametrize("name", ["qwen", "0123456789ab"])
def test_a_store_in_a_folder_called_runs_is_found(tmp_path, name):
    store = tmp_path / "runs" / name
    key = write_run(store, "demo", phases=1, layers=2)
    assert "demo" in rows_of(compare("--store", store))
    assert "demo" in rows_of(compare("demo", "--store", store))
    assert "demo" in rows_of(compare(store / "runs" / key))
    for command in (["watch"], ["report", "demo", "-o", tmp_path / "report.html"]):
        result = call(*command, "--store", store)
        assert result.exit_code == 0, result.output
        assert "done" in result.output
    if name == "qwen":  # else it is called as a run is
        assert "demo" in rows_of(compare(store))


def test_a_store_without_runs_is_named(tmp_path):
    (tmp_path / "runs" / "qwen").mkdir(parents=True)
    for arguments in (["--store", tmp_path / "runs" / "qwen"], [tmp_path / "runs" / "qwen"]):
        assert f"no such run: {tmp_path}/runs/qwen holds none" in compare(*arguments, code=2)


def test_a_place_is_a_run_in_a_store_or_a_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("store", "runs").mkdir(parents=True)
    Path("demo").mkdir()
    assert place_of("store/runs/0123456789ab/final") == ("store", "0123456789ab")
    assert place_of("s3://bucket/a/runs/0123456789ab") == ("s3://bucket/a", "0123456789ab")
    assert place_of("/runs/qwen/runs/0123456789ab") == ("/runs/qwen", "0123456789ab")
    for place in ("s3://bucket/a", "s3://bucket/runs", "s3://bucket/runs/qwen", "/x/runs/qwen"):
        assert place_of(place) == (place, "")
    assert place_of("store") == ("store", "")
    assert place_of("demo") == place_of("org/model") == ("", "")
