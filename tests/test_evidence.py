import pytest

from tests.evidence import EVIDENCE, note, render

DOCUMENT = "# R\n\n<!-- table Kills -->\nold\n<!-- end -->\n\ntext\n\n<!-- table Faults --><!-- end -->\n"


def notes(monkeypatch, path, *rows):
    monkeypatch.setenv(EVIDENCE, str(path))
    for row in rows:
        note(*row)
    return path.read_text().splitlines()


def test_equal_notes_are_added_up_and_old_rows_go(monkeypatch, tmp_path):
    rows = [("Kills", "a | b", "went on"), ("Kills", "a | b", "went on", 4), ("Kills", "a | b", "was lost")]
    text = render(DOCUMENT, notes(monkeypatch, tmp_path / "notes", *rows), "2026-01-02")
    assert "| a \\| b | 5 | went on | test_evidence.py |" in text
    assert "| a \\| b | 1 | was lost | test_evidence.py |" in text
    assert "6 tries in all, last made on 2026-01-02." in text
    assert "old" not in text
    assert "0 tries in all" in text
    assert render(text, [], "2026-01-03").count("<!-- end -->") == 2


def test_a_table_without_a_place_is_no_secret(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="Lost"):
        render(DOCUMENT, notes(monkeypatch, tmp_path / "notes", ("Lost", "x", "y")), "2026-01-02")


def test_nothing_is_written_unless_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv(EVIDENCE, raising=False)
    note("Kills", "a", "b")
    assert list(tmp_path.iterdir()) == []
