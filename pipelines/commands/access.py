"""What ``submit`` and ``schedule`` share: the options for the login and the run, and the preparation."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.commands.console import PATH, set_option

if TYPE_CHECKING:
    from core.settings.schema import Settings
    from pipelines.remote.submission import Needs, Submission

_RUN = (
    set_option,
    click.option(
        "--param",
        "parameters",
        multiple=True,
        metavar="NAME=VALUE",
        help="Override a parameter of the compiled pipeline, such as target=80%; may be repeated.",
    ),
    click.option(
        "--experiment",
        envvar="KF_PIPELINES_DEFAULT_EXPERIMENT_NAME",
        show_envvar=True,
        default="adapt-pruner",
        show_default=True,
        help="Experiment for the runs; created if needed.",
    ),
    click.option(
        "--service-account",
        default="",
        help="Kubernetes service account of the pods.  [default: that of the installation]",
    ),
)
_ACCESS = (
    click.option(
        "--host",
        envvar="KF_PIPELINES_ENDPOINT",
        show_envvar=True,
        default="",
        help="Address of Kubeflow Pipelines.",
    ),
    click.option("--namespace", default="", help="Your namespace, if Kubeflow serves several users."),
    click.option(
        "--token-file",
        envvar="KF_PIPELINES_SA_TOKEN_PATH",
        show_envvar=True,
        type=PATH,
        help="File with a bearer token, read again for each request. Or set KFP_EXISTING_TOKEN to a token.",
    ),
    click.option("--cookie-file", type=PATH, help="File with the cookies of a login, in one line."),
    click.option("--client-id", default="", help="Client id of Google's Identity-Aware Proxy."),
    click.option(
        "--other-client-id",
        default="",
        help="OAuth client id for your login to it; its secret is in KF_PIPELINES_APP_OAUTH2_CLIENT_SECRET.",
    ),
    click.option("--kube-context", default="", help="Go through the API server of this kubectl context."),
    click.option("--proxy", default="", help="Address of a proxy."),
    click.option("--ca-cert", type=PATH, help="Certificate authority of the host."),
    click.option("--no-verify-tls", is_flag=True, help="Accept any certificate."),
)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for the settings and the place of a run."""
    return _with(_RUN, command)


def access_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for the login, which ``connect`` takes as they are."""
    return _with(_ACCESS, command)


def _with(options: tuple[Callable[..., Any], ...], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


def prepared(
    recipe: Path, overrides: tuple[str, ...], parameters: tuple[str, ...], service_account: str
) -> "Submission":
    """Check and compile a recipe, and show hints."""
    from core.settings.recipe import load_recipe

    settings = load_recipe(recipe, overrides)

    from pipelines.remote.submission import prepare

    submission = prepare(settings, parameters, service_account=service_account)
    show_hints(submission.settings, submission.needs)
    return submission


def show_hints(settings: "Settings", needs: "Needs") -> None:
    """Print what may not be intended, and, where it is known, what the tasks and their pods take."""
    from core.steps.data_needs import data_shortage
    from core.steps.needs import shortages, summary_line
    from core.steps.pod_sizes import pods_line, too_large_for_cards
    from pipelines.remote.submission import hints

    short = (*shortages(needs, settings), *data_shortage(settings))
    for hint in (*hints(settings), *short, *too_large_for_cards(settings, needs)):
        click.echo(f"hint: {hint}", err=True)
    if needs:
        click.echo(summary_line(needs, settings), err=True)
        click.echo(pods_line(settings, needs), err=True)
