"""The doctor before ``submit`` and ``schedule``: the option for it, and what it says, as lines."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from core.errors import ClusterError
from pipelines.commands.console import printable

if TYPE_CHECKING:
    from core.steps.check_pod import Finding
    from pipelines.remote.client import Client
    from pipelines.remote.submission import Submission

TIMEOUT_S, EVERY_S = 900.0, 5.0
"""How long the doctor waits for its pods, and between two requests, unless it is told otherwise."""


def check_option(default: bool) -> Callable[..., Any]:
    """Return the option by which a command asks the doctor first."""
    said = "First check what the doctor checks, and go on only if there is nothing to fix."
    return click.option("--check/--no-check", default=default, show_default=True, help=said)


def check_first(client: "Client", submission: "Submission", experiment: str) -> None:
    """Ask the doctor, and show what it says.

    Raises:
        ClusterError: If there is something to fix.
    """
    from pipelines.remote.doctor import examine

    click.echo("checking the cluster, which takes about a minute (--no-check leaves it out)", err=True)
    found = examine(
        client,
        submission,
        experiment=experiment,
        timeout_s=TIMEOUT_S,
        poll_s=EVERY_S,
    )
    for line in lines_of(found):
        click.echo(line, err=True)
    if wrong := sum(finding.state == "fix" for finding in found):
        raise ClusterError(
            f"no run was started and no schedule changed: {wrong} of the checks above say what to fix. Do "
            "that, or give --no-check."
        )


def lines_of(found: "list[Finding]") -> list[str]:
    """Return what the doctor says, a line a finding."""
    width = max(len(finding.check) for finding in found)
    return [printable(f"{each.state:<4}  {each.check:<{width}}  {each.said}") for each in found]
