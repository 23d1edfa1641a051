import re
import subprocess
import sys

import pytest

from tests.support.evidence import EVIDENCE, TABLES, evidence, note, tables, with_summary
from tests.support.project import ROOT

DOCUMENT = "# R\n\n<!-- summary -->\nold\n<!-- end -->\n\ntext\n"


def notes(monkeypatch, path, *rows):
    monkeypatch.setenv(EVIDENCE, str(path))
    for row in rows:
        note(*row)
    return path.read_text().splitlines()


def test_equal_notes_are_added_up_and_old_rows_go(monkeypatch, tmp_path):
    rows = [("Kills", "a | b", "went on"), ("Kills", "a | b", "went on", 4), ("Kills", "a | b", "was lost")]
    found = tables(notes(monkeypatch, tmp_path / "notes", *rows))
    page = evidence(found, "2026-01-02")
    assert "| a \\| b | 5 | went on | test_evidence.py |" in page
    assert "| a \\| b | 1 | was lost | test_evidence.py |" in page
    assert "## Kills\n\n6 trials, last run on 2026-01-02.\n" in page
    assert page.count("\n0 trials") == len(TABLES) - 1
    summary = with_summary(DOCUMENT, found, "2026-01-02")
    assert "| [Kills](reliability-evidence.md#kills) | 2 | 6 | 2026-01-02 |" in summary
    assert "old" not in summary
    assert with_summary(summary, {}, "2026-01-03").count("| 0 | 0 | 2026-01-03 |") == len(TABLES)


def test_a_table_without_a_place_is_an_error(monkeypatch, tmp_path):
    found = tables(notes(monkeypatch, tmp_path / "notes", ("Lost", "x", "y")))
    with pytest.raises(ValueError, match="Lost"):
        evidence(found, "2026-01-02")


def test_a_document_without_a_place_for_the_summary_is_refused():
    with pytest.raises(ValueError, match="0 places"):
        with_summary("# R\n", {}, "2026-01-02")


def test_nothing_is_written_unless_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv(EVIDENCE, raising=False)
    note("Kills", "a", "b")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_both_pages(monkeypatch, tmp_path):
    notes(monkeypatch, tmp_path / "notes", ("Faults", "a cut line", "the rerun finished"))
    (tmp_path / "reliability.md").write_text(DOCUMENT)
    command = [sys.executable, "-m", "tests.support.evidence", str(tmp_path / "notes"), str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert "a cut line" in (tmp_path / "reliability-evidence.md").read_text()
    assert "| [Faults](reliability-evidence.md#faults) | 1 | 1 |" in (tmp_path / "reliability.md").read_text()


def test_the_summary_in_docs_is_that_of_the_evidence_beside_it():
    page = (ROOT / "docs" / "reliability-evidence.md").read_text()
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    summary = re.findall(
        r"^\| \[(.+?)\]\(.+?\) \| ([\d,]+) \| ([\d,]+) \|",
        (ROOT / "docs" / "reliability.md").read_text(),
        re.MULTILINE,
    )
    assert tuple(sections) == TABLES == tuple(name for name, *_ in summary)
    for name, kinds, trials in summary:
        rows = re.findall(r"^\| .+? \| ([\d,]+) \| .+ \| test_\w+\.py \|$", sections[name], re.MULTILINE)
        assert len(rows) == int(kinds.replace(",", "")), name
        assert sum(int(times.replace(",", "")) for times in rows) == int(trials.replace(",", "")), name
        assert f"\n{trials} trials" in sections[name], name
