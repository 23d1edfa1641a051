"""The command that uploads a checkpoint to the Hugging Face hub."""

import os
import sys

import click

from pipelines.commands.console import MODEL_HELP, example, log_on_stderr, prepare_for


@click.command(
    epilog=example(
        "adapt-pruner push output/demo/model user/smollm2-108m --private",
        "adapt-pruner push s3://models/runs/0123456789ab/final user/smollm2-108m --dry-run",
    ),
    help="Upload MODEL to the Hugging Face hub as REPOSITORY.\n\n"
    f"{MODEL_HELP}; REPOSITORY is user/name or organization/name, and is made if it is not there. All of it "
    "becomes one commit, which also removes what a checkpoint before has left; other files stay. A command "
    "that was cut off can be given again: what has arrived is not sent again. The report and the record of a "
    "run stay here. The token comes from HF_TOKEN or `hf auth login`.",
)
@click.argument("model")
@click.argument("repository")
@click.option("--private", is_flag=True, help="Make a new repository private; refuse one that is public.")
@click.option("--revision", default="main", show_default=True, help="The branch; made if it is not there.")
@click.option("--message", default="Upload the checkpoint", show_default=True, help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="List what would change, and change nothing.")
def push(model: str, repository: str, private: bool, revision: str, message: str, dry_run: bool) -> None:
    """Upload a checkpoint."""
    if sys.stderr.isatty():  # the client's bars, which commands that are quick keep out
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
        os.environ.setdefault("TQDM_DISABLE", "")
    prepare_for(model)

    from core.export.hub import plan_push, push_checkpoint
    from pipelines.models import local_checkpoint

    with log_on_stderr(), local_checkpoint(model, verify=False) as directory:
        if not dry_run:
            click.echo(
                push_checkpoint(directory, repository, private=private, revision=revision, message=message)
            )
            return
        plan = plan_push(directory, repository, revision=revision)
    if plan.is_new:
        click.echo(f"{repository} would be created{' as a private repository' if private else ''}")
    for name, path in plan.files.items():
        click.echo(f"send    {name}  {path.stat().st_size:,} bytes")
    for name in plan.unchanged:
        click.echo(f"there   {name}")
    for name in plan.stale:
        click.echo(f"remove  {name}")
    click.echo(
        f"{len(plan.files)} files, {plan.size_bytes:,} bytes at most, would be sent"
        if plan.changes
        else "nothing would change"
    )
