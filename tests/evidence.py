"""What the reliability tests try, how often, and what happens: the tables of docs/reliability.md.

A test calls ``note`` with what it has seen. Where ``EVIDENCE`` names a file the notes are collected there,
and ``python -m tests.evidence NOTES docs/reliability.md`` writes them into the document's tables.
"""

import datetime
import json
import os
import re
import sys
from pathlib import Path

EVIDENCE = "ADAPT_PRUNER_EVIDENCE"


def note(table, tried, happened, times=1):
    """Add a row, or ``times`` to an equal one.

    Args:
        table: The table's heading: Publishing, Integrity, Faults, Kills, Resumed training, Leases and
            cleaning, or Security.
        tried: What was done to the program, without what changes from run to run.
        happened: What came of it, made of what was observed; without paths, times and other noise.
        times: How often.
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


def render(document, lines, when):
    """Return the document with all of its tables written anew.

    Args:
        document: Markdown, in which ``<!-- table NAME -->`` and ``<!-- end -->`` enclose each table.
        lines: What ``note`` has written.
        when: The day of the notes.

    Raises:
        ValueError: If a table of the notes has no place in the document.
    """
    found = tables(lines)

    def table(match):
        name = match[1]
        rows = sorted(found.pop(name, {}).items())
        total = f"{sum(times for _, times in rows):,} tries in all, last made on {when}."
        head = "| tried | times | what happened | test |\n|---|---:|---|---|"
        body = [
            f"| {_cell(tried)} | {times:,} | {_cell(happened)} | {test} |"
            for (tried, happened, test), times in rows
        ]
        return "\n".join([f"<!-- table {name} -->", total, "", head, *body, "<!-- end -->"])

    written = re.sub(r"<!-- table ([^>]+) -->.*?<!-- end -->", table, document, flags=re.DOTALL)
    if found:
        raise ValueError(f"no place in the document for: {', '.join(found)}")
    return written


def _cell(text):
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    notes, target = map(Path, sys.argv[1:])
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    target.write_text(render(target.read_text(), notes.read_text().splitlines(), today))
