"""Recipes as plain data and as files, and the problems that are found in them."""

import pytest
import yaml

from core.errors import SettingsError
from core.settings.recipe import load_recipe, settings_from_dict
from tests.support.project import with_values

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
    "tracking": {"uri": "sqlite:///m.db", "model_name": "small"},
}


def changed(data, **values):
    """A copy of ``data`` with ``section__key`` (or ``key``) set."""
    return with_values(data, {name.replace("__", "."): value for name, value in values.items()})


def problems(data):
    with pytest.raises(SettingsError) as caught:
        settings_from_dict(data)
    return list(caught.value.problems)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def problems_of(path, *overrides):
    with pytest.raises(SettingsError) as caught:
        load_recipe(path, overrides)
    return list(caught.value.problems)


def problem_of(path, *overrides):
    (problem,) = problems_of(path, *overrides)
    return problem
