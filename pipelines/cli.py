"""The command ``adapt-pruner``. Imports nothing heavy before it is needed: ``--help`` answers at once."""

from typing import Any

import click

from core.errors import AdaptPrunerError, SettingsError, full_disk
from core.machine.cores import use_own_cores
from pipelines.commands.benchmark import benchmark
from pipelines.commands.clean import clean
from pipelines.commands.compare import compare
from pipelines.commands.compile import compile_
from pipelines.commands.doctor import doctor
from pipelines.commands.evaluate import evaluate
from pipelines.commands.experiment import experiment
from pipelines.commands.export import export
from pipelines.commands.generate import generate
from pipelines.commands.inspect import inspect
from pipelines.commands.promote import promote
from pipelines.commands.push import push
from pipelines.commands.report import report
from pipelines.commands.run import run
from pipelines.commands.runs import runs
from pipelines.commands.schedule import schedule
from pipelines.commands.sensitivity import sensitivity
from pipelines.commands.submit import submit
from pipelines.commands.watch import watch

_GROUPS = {
    "Run a recipe": (run, compile_, doctor, submit, schedule, experiment),
    "Examine a model": (inspect, generate, evaluate, sensitivity, benchmark),
    "Share a model": (export, push, promote),
    "Look after a store": (runs, watch, report, compare, clean),
}


class _Commands(click.Group):
    """Lists commands by topic, and turns errors that are meant for the user into lines and an exit status."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for topic, commands in _GROUPS.items():
            with formatter.section(topic):
                formatter.write_dl(
                    [(f"{each.name:<{width}}", each.get_short_help_str(80)) for each in commands]
                )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (AdaptPrunerError, OSError) as raised:
            error = full_disk(raised) or raised
            if not isinstance(error, AdaptPrunerError):
                raise
            for line in str(error).splitlines():
                click.echo(f"error: {line}", err=True)
            ctx.exit(2 if isinstance(error, SettingsError) else 1)
        except KeyboardInterrupt:
            click.echo("error: interrupted; repeat the command to resume run, experiment or push.", err=True)
            ctx.exit(130)


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="adapt-pruner")
def main() -> None:
    """Turn a large language model into a smaller one of the size you ask for.

    A recipe (a YAML file) names the model, the target size, the texts and the number of phases; each phase
    prunes a little and trains a little.

    Exit status: 0 success, 1 failure, 2 wrong settings; of promote also 3, not promoted.
    """
    use_own_cores()


for _commands in _GROUPS.values():
    for _command in _commands:
        main.add_command(_command)
