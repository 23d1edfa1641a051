"""What the reliability tests try, how often, and what happens: the rows of docs/reliability.md.

A test calls ``note`` with what it has seen. Where ``EVIDENCE`` names a file the notes are collected there.
"""

import json
import os

EVIDENCE = "ADAPT_PRUNER_EVIDENCE"


def note(table, tried, happened, times=1):
    """Add a row, or ``times`` to an equal one.

    Args:
        table: The table's heading: Transfers, Publishing, Integrity, Faults, Kills, Resumed training, Leases
            and cleaning, or Security.
        tried: What was done to the program, without what changes from run to run.
        happened: What came of it, made of what was observed; without paths, times and other noise.
        times: How often.
    """
    path = os.environ.get(EVIDENCE)
    if path:
        row = {"table": table, "tried": tried, "happened": happened, "times": times}
        with open(path, "a") as file:  # one short write: processes may append at the same time
            file.write(json.dumps(row) + "\n")
