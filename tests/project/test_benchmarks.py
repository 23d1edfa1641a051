"""The programs in benchmarks/: all can be started; the comparison of methods resumes and computes right."""

import json
import runpy
import sys

import pytest

from tests.conftest import tokenizer_of
from tests.support.project import ROOT, make_project

PROGRAMS = sorted((ROOT / "benchmarks").glob("*.py"))
METHODS = ROOT / "benchmarks" / "methods.py"


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
        "--criteria activation_l2 --steps 1 2 --repairs none ridge once --tokens 240 --seeds 2"
    )
    monkeypatch.setattr(sys, "argv", command.split())

    def run():
        runpy.run_path(str(METHODS), run_name="__main__")
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        return rows, json.loads(capsys.readouterr().out.splitlines()[-1])

    rows, last = run()
    perplexity = {
        (row["steps"], row["repair"], row["seed"]): row["perplexity"]["manual"]
        for row in rows
        if row["removed"]
    }
    assert len(rows) == 13 == len(perplexity) + 1
    assert all(row["left"] == pytest.approx(1 - row["removed"], abs=0.02) for row in rows)
    dense = last["dense_ppl"]["manual"]
    assert dense not in perplexity.values()

    # One repair after one step is a repair after each step; two steps choose and repair otherwise.
    for seed in (0, 1):
        assert perplexity[1, "once", seed] == perplexity[1, "ridge", seed]
        assert perplexity[2, "once", seed] != perplexity[2, "ridge", seed]
        assert perplexity[2, "none", seed] != perplexity[1, "none", seed]
    first, second = (
        (perplexity[2, "once", seed] - dense) / (perplexity[2, "none", seed] - dense) for seed in (0, 1)
    )
    expected = {"mean": (first + second) / 2, "spread": abs(first - second) / 2**0.5, "seeds": 2}
    found = last["rise_ratios_20"]["activation_l2, 2 steps, once 0.1 240"]["manual"]
    assert found == pytest.approx(expected, abs=1e-3)
    means = [
        (perplexity[steps, repair, 0] + one) / 2 for (steps, repair, seed), one in perplexity.items() if seed
    ]
    assert last["best_ppl_20"]["manual"]["mean"] == pytest.approx(min(means), abs=1e-3)

    # A stopped run measures what is missing alone. Rows of another set are left alone, and left out.
    row = rows.pop(4)
    other = {**rows[-1], "inputs": "others", "perplexity": {"manual": 0.0}}
    results.write_text("".join(json.dumps(row) + "\n" for row in [*rows, other]))
    again, same = run()
    assert again[:-1] == [*rows, other]
    assert {**again[-1], "seconds": 0} == {**row, "seconds": 0}
    assert same == last
