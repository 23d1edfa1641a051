"""``adapt-pruner doctor``: whether a cluster has what a recipe needs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from core.errors import SettingsError
from pipelines.commands.access import access_options, prepared, run_options
from pipelines.commands.checking import EVERY_S, TIMEOUT_S, lines_of
from pipelines.commands.console import PATH, example
from pipelines.commands.submit import seconds_of


@click.command(
    epilog=example(
        "adapt-pruner doctor recipes/table1-llama-3.2-3b.yaml --host https://kubeflow.example.org/pipeline "
        "--set storage.store=s3://models/pruning --kubeconfig ~/.kube/config"
    )
)
@click.argument("recipe", type=PATH)
@run_options
@click.option(
    "--kubeconfig", type=PATH, help="Ask Kubernetes, too, by this file and its --kube-context.  [default: no]"
)
@click.option(
    "--timeout", default=f"{TIMEOUT_S / 60:.0f}min", show_default=True, help="How long to wait for the pods."
)
@click.option("--every", default=f"{EVERY_S:.0f}s", show_default=True, help="Polling interval.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
@access_options
def doctor(
    recipe: Path,
    overrides: tuple[str, ...],
    parameters: tuple[str, ...],
    experiment: str,
    service_account: str,
    kubeconfig: Path | None,
    timeout: str,
    every: str,
    as_json: bool,
    **access: Any,
) -> None:
    """Check whether a cluster has what RECIPE needs.

    A small pipeline starts pods with the image, resources, nodes, volumes, secret and config map of the
    run's; they try the store, MLflow, the accelerators and the disk, which takes about a minute. It is
    deleted afterwards. Each line is ok, a note, or says what to fix; the exit status is 1 if there is
    something to fix.
    """
    timeout_s, poll_s = seconds_of("timeout", timeout), seconds_of("every", every)
    if not timeout_s or not poll_s:
        raise SettingsError(["--timeout and --every must be longer than 0. Give times such as 5min and 5s."])
    submission = prepared(recipe, overrides, parameters, service_account)

    from pipelines.remote.client import connect
    from pipelines.remote.doctor import examine
    from pipelines.remote.kubernetes_api import Kubernetes

    kubernetes = None
    if kubeconfig is not None or access["kube_context"]:
        kubernetes = Kubernetes(kubeconfig, access["kube_context"])
    if kubeconfig is not None and access["host"]:
        access["kube_context"] = ""  # it is of the kubeconfig: Kubeflow Pipelines is at --host
    client = connect(**access)
    found = examine(
        client,
        submission,
        experiment=experiment,
        timeout_s=timeout_s,
        poll_s=poll_s,
        kubernetes=kubernetes,
    )
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in found], indent=1))
    else:
        for line in lines_of(found):
            click.echo(line)
    if any(finding.state == "fix" for finding in found):
        click.get_current_context().exit(1)
