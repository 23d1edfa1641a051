"""Recipes become settings: all that is wrong is listed at once, and only what matters changes the digest."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import typing
from pathlib import Path

import pytest
import yaml

from core.errors import SettingsError
from core.settings.calibration import CalibrationSettings
from core.settings.cluster import ClusterSettings
from core.settings.identity import with_former
from core.settings.prune import PruneSettings
from core.settings.recipe import load_recipe, settings_from_dict
from core.settings.schema import Settings
from core.settings.texts import TextSource
from core.settings.training import TrainingSettings

LEAST = {"model": {"base": "m"}, "calibration": {"source": {"path": "c.txt"}}}
FULL = {
    "name": "trial",
    "seed": 3,
    "model": {"base": "m", "revision": "v1", "dtype": "bfloat16"},
    "prune": {"target": "80%", "phases": 4, "amplitude": 0.04, "attention_unit": "query_head"},
    "calibration": {"source": {"path": "c.txt"}, "sequences": 16, "pool_documents": 64},
    "training": {
        "tokens": "50k",
        "sequence_length": 128,
        "global_batch": 8,
        "micro_batch": 4,
        "sources": [
            {"path": "a.jsonl", "weight": 2},
            {"path": "b.jsonl", "format": "instruction", "prompt_fields": ["q"], "response_field": "a"},
        ],
    },
    "evaluation": {"tasks": ["piqa"], "task_data": {"piqa": "data"}, "perplexity": {"path": "p.txt"}},
    "storage": {"store": "s3://bucket/runs", "keep": 2},
    "tracking": {"uri": "sqlite:///m.db"},
}


def changed(data, **values):
    """A copy of ``data`` with ``section__key`` (or ``key``) set."""
    data = copy.deepcopy(data)
    for name, value in values.items():
        *sections, key = name.split("__")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return data


def problems(data):
    with pytest.raises(SettingsError) as caught:
        settings_from_dict(data)
    return list(caught.value.problems)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def problem_of(path, *overrides):
    with pytest.raises(SettingsError) as caught:
        load_recipe(path, overrides)
    (problem,) = caught.value.problems
    return problem


# --- settings from plain data


def test_what_a_recipe_leaves_out_has_the_defaults_of_the_dataclasses():
    settings = settings_from_dict(LEAST)
    assert settings.prune == PruneSettings()
    assert settings.training == TrainingSettings()
    assert settings.calibration == CalibrationSettings(source=TextSource(path="c.txt"))


def test_every_setting_survives_the_way_through_plain_data():
    settings = settings_from_dict(FULL)
    assert settings.training.sources[1].prompt_fields == ("q",)
    assert settings.storage.keep == "2"
    assert settings_from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_numbers_that_kfp_made_floats_are_whole_again():
    def as_floats(value):
        if isinstance(value, dict):
            return {key: as_floats(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [as_floats(inner) for inner in value]
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    expected = settings_from_dict(FULL)
    settings = settings_from_dict(as_floats(expected.to_dict()))
    assert settings == expected
    assert settings.digest() == expected.digest()
    assert isinstance(settings.prune.phases, int)
    assert settings.storage.keep == "2"


def test_yaml_writes_of_a_number_are_understood():
    data = yaml.safe_load(
        "{learning_rate: 2e-5, min_learning_rate: 2.0e-6, tokens: 2621440, weight_decay: 0}"
    )
    training = settings_from_dict(changed(LEAST, training={**data, "sources": [{"path": "a"}]})).training
    assert (training.learning_rate, training.min_learning_rate) == (2e-5, 2e-6)
    assert training.tokens == "2621440"
    assert isinstance(training.weight_decay, float)


def test_a_share_and_a_count_name_the_same_target():
    assert PruneSettings(target="80%").target_params(134_515_008) == round(0.8 * 134_515_008)
    assert PruneSettings(target="107.6M").target_params(134_515_008) == 107_600_000


# --- what is wrong with them


def test_unknown_keys_are_errors_with_a_suggestion_or_the_list():
    data = changed(LEAST, prune__amplitud=1, prune__zzz=1, trainng={}, calibration__source__feild="text")
    found = problems(data)
    assert "prune.amplitud is not a setting. Did you mean prune.amplitude?" in found
    assert "trainng is not a setting. Did you mean training?" in found
    assert "calibration.source.feild is not a setting. Did you mean calibration.source.field?" in found
    (listed,) = [problem for problem in found if "zzz" in problem]
    assert listed.startswith("prune.zzz is not a setting. Known: target, method, phases,")
    assert len(found) == 4


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("seed", "x", "seed='x' must be of type int."),
        ("seed", 1.5, "seed=1.5 must be of type int."),
        ("seed", True, "seed=True must be of type int."),
        ("name", None, "name=None must be of type str."),
        ("prune__amplitude", "much", "prune.amplitude='much' must be of type float."),
        ("training__gradient_checkpointing", "yes", "must be of type bool."),
        ("training__sources", "a.txt", "training.sources='a.txt' must be a list."),
        ("training__sources", ["a.txt"], "training.sources[0]='a.txt' must be a mapping of settings. Fill"),
        ("evaluation__task_data", ["piqa"], "evaluation.task_data=['piqa'] must be a mapping."),
        ("prune__similarity", "dot", "must be one of cosine, euclidean, manhattan. Choose one."),
        ("prune", [1], "prune=[1] must be a mapping of settings. Fill it in or leave it out."),
    ],
)
def test_a_wrong_type_is_named_with_its_value(name, value, problem):
    (found,) = problems(changed(LEAST, **{name: value}))
    assert found.startswith(name.replace("__", "."))
    assert problem in found


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("prune__phases", 0, "1 and 1,000"),
        ("prune__steps_per_phase", 1001, "0 and 1,000"),
        ("prune__amplitude", -0.1, "0 and 1"),
        ("prune__width_multiple", 0, "1 and 4,096"),
        ("prune__target", "120%", "0% and 100%"),
        ("prune__target", "0", "must be positive"),
        ("prune__target", "small", "neither a count (108M, 1.2B) nor a share (80%)"),
        ("calibration__sequence_length", 1, "2 and 1,000,000"),
        ("calibration__pool_documents", 10, "is below sequences=512"),
        ("training__tokens", "lots", "is not a count"),
        ("training__learning_rate", 2.0, "0 and 1"),
        ("training__min_learning_rate", 1e-3, "0 and 2e-05"),
        ("training__weight_decay", -0.1, "0 and 1"),
        ("training__weight_decay", 1.1, "0 and 1"),
        ("training__max_grad_norm", -1, "0 and 1,000,000,000"),
        ("calibration__source__weight", -1, "must be positive"),
        ("calibration__source__weight", 2e9, "at most 1,000,000,000"),
        ("training__save_every", "sometimes", "10min, 90s, 2h or 200 steps, or 0"),
        ("training__save_every", 10, "10min, 90s, 2h or 200 steps, or 0"),
        ("evaluation__perplexity_windows", 0, "1 and 1,000,000"),
        ("evaluation__limit", -1, "0 and 1,000,000,000"),
        ("storage__keep", "some", "all, last, best or a number k"),
        ("storage__store", "", "store is empty"),
        ("cluster__gpus", 65, "0 and 64"),
        ("training__tokens", "1e400", "is not a count"),
        ("prune__target", "1e30", "neither a count"),
        ("seed", 10**20, "0 and 2,147,483,647"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limit(name, value, limit):
    (found,) = problems(changed(LEAST, **{name: value}))
    assert found.startswith(name.replace("__", "."))
    assert limit in found
    assert found.endswith(".")


def numbers_of(cls, prefix=""):
    """The names of all settings that are floats, as ``changed`` takes them."""
    for name, hint in typing.get_type_hints(cls).items():
        parts = [hint, *typing.get_args(hint)]
        inner = [part for part in parts if dataclasses.is_dataclass(part)]
        if float in parts:
            yield f"{prefix}{name}"
        elif inner and typing.get_origin(hint) not in (tuple, dict):
            yield from numbers_of(inner[0], f"{prefix}{name}__")


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, "nan", "1e400", -1, 10**400, 16**5000],
    ids=["nan", "inf", "-inf", "a text nan", "a text inf", "negative", "401 digits", "6021 digits"],
)
@pytest.mark.parametrize("name", [*numbers_of(Settings), "seed", "prune__phases"])
def test_no_setting_takes_what_is_no_number_or_too_large(name, value):
    found = problems(changed(LEAST, evaluation__perplexity={"path": "p.txt"}, **{name: value}))
    assert found[0].startswith(name.replace("__", "."))
    assert all(len(problem) < 200 for problem in found)


def test_the_settings_that_are_floats_are_found():
    assert {"prune__amplitude", "training__max_grad_norm", "calibration__source__weight"} <= {
        *numbers_of(Settings)
    }


def test_no_gradient_norm_and_no_weight_decay_are_fine():
    training = settings_from_dict(changed(LEAST, training__max_grad_norm=0)).training
    assert (training.max_grad_norm, training.weight_decay) == (0, 0)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"training__tokens": "1M"}, "training.tokens=1M needs sources."),
        (
            {"training__tokens": "1k", "training__sources": [{"path": "a"}]},
            "training.tokens=1k is less than one optimizer step of 131,072 tokens.",
        ),
        (
            {"training__tokens": "1M", "training__sources": [{"path": "a"}]},
            "training.tokens=1M gives 7 optimizer steps for prune.phases=20.",
        ),
        ({"training__micro_batch": 7}, "training.global_batch=128 must be a multiple of micro_batch=7."),
        (
            {"training__warmup_share": 0.6, "training__decay_share": 0.5},
            "training.warmup_share + decay_share exceed 1.",
        ),
        (
            {"calibration__source__format": "instruction"},
            "calibration.source.format=instruction needs prompt_fields and response_field.",
        ),
        (
            {"prune__profile": "portable", "prune__attention_unit": "kv_group"},
            "prune.attention_unit=kv_group removes heads, but profile=portable leaves attention whole.",
        ),
        (
            {"prune__profile": "portable", "prune__width_multiple": 64},
            "prune.width_multiple=64 must be a multiple of 256 under profile=portable.",
        ),
        ({"evaluation__task_data": {"piqa": "x"}}, "evaluation.task_data.piqa names no task"),
        ({"calibration__source__weight": 0}, "calibration.source.weight=0.0 must be positive."),
        ({"calibration__source": {}}, "calibration.source.path is empty."),
    ],
)
def test_impossible_combinations_are_errors(values, problem):
    (found,) = problems(changed(LEAST, **values))
    assert found.startswith(problem)


def test_a_base_model_and_a_calibration_corpus_must_be_named():
    assert problems({}) == [
        "model.base is empty. Name the model to prune.",
        "calibration.source is missing. Name the calibration corpus.",
    ]


def test_all_problems_of_all_sections_are_listed_at_once():
    data = {
        "seed": "x",
        "prune": {"phases": 0, "amplitud": 1, "target": "0%"},
        "calibration": {"source": {"path": "c.txt", "split": 5.5, "weight": -1}},
        "training": {"sources": [{"path": "a"}, {"weight": -1, "format": "xml"}]},
        "cluster": {"gpus": -1},
    }
    found = problems(data)
    assert sorted(problem.split("=")[0].split(" is ")[0] for problem in found) == [
        "calibration.source.weight",
        "cluster.gpus",
        "model.base",
        "prune.amplitud",
        "prune.phases",
        "prune.target",
        "seed",
        "training.sources[1].format",
        "training.sources[1].path",
        "training.sources[1].weight",
    ]


def test_what_a_wrong_value_leads_to_is_not_a_problem_of_its_own():
    assert problems(changed(LEAST, calibration__source__path=["c.txt"])) == [
        "calibration.source.path=['c.txt'] must be of type str."
    ]
    assert problems(changed(LEAST, model={"bas": "m"})) == [
        "model.bas is not a setting. Did you mean model.base?"
    ]
    # 20 phases, the default, would be too many for one step
    data = changed(FULL, prune__phases="two", training__tokens="1024")
    assert problems(data) == ["prune.phases='two' must be of type int."]


def test_a_recipe_that_is_no_mapping_is_an_error():
    assert problems([1]) == ["the recipe=[1] must be a mapping of settings. Fill it in or leave it out."]


# --- files and overrides


def test_overrides_are_yaml_and_win(tmp_path):
    path = write(tmp_path / "r.yaml", FULL)
    settings = load_recipe(
        path,
        (
            "prune.target=60%",
            "prune.phases=3",
            "training.learning_rate=1e-4",
            "evaluation.tasks=[piqa, boolq]",
            "cluster.gpus=0",  # a section that the file lacks
            "tracking.uri=",
            "name=2026-02-03",  # a date to YAML
            "prune.phases=2",  # the last one counts
        ),
    )
    assert (settings.prune.target, settings.prune.phases) == ("60%", 2)
    assert settings.training.learning_rate == 1e-4
    assert settings.evaluation.tasks == ("piqa", "boolq")
    assert settings.cluster == ClusterSettings(gpus=0)
    assert settings.tracking.uri == ""
    assert settings.name == "2026-02-03"
    assert settings.prune.amplitude == 0.04, "the rest of a section stays"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("prune.target", "--set prune.target must read section.key=value, such as prune.target=80%."),
        ("=5", "--set =5 must read section.key=value, such as prune.target=80%."),
        ("name.first=x", "--set name.first=x: name is not a section."),
        ("training.sources.0=x", "--set training.sources.0=x: sources is not a section."),
        ("prune.phase=2", "prune.phase is not a setting. Did you mean prune.phases?"),
        ("prune=3", "prune=3 must be a mapping of settings. Fill it in or leave it out."),
        (
            "name=2026-02-30",
            "--set name=2026-02-30 cannot be read: day is out of range for month. Correct it, or put text in "
            "quotes.",
        ),
        (
            f"seed=1{400 * '0'}",
            "seed is a number of about 401 digits, too large for any setting. Change it.",
        ),
    ],
)
def test_a_wrong_override_is_an_error(override, problem, tmp_path):
    assert problem_of(write(tmp_path / "r.yaml", FULL), override) == problem


def test_a_file_that_is_missing_or_no_recipe_is_named(tmp_path):
    assert problem_of(tmp_path / "no.yaml") == (
        f"recipe {tmp_path}/no.yaml cannot be read (No such file or directory). Give the path of a YAML file."
    )
    assert problem_of(tmp_path).startswith(f"recipe {tmp_path} cannot be read (Is a directory)")
    broken = write(tmp_path / "broken.yaml", "prune: {target: 80%\nmodel: x: y")
    assert problem_of(broken).startswith(f"recipe {broken} is not valid YAML: ")
    assert "\n" not in problem_of(broken)
    dated = write(tmp_path / "dated.yaml", "name: 2026-02-30")
    assert problem_of(dated) == (
        f"recipe {dated} is not valid YAML: day is out of range for month. Correct it there."
    )
    for text in (f"seed: 1{5000 * '0'}", f"prune: {1000 * '['}"):
        assert problem_of(write(dated, text)).startswith(f"recipe {dated} is not valid YAML: ")
    binary = tmp_path / "model.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert problem_of(binary).startswith(f"recipe {binary} is not valid YAML: ")
    for text in ("", "- 1", "text"):
        path = write(tmp_path / "list.yaml", text)
        assert problem_of(path) == f"recipe {path} must be a mapping of sections such as model: and prune:."


# --- include


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


def problems_of(path, *overrides):
    with pytest.raises(SettingsError) as caught:
        load_recipe(path, overrides)
    return list(caught.value.problems)


def test_an_include_includes_relative_to_itself(tmp_path):
    write(tmp_path / "shared" / "deep" / "all.yaml", FULL)
    write(tmp_path / "shared" / "site.yaml", "include: deep/all.yaml\nseed: 4\ncluster: {image: ours}")
    path = write(tmp_path / "mine" / "r.yaml", "include: ../shared/site.yaml\nname: mine")
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


# --- digest


TEXTS = {
    "target": "70%",
    "tokens": "60k",
    "repair_tokens": "64k",
    "distill_batch_tokens": "2k",
    "state_memory": "1GB",
    "save_every": "0",
    "keep": "all",
}


def another(name, hint, value):
    """Another value of a setting; None if there is none to be made up."""
    if name in TEXTS or isinstance(value, str):
        others = [other for other in typing.get_args(hint) if other != value]
        return TEXTS.get(name) or (others[0] if others else f"{value}x")
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 1.5 * value or 0.1 if isinstance(value, float) else 2 * value or 1
    return value[:1] if isinstance(value, tuple) and len(value) > 1 else None


NO_RESULT = {
    ("name",),
    ("model", "base"),
    ("model", "revision"),
    ("calibration", "source", "max_malformed"),
    *(("calibration", name) for name in ("micro_batch", "weights", "state_memory")),
    *(("training", name) for name in ("micro_batch", "gradient_checkpointing", "save_every", "eval_every")),
    *(("training", name) for name in ("ranks", "sharding", "moments")),
}
"""Settings that change no result, beside the sections that are about something else."""


def variations(settings, path=()):
    """The settings with one value after another changed, however deep it stands."""
    for key, hint in typing.get_type_hints(type(settings)).items():
        value, name = getattr(settings, key), (*path, key)
        if dataclasses.is_dataclass(value):
            for where, inner in variations(value, name):
                yield where, dataclasses.replace(settings, **{key: inner})
        elif (other := another(key, hint, value)) is not None:
            with contextlib.suppress(SettingsError):
                yield name, dataclasses.replace(settings, **{key: other})


def test_exactly_what_can_change_the_result_changes_the_digest():
    settings = settings_from_dict(FULL)
    found = dict(variations(settings))
    elsewhere = {name for name in found if name[0] in ("evaluation", "storage", "tracking", "cluster")}
    kept = {name for name, other in found.items() if other.digest() == settings.digest()}
    assert kept == (NO_RESULT | elsewhere) & found.keys()
    assert len(found) > 65
    digests = {other.digest() for name, other in found.items() if name not in kept}
    assert len(digests) == len(found) - len(kept)


def test_exactly_what_is_measured_changes_the_digest_of_that():
    settings = settings_from_dict(FULL)
    found = dict(variations(settings))
    changed = {name for name, other in found.items() if other.measured_digest() != settings.measured_digest()}
    evaluation = {name for name in found if name[0] == "evaluation"}
    assert ("evaluation", "batch_size") in evaluation
    assert changed == evaluation - {
        ("evaluation", "batch_size"),
        ("evaluation", "perplexity", "max_malformed"),
    }


def test_the_split_into_micro_batches_counts_where_each_is_scored_apart():
    apart = changed(FULL, prune__criterion="taylor_per_microbatch", calibration__micro_batch=2)
    settings = settings_from_dict(apart)
    calibration = dataclasses.replace(settings.calibration, micro_batch=3)
    assert dataclasses.replace(settings, calibration=calibration).digest() != settings.digest()


def test_what_stands_at_its_default_does_not_count_so_that_new_settings_change_no_key():
    settings = settings_from_dict({"model": {"base": "b"}, "calibration": {"source": {"path": "p"}}})
    counted = {
        "algorithm": 1,
        "settings": {
            "calibration": {"source": {"path": "p"}},
            "model": {"dtype_between_phases": "float32"},
            "prune": {"repair": "ridge"},
            "training": {"packing": "whole"},
        },
    }
    assert settings.digest() == hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
    named = dataclasses.replace(settings, prune=dataclasses.replace(settings.prune, amplitude=0.02))
    assert named.digest() == settings.digest()


def test_a_setting_that_older_versions_did_not_have_keeps_the_key_of_what_they_did():
    recipe = {"model": {"base": "b"}, "calibration": {"source": {"path": "p"}}}
    before = {"algorithm": 1, "settings": {"calibration": {"source": {"path": "p"}}}}
    former = {"prune": {"repair": "none"}, "training": {"packing": "cut"}}
    former["model"] = {"base": "b", "dtype_between_phases": "same"}
    older = settings_from_dict(recipe | former)
    assert older.digest() == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    assert settings_from_dict(recipe).digest() != older.digest()
    stored = older.to_dict()
    assert settings_from_dict(with_former(Settings, stored)) == older
    del stored["prune"]["repair"], stored["training"]["packing"], stored["model"]["dtype_between_phases"]
    assert settings_from_dict(with_former(Settings, stored)) == older
    assert "repair" not in stored["prune"]


def test_whole_plain_texts_and_pinned_data_sets_have_new_keys_and_nothing_else_of_the_mixture():
    def digest(packing="whole", **source):
        training = {"tokens": "10k", "sequence_length": 10, "global_batch": 2, "micro_batch": 2}
        training |= {"packing": packing, "sources": [source]}
        recipe = {"model": {"base": "b"}, "calibration": {"source": {"path": "p"}}, "training": training}
        return settings_from_dict(recipe).digest()

    def earlier(packing, **source):
        counted = {"global_batch": 2, "sequence_length": 10, "sources": [source], "tokens": "10k"}
        counted |= {"packing": packing} if packing == "whole" else {}
        former = {"model": {"dtype_between_phases": "float32"}, "prune": {"repair": "ridge"}}
        settings = {"calibration": {"source": {"path": "p"}}, "training": counted} | former
        text = json.dumps({"algorithm": 1, "settings": settings}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    for packing in ("whole", "cut"):
        for path in ("a.jsonl", "team/data"):
            assert digest(packing, path=path) == earlier(packing, path=path)
        assert (digest(packing, path="a.txt") == earlier(packing, path="a.txt")) == (packing == "cut")
    assert digest(path="team/data", revision="c0ffee") != digest(path="team/data")


def test_another_version_of_the_algorithm_changes_every_key(monkeypatch):
    before = settings_from_dict(FULL).digest()
    monkeypatch.setattr("core.settings.identity.ALGORITHM_VERSION", 2)
    assert settings_from_dict(FULL).digest() != before


def test_settings_are_the_same_for_every_order_of_keys():
    def backwards(value):
        if isinstance(value, dict):
            return {key: backwards(inner) for key, inner in reversed(value.items())}
        return value

    settings = settings_from_dict(backwards(FULL))
    assert settings == settings_from_dict(FULL)
    assert settings.digest() == settings_from_dict(FULL).digest()
    assert isinstance(settings, Settings)
