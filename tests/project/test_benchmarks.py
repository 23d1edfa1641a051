"""The programs in benchmarks/: all can be started; the comparison of methods resumes and computes right."""

import json
import runpy
import sys

import pytest

from tests.conftest import tokenizer_of
from tests.support.project import ROOT, make_project

PROGRAMS = sorted((ROOT / "benchmarks").glob("*.py"))
METHODS = ROOT / "benchmarks" / "methods.py"
ROWS = (
    "method=adapt-pruner",
    "criterion=activation_l2,steps_per_phase=2,distill_steps=2,distill_batch_tokens=48",
    "method=flap",
    "method=grail",
)


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_every_benchmark_finds_what_it_imports(program):
    runpy.run_path(str(program), run_name="imported")


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
        f"--rows {' '.join(ROWS)} --tokens 240 --seeds 2"
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
