import itertools

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from core.errors import SettingsError
from core.settings.includes import load_yaml, read_recipe
from core.settings.recipe import load_recipe
from tests.support.fuzzing import BYTES, CHANGES, as_bytes, changed, damaged, fuzzed, tell
from tests.support.recipes import FULL

FILE_NAMES = ("a.yaml", "sub/b.yaml", "sub/c.yaml", "d.yaml")
KEYS = st.sampled_from(["x", "y", "z"])
MAPPINGS = st.recursive(
    st.integers(0, 99) | st.lists(st.integers(0, 9), max_size=2),
    lambda inner: st.tuples(st.booleans(), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)
"""Values; of a mapping, whether it bears the tag ``!replace``."""
TREES = st.lists(
    st.tuples(st.lists(st.integers(0, 3), max_size=3), st.dictionaries(KEYS, MAPPINGS, max_size=3)),
    min_size=4,
    max_size=4,
)
"""What each file includes, by number, and what it says."""


def as_yaml(value):
    if isinstance(value, tuple):
        tag, inner = value
        items = ", ".join(f"{key}: {as_yaml(item)}" for key, item in inner.items())
        return f"{'!replace ' if tag else ''}{{{items}}}"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def order(files):
    """Files from the lowest to the recipe, or None if they include each other in a circle; by edges alone."""
    reached, todo = {0}, [0]
    while todo:
        new = set(files[todo.pop()][0]) - reached
        reached |= new
        todo += new
    for length in range(1, 5):
        for way in itertools.product(sorted(reached), repeat=length):
            if all(way[(i + 1) % length] in files[way[i]][0] for i in range(length)):
                return None
    found = []

    def visit(number):
        for below in files[number][0]:
            visit(below)
        found.append(number)

    visit(0)
    return list(dict.fromkeys(found))


def expected(stack):
    """What a key has under values of several files, the topmost first: looked up from above, not merged."""
    if not isinstance(stack[0], tuple):
        return stack[0]
    mappings = list(itertools.takewhile(lambda value: isinstance(value, tuple), stack))
    closed = [i for i, (tagged, inner) in enumerate(mappings) if tagged or not inner]
    mappings = mappings[: closed[0] + 1] if closed else mappings
    keys = {key for _, inner in mappings for key in inner}
    return {key: expected([inner[key] for _, inner in mappings if key in inner]) for key in keys}


def test_recipes_that_include_each_other_at_random_are_what_their_files_say_in_order(tmp_path):
    seen = []
    for name in FILE_NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)

    @fuzzed(3)
    @given(TREES)
    def attempt(files):
        for name, (includes, data) in zip(FILE_NAMES, files, strict=True):
            up = "../" if "/" in name else ""
            text = f"include: [{', '.join(up + FILE_NAMES[number] for number in includes)}]\n"
            text += "".join(f"{key}: {as_yaml(value)}\n" for key, value in data.items())
            (tmp_path / name).write_text(text)
        numbers = order(files)
        if numbers is None:
            with pytest.raises(SettingsError, match=r" includes itself: .* -> "):
                read_recipe(tmp_path / FILE_NAMES[0])
            seen.append("circle")
        else:
            recipe = read_recipe(tmp_path / FILE_NAMES[0])
            assert [path.name for path, _ in recipe.layers] == [
                FILE_NAMES[number].rpartition("/")[2] for number in numbers
            ]
            stack = [(False, files[number][1]) for number in reversed(numbers) if files[number][1]]
            assert recipe.merged() == (expected(stack) if stack else {})
            seen.append("")

    attempt()
    assert "" in seen
    tell("recipes that include each other at random", seen, 3)


def lines_of(call):
    """The lines of our error; anything else that is raised fails the test."""
    problems = ()
    try:
        call()
    except SettingsError as error:
        problems = error.problems
    assert all(problem.isprintable() and problem[-1] in ".?" for problem in problems)
    return problems


def test_changed_recipes_are_read_or_refused(tmp_path):
    seen = []
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(FULL))
    text = (
        "include: [base.yaml]\nseed: 3\nevaluation: &e {task_data: !replace {piqa: x}}\ncluster: {gpus: 2}\n"
    )

    @fuzzed()
    @given(CHANGES, BYTES)
    def attempt(how, changes):
        (tmp_path / "included.yaml").write_bytes(as_bytes(changed(FULL, how)))
        (tmp_path / "r.yaml").write_text("include: included.yaml\nseed: 2")
        seen.append(lines_of(lambda: load_recipe(tmp_path / "r.yaml")))
        (tmp_path / "r.yaml").write_bytes(damaged(text.encode(), changes))
        seen.append(lines_of(lambda: load_recipe(tmp_path / "r.yaml")))

    attempt()
    tell("a recipe and an included file, changed and damaged", seen)


def test_the_tag_changes_nothing_of_the_values(tmp_path):
    assert load_yaml("a: !replace {b: [1], c: {d: 2}}") == {"a": {"b": [1], "c": {"d": 2}}}
