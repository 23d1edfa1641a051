"""Recipes and overrides become settings."""

import json

import pytest
import yaml

from core.settings.calibration import CalibrationSettings
from core.settings.cluster import ClusterSettings
from core.settings.prune import PruneSettings
from core.settings.recipe import load_recipe, settings_from_dict
from core.settings.texts import TextSource
from core.settings.training import TrainingSettings
from tests.support.recipes import FULL, LEAST, changed, problem_of, write

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
