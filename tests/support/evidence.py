"""Trials of the reliability tests and their outcomes.

A test calls ``note`` with what it has seen. If ``EVIDENCE`` names a file, the notes are collected there, and
``python -m tests.support.evidence NOTES docs`` writes them as tables to ``reliability-evidence.md`` of that
folder, and their totals to ``reliability.md``.
"""

import datetime
import json
import os
import re
import sys
from pathlib import Path

EVIDENCE = "ADAPT_PRUNER_EVIDENCE"
EVIDENCE_HEAD = """# Evidence

The trials behind the promises of [reliability.md](reliability.md): how often each ran, and with what outcome.
Written by `make torture`; do not edit.
"""
TABLES = (
    "Publishing",
    "Integrity",
    "Faults",
    "Kills",
    "Resumed training",
    "Leases and cleaning",
    "Security",
)
"""The tables, in their order."""


def note(table, tried, happened, times=1):
    """Add a row to one of ``TABLES``, or ``times`` to an equal row.

    What was tried, and what was observed to happen, hold nothing that changes from run to run.
    """
    path = os.environ.get(EVIDENCE)
    if path:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0].rpartition("/")[2]
        row = {"table": table, "tried": tried, "happened": happened, "test": test, "times": times}
        with open(path, "a") as file:  # one short write: processes may append at the same time
            file.write(json.dumps(row) + "\n")


def tables(lines):
    """Return, for each table, its rows in the order of their first note: (tried, happened, test) to times."""
    found = {}
    for line in lines:
        row = json.loads(line)
        rows = found.setdefault(row["table"], {})
        key = (row["tried"], row["happened"], row["test"])
        rows[key] = rows.get(key, 0) + row["times"]
    return found


def evidence(found, when):
    """Return the page with all rows of ``tables``, noted on the day ``when``."""
    if unknown := found.keys() - set(TABLES):
        raise ValueError(f"no place for the tables: {', '.join(sorted(unknown))}")
    lines = [EVIDENCE_HEAD]
    for name in TABLES:
        rows = found.get(name, {})
        lines += [f"## {name}", "", f"{sum(rows.values()):,} trials, last run on {when}.", ""]
        lines += ["| trial | times | outcome | test |", "|---|---:|---|---|"]
        for (tried, happened, test), times in sorted(rows.items()):
            lines.append(f"| {_cell(tried)} | {times:,} | {_cell(happened)} | {test} |")
        lines.append("")
    return "\n".join(lines)


def with_summary(document, found, when):
    """Return a document with the totals between ``<!-- summary -->`` and ``<!-- end -->``."""
    rows = [
        f"| [{name}](reliability-evidence.md#{name.lower().replace(' ', '-')}) "
        f"| {len(found.get(name, {})):,} | {sum(found.get(name, {}).values()):,} | {when} |"
        for name in TABLES
    ]
    table = "\n".join(["| area | kinds of trial | trials | last run |", "|---|---:|---:|---|", *rows])
    written, places = re.subn(
        r"(<!-- summary -->\n).*?(<!-- end -->)", rf"\1{table}\n\2", document, flags=re.DOTALL
    )
    if places != 1:
        raise ValueError(f"{places} places for the summary, 1 wanted")
    return written


def _cell(text):
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    notes, folder = map(Path, sys.argv[1:])
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    found = tables(notes.read_text().splitlines())
    (folder / "reliability-evidence.md").write_text(evidence(found, today))
    promises = folder / "reliability.md"
    promises.write_text(with_summary(promises.read_text(), found, today))
