"""README and docs/: what they link to, name and tell to type exists."""

import ast
import functools
import importlib.util
import re
import shlex
import typing
from pathlib import Path

import click
import pytest

from core.settings.schema import Settings
from pipelines.cli import main
from tests.support.project import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "recipes" / "README.md"])
WRITTEN = ("settings.md", "reliability-evidence.md")
"""Pages that a program writes."""

LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"((?:`[\w.]+`(?:, | and |; )?)+)(?: of `\w+`)? in \[[^\]]+\]\(((?:[\w/]|\.\.|\.py)+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SECTIONS = "|".join(name for name, hint in typing.get_type_hints(Settings).items() if hint not in (str, int))


def every(*pages):
    return pytest.mark.parametrize("page", pages or PAGES, ids=lambda page: page.name)


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@functools.cache
def names_in(path):
    """What a module, or the modules of a folder, define: functions, classes, methods, variables."""
    found = set()
    for file in [path] if path.is_file() else path.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


def missing_links(page, text):
    for link in LINK.findall(FENCED.sub("", text)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def missing_names(page, text):
    for names, link in NAMED.findall(text):
        target = (page.parent / link).resolve()
        for name in re.findall(r"`([\w.]+)`", names):
            if not target.exists() or name not in names_in(target):
                yield f"{name} in {link}"


@every()
def test_every_link_leads_somewhere(page):
    assert list(missing_links(page, page.read_text())) == []


@every()
def test_every_function_and_class_is_where_the_page_says(page):
    assert list(missing_names(page, page.read_text())) == []


def test_what_is_missing_is_found():
    page = ROOT / "docs" / "architecture.md"
    text = (
        "[a](nowhere.md) [b](#no-such-heading) [c](#the-store)\n`Path`, `no_such` in [d](../core/errors.py)"
    )
    assert list(missing_links(page, text)) == ["nowhere.md", "#no-such-heading"]
    assert "no_such in ../core/errors.py" in list(missing_names(page, text))
    named = NAMED.findall((ROOT / "docs" / "architecture.md").read_text())
    assert len(named) > 25


@every()
def test_every_test_benchmark_and_target_that_is_named_exists(page):
    text = page.read_text()
    tests = {path.name for path in (ROOT / "tests").rglob("*.py")}
    assert set(re.findall(r"\btest_\w+\.py\b", text)) <= tests
    programs = set(re.findall(r"benchmarks/\w+\.py", text))
    assert not [program for program in programs if not (ROOT / program).is_file()]
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    lines = re.findall(r"(?:`|^)make ([a-z -]+)", text, re.MULTILINE)
    assert {word for line in lines for word in line.split()} <= set(targets)


@every(*(page for page in PAGES if page.name not in WRITTEN))
def test_every_setting_that_is_named_exists(page):
    hints = typing.get_type_hints(Settings)
    for section, key in re.findall(rf"`({SECTIONS})\.([a-z_]+)(?:[=:][^`]*)?`", page.read_text()):
        if key not in ("gguf", "safetensors"):
            assert key in hints[section].__dataclass_fields__, f"{section}.{key}"


def parsed(line):
    """What click understands of a command: its values by the names of its parameters."""
    _, name, *words = shlex.split(line)
    return main.commands[name].make_context(name, words).params


@every()
def test_every_command_and_its_arguments_exist(page):
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", page.read_text())])
    for name, rest in re.findall(r"^adapt-pruner ([a-z]+)(.*)$", lines, re.MULTILINE):
        assert name in main.commands, name
        if rest:
            parsed(f"adapt-pruner {name}{rest}")


@pytest.mark.parametrize("arguments", ["runs", "runs s --no", "clean s t", "compile r.yaml"])
def test_arguments_that_do_not_exist_or_are_missing_are_found(arguments):
    with pytest.raises(click.UsageError):
        parsed(f"adapt-pruner {arguments}")


def test_the_page_of_settings_is_what_the_dataclasses_say():
    path = ROOT / "docs" / "write_settings.py"
    spec = importlib.util.spec_from_file_location("write_settings", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert Path(ROOT, "docs", "settings.md").read_text() == module.page(), "run make docs"


def test_the_readme_is_short_and_its_picture_small():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert (ROOT / "docs" / "demo-report.png").stat().st_size < 200_000
