"""The command ``adapt-pruner``. Imports nothing heavy before it is needed: ``--help`` answers at once."""

from typing import Any

import click

from core.errors import AdaptPrunerError, SettingsError, full_disk
from core.machine.cores import use_own_cores
from pipelines.commands import clusters, models, pushing, recipes, sharing, stores


class _Commands(click.Group):
    """Turns errors that are meant for the user into ``error:`` lines and an exit status."""

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
            click.echo(
                "error: interrupted; run and push go on when the same command is given again.", err=True
            )
            ctx.exit(130)


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="adapt-pruner")
def main() -> None:
    """Turn a large language model into a smaller one of the size you ask for.

    A recipe (a YAML file) names the model, the target size, the texts and the number of phases; each phase
    prunes a little and trains a little.

    Exit status: 0 done, 1 failed, 2 the settings are wrong.
    """
    use_own_cores()


for _command in (
    recipes.run,
    recipes.compile_,
    clusters.submit,
    clusters.schedule,
    stores.runs,
    stores.clean,
    models.inspect,
    models.evaluate,
    models.benchmark,
    models.sensitivity,
    models.generate,
    sharing.export,
    pushing.push,
):
    main.add_command(_command)
