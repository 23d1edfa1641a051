"""Imports point one way; what stands lower never learns of what stands above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Every module's height. An import may go down, or stay within one of the named parts.
HEIGHTS = {
    "pipelines": 10,
    "components": 9,
    "core.steps": 8,
    "core.pruning": 7,
    "core.training": 7,
    "core.evaluation": 7,
    "core.tracking": 7,
    "core.export": 7,
    "core.runs.overview": 7,
    "core.bases.importing": 7,
    "core.bases.resolution": 6,
    "core.runs.run": 6,
    "core.machine.precision": 6,
    "core.model": 5,
    "core.tracking.client": 5,
    "core.storage": 5,
    "core.data.texts": 5,
    "core.bases.licence": 5,
    "core.settings.recipe": 4,
    "core.settings.includes": 2,
    "core.runs.record": 4,
    "core.settings.schema": 3,
    "core.settings.addresses": 2,
    "core.settings.cluster": 2,
    "core.machine.memory": 2,
    "core.settings.storage": 2,
    "core.data.archives": 2,
    "core.machine.cores": 2,
    "core.untrusted": 2,
    "core.settings.identity": 1,
    "core.errors": 1,
    "core.machine.control_groups": 0,
    "core.quantities": 0,
    "core.redaction": 0,
    "core": 0,
}


def part_of(module):
    """The longest entry of HEIGHTS that the module is or lies in."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in HEIGHTS:
            return name
    return None


def imports_of(source, module):
    """What the source imports, also inside functions; ``from core import config`` names core.settings.schema."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def arrows_up(source, module):
    own = part_of(module)
    found = []
    for imported in imports_of(source, module):
        part = part_of(imported)
        outside = module.startswith("core") and imported.split(".")[0] == "kfp"
        if outside or (part not in (None, own) and HEIGHTS[part] >= HEIGHTS[own]):
            found.append(f"{module} imports {imported}")
    return found


def modules():
    for package in ("core", "components", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield pytest.param(path, name, id=name)


@pytest.mark.parametrize(("path", "name"), modules())
def test_imports_only_go_down(path, name):
    assert part_of(name) != "core" or name == "core", f"{name} has no place in HEIGHTS"
    assert arrows_up(path.read_text(), name) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core.model.build", "import core.steps"),
        ("core.model.build", "from core import steps"),
        ("core.model.build", "def f():\n    from core.pruning.plan import Plan"),
        ("core.pruning.plan", "from core.training.recover import train"),
        ("core.errors", "import core.settings.schema"),
        ("core.steps", "from components.runtime import task"),
        ("core.steps", "from kfp import dsl"),
        ("core.pruning.plan", "from ..steps import run_calibrate"),
        ("components.evaluate", "import pipelines.cluster"),
    ],
)
def test_an_arrow_that_goes_up_is_found(module, source):
    assert arrows_up(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core.pruning.plan", "from core.pruning.sparsity import sparsities"),
        ("core.steps", "import core.pruning.plan, torch"),
        ("pipelines.adapt_accel", "from components.evaluate import evaluate\nfrom kfp import dsl"),
    ],
)
def test_an_arrow_that_goes_down_is_fine(module, source):
    assert arrows_up(source, module) == []


def loaded_modules(statement):
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in result.stdout.split()}


HEAVY = {"torch", "transformers", "datasets", "mlflow", "lm_eval", "matplotlib", "boto3", "numpy"}


def test_settings_import_nothing_heavy():
    assert not loaded_modules(
        "import core.settings.schema, core.quantities, core.settings.recipe, core.runs.record"
    ) & (HEAVY | {"kfp"})


def test_building_the_pipeline_imports_no_model_code():
    assert not loaded_modules("import pipelines.adapt_accel") & HEAVY


def test_what_runs_inside_a_task_does_not_import_kfp():
    assert "kfp" not in loaded_modules("import components.runtime")
