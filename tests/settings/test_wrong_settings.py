"""All that is wrong in a recipe is listed at once, each with its name, its value and the limit."""

import copy
import dataclasses
import math
import typing

import pytest

from core.settings.recipe import settings_from_dict
from core.settings.schema import Settings
from tests.support.recipes import FULL, LEAST, changed, problems


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
        ("prune__steps_per_phase", 991, "0 and 990"),
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
        ("evaluation__perplexity_stride", 512, "0 and 511"),
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


TAUGHT = {"tokens": "1M", "sources": [{"path": "a"}], "teacher": "base", "teacher_tokens": "500k"}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"teacher": "none"}, "teacher_tokens=500k needs a teacher. Set teacher to base"),
        ({"teacher_tokens": "some"}, "teacher_tokens=some is not a count"),
        ({"teacher_tokens": "1k"}, "teacher_tokens=1k is less than one optimizer step of 131,072 tokens"),
        ({"teacher_tokens": "2M"}, "teacher_tokens=2M is more than the mixture has: tokens=1M"),
        ({"nodes": 2}, "teacher_tokens=500k is of one node"),
    ],
)
def test_a_teacher_is_trained_only_where_it_teaches_on_what_there_is(values, problem):
    def recipe(**values):
        return changed(LEAST, prune__phases=1, training=TAUGHT | values)

    assert settings_from_dict(recipe()).training.of_teacher.total_steps == 3
    (found,) = problems(recipe(**values))
    assert found.startswith(f"training.{problem}")
    off = recipe(teacher_tokens=0)
    del (named := copy.deepcopy(off))["training"]["teacher_tokens"]
    assert settings_from_dict(off).digest() == settings_from_dict(named).digest()
    assert settings_from_dict(off).digest() != settings_from_dict(recipe()).digest()


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
        (
            {
                "training__tokens": "100M",
                "training__sources": [
                    {"path": "a", "max_tokens": "50M"},
                    {"path": "b", "max_tokens": "49M"},
                ],
            },
            "training.tokens=100M is more than the max_tokens of all sources allow, 99,000,000.",
        ),
        (
            {
                "training__tokens": "50M",
                "training__held_out_sequences": 100,
                "training__sources": [{"path": "a", "max_tokens": "50M"}],
            },
            "training.tokens=50M and held_out_sequences=100 is more than the max_tokens of all sources allow",
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
            {"calibration__source__prompt_fields": ["q"]},
            "calibration.source.prompt_fields needs format instruction.",
        ),
        (
            {"calibration__source__format": "chat", "calibration__source__response_field": "a"},
            "calibration.source.response_field needs format instruction.",
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


def test_sources_of_which_one_has_no_max_tokens_may_fill_any_training():
    sources = [{"path": "a", "max_tokens": "50M"}, {"path": "b"}]
    for caps in ({}, {"max_tokens": "50M"}):
        data = changed(LEAST, training__tokens="100M", training__sources=[sources[0], sources[1] | caps])
        assert settings_from_dict(data).training.total_steps == 762


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
