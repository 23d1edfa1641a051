"""The last step of a pipeline decides whether its result becomes the champion."""

from pathlib import Path

import pytest

from core.errors import SettingsError
from core.settings.recipe import settings_from_dict
from core.tracking.registry import CHAMPION, Registry
from tests.support.project import recipe_with, run_all


@pytest.mark.slow
def test_a_rerun_ends_in_a_candidate_a_comparison_and_a_decision_in_kfp_and_mlflow(
    project, tmp_path, monkeypatch
):
    monkeypatch.chdir(project)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    fixed = {
        "storage.store": str(tmp_path / "store"),
        "prune.phases": 1,
        "training": {"tokens": "0"},
        "tracking": {"uri": uri, "model_name": "small"},
        "evaluation.perplexity_windows": 12,
    }

    def run(target, margin):
        rule = {"registry": {"promote": "rule", "margin": margin}, "prune.target": target}
        run_all(recipe_with(fixed | rule), tmp_path / target, job=f"job-{target}")
        return Path(tmp_path / target / "report").read_text()

    registry = Registry(uri, "small")
    assert "small: Version 1 is promoted: there was no champion." in run("65%", 0.0)
    assert registry.find(CHAMPION).number == "1"
    refused = run("90%", 0.0)  # random weights: what is left is the better the less it is
    assert "Version 2 is not promoted: it is " in refused
    assert registry.find(CHAMPION).number == "1"
    version = registry.client.get_model_version("small", "2")
    assert "paired bootstrap over the 12 windows" in version.description
    client, found = registry.client, registry.find("candidate")
    assert found.number == "2"
    parent = client.get_run(found.run_id)
    assert "small: Version 2 is not promoted" in parent.data.tags["mlflow.note.content"]
    files = [file.path for file in client.list_artifacts(found.run_id, "promotion")]
    assert files == [f"promotion/version-2-against-version-1.{kind}" for kind in ("json", "md")]
    assert "Version 3 is promoted" in run("80%", 1.0)
    assert registry.find(CHAMPION).number == "3"


def test_a_rule_needs_a_model_and_a_figure_that_is_measured():
    def problems(**registry):
        with pytest.raises(SettingsError) as caught:
            settings_from_dict(recipe_with({"registry": {"promote": "rule", **registry}}))
        return str(caught.value)

    assert "registry.promote=rule needs a registered model. Name it in tracking.model_name." in problems()
    assert "registry.metric=arc_easy is not measured." in problems(metric="arc_easy")
    assert "registry.metric=accuracy is not measured." in problems(metric="accuracy")
    assert "registry.margin=2" in problems(margin=2)
    with pytest.raises(SettingsError, match="perplexity is not measured"):
        settings_from_dict(
            recipe_with({"registry": {"promote": "rule"}, "evaluation": {}, "tracking": {"model_name": "m"}})
        )


def test_the_registry_is_no_part_of_a_runs_key():
    rule = {"registry": {"promote": "rule", "margin": 0.5}, "tracking": {"model_name": "m"}}
    assert settings_from_dict(recipe_with(rule)).digest() == settings_from_dict(recipe_with({})).digest()
