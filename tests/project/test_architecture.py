"""Imports point one way; what stands lower never learns of what stands above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the bottom up: a part imports what stands below it. Parts of one layer know nothing of each other.
LAYERS = [
    {"core", "core.progress", "core.quantities", "core.redaction", "core.scratch"},
    {"core.errors"},
    {"core.untrusted", "core.settings"},
    {"core.data", "core.machine", "core.storage", "core.tracking"},
    {"core.model"},
    {"core.pruning", "core.runs", "core.training"},
    {"core.bases", "core.evaluation"},
    {"core.export", "core.report"},
    {"core.experiments", "core.steps"},
    {"components"},
    {"pipelines"},
]
HEIGHTS = {part: height for height, parts in enumerate(LAYERS) for part in parts}


def part_of(module):
    """The part that the module is or lies in; None for what is not ours."""
    names = module.split(".")
    found = ".".join(names[:2]) if names[0] == "core" else names[0]
    return found if found in HEIGHTS else None


def imports_of(source, module):
    """What the source imports, also inside functions; ``from core import errors`` names core.errors."""
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
    assert part_of(name) is not None, f"{name} has no place in LAYERS"
    assert arrows_up(path.read_text(), name) == []


@pytest.mark.parametrize(
    ("module", "source", "goes_up"),
    [
        ("core.model.build", "import core.steps", True),
        ("core.model.build", "from core import steps", True),
        ("core.model.build", "def f():\n    from core.pruning.plan import Plan", True),
        ("core.pruning.plan", "from core.training.recover import train", True),
        ("core.pruning.plan", "from ..steps import run_calibrate", True),
        ("core.steps", "from kfp import dsl", True),
        ("components.evaluate", "import pipelines.cluster", True),
        ("core.pruning.plan", "from core.pruning.sparsity import sparsities", False),
        ("core.steps", "import core.pruning.plan, torch", False),
        ("pipelines.adapt_accel", "from components.evaluate import evaluate\nfrom kfp import dsl", False),
    ],
)
def test_an_arrow_that_goes_up_is_found(module, source, goes_up):
    assert bool(arrows_up(source, module)) == goes_up


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


def test_no_module_is_imported_by_what_it_imports():
    """Also inside functions: an import that is put off hides a circle."""
    imports = {
        name: set(imports_of(path.read_text(), name))
        for path, name in (parameters.values for parameters in modules())
    }

    def below(name):
        found, left = set(), [name]
        while left:
            new = imports.get(left.pop(), set()) - found
            found |= new
            left += new
        return found

    assert [name for name in imports if name in below(name)] == []


def test_temporary_folders_are_those_that_are_removed_after_a_kill():
    makers = {"TemporaryDirectory", "mkdtemp"}
    found = [
        name
        for path, name in (parameters.values for parameters in modules())
        if makers
        & {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(ast.parse(path.read_text()))}
    ]
    assert found == ["core.scratch"]


def test_no_module_has_more_than_400_lines():
    folders = ("benchmarks", "components", "core", "docker", "docs", "pipelines", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert len(lines) > 500
    assert {name: count for name, count in lines.items() if count > 400} == {}
