"""``adapt-pruner push``: a checkpoint on the Hugging Face hub."""

import os
import sys

import click

from pipelines.commands.console import MODEL_HELP, example, local_checkpoint, log_on_stderr, prepare_for


@click.command(
    epilog=example(
        "adapt-pruner push output/demo/model user/smollm2-108m --private",
        "adapt-pruner push s3://models/runs/0123456789ab/final user/smollm2-108m --dry-run",
    ),
    help="Upload MODEL to REPOSITORY on the Hugging Face hub.\n\n"
    f"{MODEL_HELP}. REPOSITORY is user/name or organization/name, and is created if needed. The upload is "
    "one commit, which also removes what an earlier checkpoint left; other files stay. Repeating an "
    "interrupted command sends only the missing files. The report and the record of the run are not "
    "uploaded. The token comes from HF_TOKEN or `hf auth login`.",
)
@click.argument("model")
@click.argument("repository")
@click.option("--private", is_flag=True, help="Make a new repository private; refuse an existing public one.")
@click.option("--revision", default="main", show_default=True, help="Branch; created if needed.")
@click.option("--message", default="Upload the checkpoint", show_default=True, help="Commit message.")
@click.option("--dry-run", is_flag=True, help="List the changes without making them.")
def push(model: str, repository: str, private: bool, revision: str, message: str, dry_run: bool) -> None:
    """Upload a checkpoint."""
    if sys.stderr.isatty():  # show the client's bars, which other commands hide
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
        os.environ.setdefault("TQDM_DISABLE", "")
    prepare_for(model)

    from core.export.hub import plan_push, push_checkpoint

    with log_on_stderr(), local_checkpoint(model, verify=False) as directory:
        if not dry_run:
            click.echo(
                push_checkpoint(directory, repository, private=private, revision=revision, message=message)
            )
            return
        plan = plan_push(directory, repository, private=private, revision=revision)
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
