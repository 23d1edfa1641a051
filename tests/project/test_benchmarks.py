"""The programs in benchmarks/: all can be started; the comparisons resume and compute right."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch

from core.model.build import load_model, load_tokenizer
from tests.conftest import tokenizer_of
from tests.support.project import ROOT, make_project

PROGRAMS = sorted((ROOT / "benchmarks").glob("*.py"))
METHODS = ROOT / "benchmarks" / "methods.py"
RECOVERY = ROOT / "benchmarks" / "recovery.py"
ROWS = (
    "method=adapt-pruner",
    "criterion=activation_l2,steps_per_phase=2,distill_steps=2,distill_batch_tokens=48",
    "method=flap",
    "method=grail",
)


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


ALONE = """
import runpy, sys
before = list(sys.path)
for program in sys.argv[1:]:
    sys.path[:] = [program.rpartition("/")[0], *before]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    try:
        runpy.run_path(program, run_name="imported")
    except ImportError as error:
        print(program, error)
"""


def test_every_benchmark_finds_what_it_imports(tmp_path):
    """As ``python benchmarks/NAME.py`` does, which has less on its path than tests have."""
    assert len(PROGRAMS) > 10
    command, environment = [sys.executable, "-c", ALONE, *map(str, PROGRAMS)], dict(os.environ)
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tokenizer_definition):
    """A tiny project whose MLPs hold enough to remove a fifth in multiples of 32."""
    folder = tmp_path_factory.mktemp("wide")
    return make_project(folder / "project", tokenizer_of(tokenizer_definition), {"intermediate_size": 128})


def test_methods_side_by_side(wide, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.jsonl"
    command = (
        f"methods.py --model {wide / 'base'} --calibrate-on {wide / 'texts.jsonl'} --results {results} "
        f"--measure-on manual={wide / 'held-out.txt'} --sequences 6 --length 24 --windows 1 --removed 0.2 "
        f"--rows {' '.join(ROWS)} --tokens 240 --seeds 2 --picture {tmp_path / 'rows.svg'}"
    )
    monkeypatch.setattr(sys, "argv", command.split())

    def run():
        runpy.run_path(str(METHODS), run_name="__main__")
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        return rows, json.loads(capsys.readouterr().out.splitlines()[-1])

    rows, last = run()
    perplexity = {(row["row"], row["seed"]): row["perplexity"]["manual"] for row in rows if row["removed"]}
    assert len(rows) == 9 == len(perplexity) + 1
    assert all(row["left"] == pytest.approx(1 - row["removed"], abs=0.02) for row in rows)
    dense = last["dense_ppl"]["manual"]
    assert len({dense, *perplexity.values()}) == 9  # no row is another

    means = {name: (perplexity[name, 0] + perplexity[name, 1]) / 2 for name in ROWS}
    assert last["best_ppl_20"]["manual"]["mean"] == pytest.approx(min(means.values()), abs=1e-3)
    peer = min(ROWS[2:], key=means.__getitem__)
    assert last["best_peer_20"] == {"manual": peer}
    first, second = (
        (perplexity[ROWS[0], seed] - dense) / (perplexity[peer, seed] - dense) for seed in (0, 1)
    )
    expected = {"mean": (first + second) / 2, "spread": abs(first - second) / 2**0.5, "seeds": 2}
    assert last["rise_ratio_20"]["manual"] == pytest.approx(expected, abs=1e-3)

    drawn = re.findall(r">([^<>]+)</text>", (tmp_path / "rows.svg").read_text())
    assert {"our default", "flap", "grail", "perplexity on manual", "20% removed"} <= set(drawn)
    spreads = {name: abs(perplexity[name, 0] - perplexity[name, 1]) / 2**0.5 for name in ROWS}
    assert {f"{means[name]:.1f} ± {spreads[name]:.1f}" for name in ROWS} <= set(drawn)

    # A stopped run measures what is missing alone. Rows of another set are left alone, and left out.
    row = rows.pop(4)
    other = {**rows[-1], "inputs": "others", "perplexity": {"manual": 0.0}}
    results.write_text("".join(json.dumps(row) + "\n" for row in [*rows, other]))
    again, same = run()
    assert again[:-1] == [*rows, other]
    unlike = {"seconds": 0, "peak_gb": 0}
    assert again[-1] | unlike == row | unlike
    timed = {"seconds_20": 0, "peak_gb_20": 0}
    assert same | timed == last | timed


def test_a_picture_of_rows_has_each_seed_where_its_row_stands():
    from standings import picture

    def measured(row, seed, perplexity, accuracy, **settings):
        removed = 0.2 if row else 0.0
        found = {"perplexity": {"accuracy": perplexity}, "accuracy": {"piqa": accuracy}}
        return {"row": row, "removed": removed, "seed": seed, "settings": settings, **found}

    peer = {"method": "flap"}
    figure = picture(
        [
            measured("", 0, 20.0, 0.7),
            measured("method=flap", 0, 50.0, 0.5, **peer),
            measured("method=flap", 1, float("inf"), 0.4, **peer),
            measured("method=adapt-pruner", 0, 30.0, 0.6),
            measured("method=adapt-pruner", 1, 32.0, 0.5),
        ],
        ["accuracy"],
    )
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["our default", "flap"]
    for ax, values in ((left, [[30.0, 32.0], [50.0]]), (right, [[0.6, 0.5], [0.5, 0.4]])):
        dots = [line for line in ax.get_lines() if line.get_marker() in ("o", "s")]
        assert [(line.get_marker(), list(line.get_xdata())) for line in dots] == list(
            zip("os", values, strict=True)
        )
        assert [set(line.get_ydata()) for line in dots] == [{0}, {1}]
    assert [text.get_text() for text in right.texts] == ["0.550 ± 0.071", "0.450 ± 0.071"]


@pytest.mark.parametrize("name", ["rows.png", "missing/rows.svg"])
def test_a_picture_that_could_not_be_written_is_refused_before_anything_is_measured(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["methods.py", "--picture", str(tmp_path / name)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(METHODS), run_name="__main__")
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"--picture {tmp_path / name}: name a file that ends with .svg, in a folder that exists" in said


@pytest.mark.parametrize("share", ["0", "20"])
def test_a_share_that_is_none_is_refused(share, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["methods.py", "--removed", share])
    with pytest.raises(SystemExit):
        runpy.run_path(str(METHODS), run_name="__main__")
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"--removed {share}: a share of the parameters lies between 0 and 1" in said


@pytest.mark.slow
def test_settings_of_recovery_side_by_side(wide, tmp_path, monkeypatch, capsys):
    results, texts = tmp_path / "results.jsonl", wide / "texts.jsonl"
    rows = ("training.teacher=none", "training.teacher=base", "training.optimizer_state=carry")
    rows += ("prune.phases=1,training.packing=whole",)
    small = (
        f"calibration.source={{path: {texts}}}",
        "calibration.sequences=6",
        "calibration.sequence_length=24",
        "prune.steps_per_phase=1",
        f"training.sources=[{{path: {texts}}}]",
        "training.tokens=512",
        "training.sequence_length=32",
        "training.global_batch=4",
        "prune.phases=2",
    )
    command = ["recovery.py", "--model", wide / "base", "--measure-on", f"manual={wide / 'held-out.txt'}"]
    command += ["--windows", 1, "--seeds", 2, "--results", results, "--rows", *rows]
    command += [part for setting in small for part in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])

    def run():
        runpy.run_path(str(RECOVERY), run_name="__main__")
        found = [json.loads(line) for line in results.read_text().splitlines()]
        return found, json.loads(capsys.readouterr().out.splitlines()[-1])

    measured, last = run()
    perplexity = {(row["row"], row["seed"]): row["perplexity"]["manual"] for row in measured}
    assert len(measured) == 9 == len(set(perplexity.values()))
    dense = load_model(wide / "base")
    windows = write_windows(wide)
    assert last["dense_ppl"]["manual"] == pytest.approx(plain_perplexity(dense, windows), rel=1e-4)
    params = sum(p.numel() for p in dense.parameters())
    assert all(row["params"] == pytest.approx(0.8 * params, rel=0.02) for row in measured if row["row"])
    assert [len(row.get("losses", ())) for row in measured] == [0, *[4] * 8]
    means = {row: (perplexity[row, 0] + perplexity[row, 1]) / 2 for row in rows}
    assert {row: of["manual"]["mean"] for row, of in last["ppl"].items()} == pytest.approx(means, abs=1e-3)
    assert last["best"] == {"manual": min(means, key=means.__getitem__)}
    first, second = (perplexity[rows[1], seed] / perplexity[rows[0], seed] for seed in (0, 1))
    assert last["ratios"][rows[1]]["manual"]["mean"] == pytest.approx((first + second) / 2, abs=1e-3)

    # A stopped run measures what is missing alone; rows under other settings are left alone, and left out.
    row, other = measured.pop(4), {**measured[-1], "common": [], "perplexity": {"manual": 0.0}}
    results.write_text("".join(json.dumps(row) + "\n" for row in [*measured, other]))
    again, same = run()
    assert again[:-1] == [*measured, other]
    unlike = {"seconds": 0, "training_s": 0, "peak_gb": 0}
    assert again[-1] | unlike == row | unlike
    timed = {"seconds": 0, "peak_gb": 0}
    assert same | timed == last | timed


def write_windows(project):
    """The first 512 tokens of the held-out text, by the tokenizer itself."""
    text = (project / "held-out.txt").read_text()
    return torch.tensor(load_tokenizer(project / "base")(text)["input_ids"][:512])[None]


def plain_perplexity(model, windows):
    with torch.no_grad():
        return model(windows, labels=windows).loss.exp().item()
