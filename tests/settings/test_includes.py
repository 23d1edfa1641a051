"""Recipes that include others: what lies over what, and which file an error names."""

from pathlib import Path

import pytest
import yaml

from core.settings.prune import PruneSettings
from core.settings.recipe import load_recipe, settings_from_dict
from tests.support.recipes import FULL, changed, problem_of, problems_of, write


def test_a_recipe_says_only_what_differs_from_the_file_it_includes(tmp_path):
    write(tmp_path / "shared" / "all.yaml", FULL)
    recipe = {
        "include": "shared/all.yaml",
        "name": "other",
        "prune": {"target": "60%"},
        "calibration": {"source": {"split": "validation"}},
        "training": {"sources": [{"path": "z.jsonl"}]},
        "cluster": {"gpus": 4},
    }
    path = write(tmp_path / "r.yaml", recipe)
    expected = changed(
        FULL,
        name="other",
        prune__target="60%",
        calibration__source__split="validation",
        training__sources=[{"path": "z.jsonl"}],
        cluster__gpus=4,
    )
    assert load_recipe(path) == settings_from_dict(expected)
    assert load_recipe(path, ("prune.target=50%",)).prune.target == "50%"


def test_an_included_file_is_found_from_anywhere(tmp_path, monkeypatch):
    write(tmp_path / "recipes" / "base.yaml", FULL)
    write(tmp_path / "recipes" / "r.yaml", "include: base.yaml\nseed: 9")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("recipes/r.yaml")).seed == 9


def test_an_include_includes_relative_to_itself(tmp_path):
    write(tmp_path / "house" / "deep" / "all.yaml", FULL)
    write(tmp_path / "house" / "site.yaml", "include: deep/all.yaml\nseed: 4\ncluster: {image: ours}")
    path = write(tmp_path / "mine" / "r.yaml", "include: ../house/site.yaml\nname: mine")
    assert load_recipe(path) == settings_from_dict(changed(FULL, name="mine", seed=4, cluster__image="ours"))


def test_of_several_includes_the_later_lie_over_the_earlier_and_the_recipe_over_all(tmp_path):
    write(tmp_path / "a.yaml", FULL)
    write(tmp_path / "b.yaml", {"seed": 8, "prune": {"phases": 3, "amplitude": 0.5}})
    path = write(tmp_path / "r.yaml", "include: [a.yaml, b.yaml]\nprune: {amplitude: 0.25}")
    expected = changed(FULL, seed=8, prune__phases=3, prune__amplitude=0.25)
    assert load_recipe(path) == settings_from_dict(expected)
    write(path, "include: [b.yaml, a.yaml]\nprune: {amplitude: 0.25}")
    assert load_recipe(path) == settings_from_dict(changed(FULL, prune__amplitude=0.25))
    write(path, {"include": [], **FULL})
    assert load_recipe(path) == settings_from_dict(FULL)


def test_a_file_that_is_reached_twice_counts_once_below_all_that_include_it(tmp_path):
    write(tmp_path / "common.yaml", changed(FULL, seed=1, prune__phases=1))
    write(tmp_path / "left.yaml", "include: common.yaml\nseed: 2")
    write(tmp_path / "right.yaml", "include: ./common.yaml\nprune: {phases: 2}")
    settings = load_recipe(write(tmp_path / "r.yaml", "include: [left.yaml, right.yaml]"))
    assert (settings.seed, settings.prune.phases) == (2, 2), "common.yaml takes nothing back"


@pytest.mark.parametrize(
    ("task_data", "expected"),
    [
        ("{}", {}),
        ("!replace {boolq: other}", {"boolq": "other"}),
        ("!replace {}", {}),
        ("{boolq: other}", {"piqa": "data", "boolq": "other"}),
    ],
)
def test_a_mapping_that_is_empty_or_tagged_replaces_what_is_below(tmp_path, task_data, expected):
    write(tmp_path / "all.yaml", FULL)
    between = write(
        tmp_path / "between.yaml",
        f"include: all.yaml\nevaluation: {{tasks: [piqa, boolq], task_data: {task_data}}}",
    )
    above = write(tmp_path / "r.yaml", "include: between.yaml\nseed: 9")
    for path in (between, above):
        assert load_recipe(path).evaluation.task_data == expected
    assert load_recipe(above).evaluation.perplexity.path == "p.txt", "the rest of the section stays"


def test_what_was_replaced_can_be_added_to(tmp_path):
    write(tmp_path / "all.yaml", FULL)
    write(tmp_path / "none.yaml", "evaluation: {task_data: {}}")
    recipe = "include: [all.yaml, none.yaml]\nevaluation: {tasks: [boolq], task_data: {boolq: b}}"
    assert load_recipe(write(tmp_path / "r.yaml", recipe)).evaluation.task_data == {"boolq": "b"}


@pytest.mark.parametrize("value", ["{}", "!replace {}", "!replace {piqa: x}", "{piqa: x}"])
def test_an_override_replaces_a_whole_mapping(tmp_path, value):
    path = write(tmp_path / "r.yaml", FULL)
    found = load_recipe(path, (f"evaluation.task_data={value}",)).evaluation.task_data
    assert found == ({"piqa": "x"} if "x" in value else {})


def test_an_empty_section_gets_the_defaults(tmp_path):
    write(tmp_path / "all.yaml", FULL)
    path = write(tmp_path / "r.yaml", "include: all.yaml\nprune: {}")
    assert load_recipe(path).prune == PruneSettings()


def test_the_tag_belongs_before_mappings(tmp_path):
    path = write(tmp_path / "r.yaml", "evaluation:\n  tasks: !replace [piqa]")
    assert problem_of(path).startswith(
        f"recipe {path} is not valid YAML: !replace belongs before a mapping, all else is replaced anyway in "
    )
    assert "line 2, column 10" in problem_of(path)


def test_a_circle_of_includes_is_shown(tmp_path):
    path = write(tmp_path / "r.yaml", "include: [fine.yaml, a.yaml]")
    write(tmp_path / "fine.yaml", FULL)
    write(tmp_path / "a.yaml", "include: sub/b.yaml")
    write(tmp_path / "sub" / "b.yaml", "include: ../a.yaml")
    way = " -> ".join(f"{tmp_path}/{name}" for name in ("a.yaml", "sub/b.yaml", "sub/../a.yaml"))
    assert problem_of(path) == (
        f"recipe {tmp_path}/sub/../a.yaml includes itself: {way}. Remove one of these includes."
    )
    write(path, "include: r.yaml")
    assert problem_of(path) == (
        f"recipe {path} includes itself: {path} -> {path}. Remove one of these includes."
    )
    (tmp_path / "link.yaml").symlink_to(path)
    write(path, "include: link.yaml")
    assert f"{path} -> {tmp_path}/link.yaml." in problem_of(path)


def test_a_wrong_include_is_an_error(tmp_path):
    path = tmp_path / "r.yaml"
    write(path, "include: no.yaml")
    assert problem_of(path).startswith(f"recipe {tmp_path}/no.yaml cannot be read (No such file")
    write(tmp_path / "list.yaml", "- 1")
    write(path, "include: list.yaml")
    assert problem_of(path).startswith(f"recipe {tmp_path}/list.yaml must be a mapping")
    for name in ("5", "null", "{a: b}", "[a.yaml, 5]", '"a\\0b"'):
        write(path, f"include: {name}")
        shown = yaml.safe_load(name)
        assert problem_of(path) == (
            f"include={shown!r} in recipe {path} must be a file or a list of files, relative to the recipe."
        )


def test_all_files_that_are_wrong_are_named_at_once(tmp_path):
    write(tmp_path / "a.yaml", "include: [no.yaml, list.yaml]")
    write(tmp_path / "b.yaml", "prune: {target")
    write(tmp_path / "list.yaml", "- 1")
    path = write(tmp_path / "r.yaml", "include: [a.yaml, b.yaml, gone.yaml]")
    named = [problem.split()[1] for problem in problems_of(path)]
    assert named == [f"{tmp_path}/{name}.yaml" for name in ("no", "list", "b", "gone")]


def test_a_wrong_setting_is_told_with_the_included_file_that_sets_it(tmp_path):
    write(tmp_path / "base.yaml", changed(FULL, prune__phases=0, seed="x", prune__amplitud=1))
    write(tmp_path / "site.yaml", {"cluster": {"gpus": -1}, "prune": {"amplitude": 7}})
    path = write(tmp_path / "r.yaml", "include: [base.yaml, site.yaml]\nprune: {similarity: dot}\nseed: y")
    assert sorted(problems_of(path)) == sorted(
        [
            f"{tmp_path}/base.yaml: prune.amplitud is not a setting. Did you mean prune.amplitude?",
            f"{tmp_path}/base.yaml: prune.phases=0 must lie between 1 and 1,000. Change it.",
            f"{tmp_path}/site.yaml: prune.amplitude=7.0 must lie between 0 and 1. Change it.",
            f"{tmp_path}/site.yaml: cluster.gpus=-1 must lie between 0 and 64. Change it.",
            "prune.similarity=dot must be one of cosine, euclidean, manhattan. Choose one.",
            "seed='y' must be of type int.",
        ]
    )
    found = problems_of(path, "prune.phases=-1", "nonsense")
    assert "prune.phases=-1 must lie between 1 and 1,000. Change it." in found, "set on the command line"
    assert "--set nonsense must read section.key=value, such as prune.target=80%." in found
    assert len(found) == 7
    write(tmp_path / "base.yaml", changed(FULL, prune__phases=0))
    write(path, "include: base.yaml")
    assert load_recipe(path, ("prune.phases=2",)).prune.phases == 2


def test_aliases_that_make_circles_or_multiply_are_refused(tmp_path):
    path = write(tmp_path / "r.yaml", "prune: &a {target: *a}")
    assert problem_of(path) == (
        f"recipe {path} is not valid YAML: an alias lies inside the value it names. Correct it there."
    )
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    write(path, "\n".join(lines))
    assert "with its aliases it holds over 100,000 values" in problem_of(path)
    assert problem_of(write(path, FULL), "seed=&a [*a]") == (
        "--set seed=&a [*a] cannot be read: an alias lies inside the value it names. Correct it, or put "
        "text in quotes."
    )
