"""A run's key: only what can change the result changes it, and earlier runs keep theirs."""

import contextlib
import dataclasses
import hashlib
import json
import typing

from core.errors import SettingsError
from core.settings.identity import with_former
from core.settings.recipe import settings_from_dict
from core.settings.schema import Settings
from tests.support.recipes import FULL, changed

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
    *(("training", name) for name in ("ranks", "nodes", "sharding", "moments", "layer_inputs")),
    *(("training", name) for name in ("attention", "compile", "max_loss_rise")),
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
    elsewhere = {
        name for name in found if name[0] in ("evaluation", "storage", "tracking", "registry", "cluster")
    }
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
        ("evaluation", "ranks"),
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
            "prune": {"criterion": "fisher_per_token", "repair": "ridge"},
            "training": {"packing": "whole", "teacher": "base"},
        },
    }
    assert settings.digest() == hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
    named = dataclasses.replace(settings, prune=dataclasses.replace(settings.prune, amplitude=0.02))
    assert named.digest() == settings.digest()


def test_a_setting_that_older_versions_did_not_have_keeps_the_key_of_what_they_did():
    recipe = {"model": {"base": "b"}, "calibration": {"source": {"path": "p"}}}
    before = {"algorithm": 1, "settings": {"calibration": {"source": {"path": "p"}}}}
    former = {
        "prune": {"criterion": "taylor_l1", "repair": "none"},
        "training": {"packing": "cut", "teacher": "none"},
    }
    former["model"] = {"base": "b", "dtype_between_phases": "same"}
    older = settings_from_dict(recipe | former)
    assert older.digest() == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    assert settings_from_dict(recipe).digest() != older.digest()
    stored = older.to_dict()
    assert settings_from_dict(with_former(Settings, stored)) == older
    del stored["prune"]["repair"], stored["model"]["dtype_between_phases"]
    del stored["training"]["packing"], stored["training"]["teacher"]
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
        counted |= {"teacher": "base"}
        former = {
            "model": {"dtype_between_phases": "float32"},
            "prune": {"criterion": "fisher_per_token", "repair": "ridge"},
        }
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
