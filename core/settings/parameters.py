"""How the settings of a recipe reach a run on a cluster: as parameters of the pipeline, or compiled into it.

``PARAMETERS`` and ``COMPILED`` are the only place that says which setting is what; any other setting is part
of the parameter ``recipe``.
"""

import functools
from collections.abc import Mapping
from typing import Any

from core.errors import SettingsError, refuse
from core.settings.prune import PruneSettings, decides_on_model
from core.settings.recipe import settings_from_dict, with_fixed
from core.settings.schema import Settings

PARAMETERS = {
    "base_model": ("model", "base"),
    "revision": ("model", "revision"),
    "target": ("prune", "target"),
    "method": ("prune", "method"),
}
"""Settings that are parameters of their own."""
COMPILED = (
    ("prune", "phases"),
    ("prune", "steps_per_phase"),
    ("prune", "widths"),
    ("prune", "hidden_size"),
    ("prune", "repair"),
    ("prune", "distill_steps"),
    ("training", "nodes"),
    ("evaluation", "speed"),
)
"""Settings that decide how many tasks there are, and which of them get accelerators."""
COMPILED_SECTION = "cluster"
_EQUIPPED = "equipped"
"""Beside the compiled settings: which tasks get the accelerators that any method would have them get."""


def reached_by(section: str, key: str) -> str:
    """Return how a setting reaches a run: its parameter, or "compiled"."""
    if section == COMPILED_SECTION or (section, key) in COMPILED:
        return "compiled"
    return next((name for name, setting in PARAMETERS.items() if setting == (section, key)), "recipe")


def parameters_of(settings: Settings) -> dict[str, Any]:
    """Return the parameters that the pipeline is started with."""
    recipe = settings.to_dict()
    del recipe[COMPILED_SECTION]
    own = {name: recipe[section].pop(key) for name, (section, key) in PARAMETERS.items()}
    for section, key in COMPILED:
        del recipe[section][key]
    # KFP knows no null: a setting that is None is one that the recipe leaves out.
    rest = {
        name: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for name, value in recipe.items()
    }
    return own | {"recipe": rest}


def compiled_settings(settings: Settings, *, phases: int) -> dict[str, dict[str, Any]]:
    """Return the settings that are compiled into the pipeline, by section, less those of its pods."""
    recipe, compiled = settings.to_dict(), dict[str, dict[str, Any]]()
    recipe["prune"]["phases"] = phases
    for section, key in COMPILED:
        compiled.setdefault(section, {})[key] = recipe[section][key]
    return compiled


def compiled_for(settings: Settings, *, phases: int) -> dict[str, dict[str, Any]]:
    """Return what tells apart pipelines that are compiled: settings, and for which methods it will do."""
    asks = functools.partial(settings.cluster.gpus_of, "score-layers")
    equipped = asks(gpu_task=scores_on_accelerator(settings.prune)) == asks(gpu_task=True)
    return compiled_settings(settings, phases=phases) | {_EQUIPPED: {"score-layers": equipped}}


def scores_on_accelerator(prune: PruneSettings) -> bool:
    """Return whether score-layers measures again, or runs the model to decide."""
    return prune.steps_per_phase != 1 or decides_on_model(prune)


def settings_of_run(parameters: Mapping[str, Any], compiled: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Return the settings of a run from what its pipeline was started with and compiled for.

    Raises:
        SettingsError: With all that is wrong.
    """
    if COMPILED_SECTION in parameters["recipe"]:
        raise SettingsError(
            [
                f"the parameter recipe holds the section {COMPILED_SECTION}, which is compiled into the "
                "pipeline. Leave it out; for other pods compile the pipeline again."
            ]
        )
    recipe = with_fixed(
        parameters["recipe"], {name: of for name, of in compiled.items() if name != _EQUIPPED}
    )
    problems = []
    for name, (section, key) in PARAMETERS.items():
        given = recipe.get(section, {})
        if key in given and given[key] != parameters[name]:
            problems.append(
                f"{section}.{key}={given[key]} in the parameter recipe is not what the parameter {name} "
                f"says, {parameters[name]}: say it there alone."
            )
        recipe[section] = {**given, key: parameters[name]}
    refuse(problems)
    settings = settings_from_dict(recipe)
    equipped = compiled.get(_EQUIPPED, {}).get("score-layers", True)  # older versions compiled nothing of it
    if scores_on_accelerator(settings.prune) and not equipped:
        raise SettingsError(
            [
                f"prune.method={settings.prune.method} runs the model in score-layers, for which the "
                "pipeline was compiled without an accelerator. Compile it again with that, or choose another "
                "method."
            ]
        )
    return settings
