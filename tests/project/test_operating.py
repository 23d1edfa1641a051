"""docs/operating.md and docs/running.md: their commands, files and settings exist."""

import dataclasses
import re
import shutil
import typing

import pytest
import yaml

from core.settings.cluster import ClusterSettings, ComponentSettings
from core.settings.recipe import load_recipe, settings_from_dict
from pipelines.cluster import CONFIG_KEYS, SECRET_KEYS
from tests.project.test_documents import parsed
from tests.support.manifests import MANIFESTS, identity, render
from tests.support.project import ROOT

PAGE = "\n".join((ROOT / "docs" / name).read_text() for name in ("operating.md", "running.md"))
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
INLINE = [line for line in re.findall(r"`([^`\n]+)`", PAGE) if line.startswith(("adapt-pruner ", "kubectl "))]
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()] + INLINE
OURS = [command for command in COMMANDS if command.startswith("adapt-pruner")]
TABLE = re.findall(r"^\| `cluster\.(\w+)` \| (.*?) \| (own)? ?\|", PAGE, re.MULTILINE)


def test_every_command_is_of_a_kind_that_is_checked():
    assert {command.split()[0] for command in COMMANDS} == {"docker", "cp", "kubectl", "adapt-pruner"}


def test_the_recipe_that_is_compiled_takes_its_overrides():
    (command,) = [command for command in OURS if command.startswith("adapt-pruner compile")]
    values = parsed(command)
    settings = load_recipe(ROOT / values["recipe"], values["overrides"])
    assert settings.storage.store.startswith("s3://")
    assert "@sha256:" in settings.cluster.image


@pytest.mark.parametrize("page", ["docs/operating.md", "recipes/README.md"])
def test_the_file_of_a_cluster_lies_over_a_run_of_the_paper(tmp_path, page):
    site, recipe, *_ = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "recipes" / "site.yaml").write_text(site)
    path = tmp_path / "recipes" / "ours.yaml"
    path.write_text(recipe)
    settings = load_recipe(path)
    assert (settings.name, settings.prune.target) == ("qwen-on-our-cluster", "376.1M")
    assert settings.cluster.memory == "64Gi"
    assert settings.storage.store == "s3://adapt-pruner/store"


def test_every_assignment_of_a_setting_is_a_right_one():
    for name, value in re.findall(r"`([a-z]+)\.([a-z_]+=[^`]+)`", PAGE):
        key, _, text = value.partition("=")
        if "..." not in text:
            least = {"model": {"base": "m"}, "calibration": {"source": {"path": "c.txt"}}}
            least.setdefault(name, {})[key] = yaml.safe_load(text)
            settings_from_dict(least)


def test_the_table_has_every_setting_its_default_and_whether_a_component_may_have_its_own():
    own = {field.name for field in dataclasses.fields(ComponentSettings)}
    assert [name for name, _, _ in TABLE] == [field.name for field in dataclasses.fields(ClusterSettings)]
    for name, default, mark in TABLE:
        stated, true = yaml.safe_load(default), getattr(ClusterSettings(), name)
        assert str(stated) == str(list(true) if isinstance(true, tuple) else true), name
        assert bool(mark) == (name in own), name
    for key in (*SECRET_KEYS, *CONFIG_KEYS):
        assert f" {key}" in PAGE, key


def test_every_component_is_named():
    from core.settings.cluster import ComponentName

    (named,) = re.findall(r"for one component: (.*?)\.\n\n", PAGE, re.DOTALL)
    assert tuple(re.findall(r"`([a-z-]+)`", named)) == typing.get_args(ComponentName)


def test_every_file_that_is_named_is_there():
    paths = re.findall(r"(?:-f|-k|kustomize|cp) (docker/[\w./-]+)", PAGE)
    paths += re.findall(r"`(docker/[\w./-]+)`", PAGE)
    assert not [path for path in paths if not (ROOT / path).exists()]
    assert len(set(paths)) > 5
    files = {path.name for folder in (MANIFESTS, ROOT / "recipes") for path in folder.rglob("*.yaml")}
    assert set(re.findall(r"[\w.-]+\.yaml\b", PAGE)) <= files | {"pipeline.yaml", "site.yaml"}


def test_what_kubectl_is_asked_for_is_in_the_manifests():
    known = {identity(found): found for found in render(MANIFESTS / "base")}
    kinds = {"deployment": "Deployment", "service": "Service"}
    asked = re.findall(r"\b(deployment|service)/([\w-]+)", PAGE)
    asked.remove(("deployment", "ml-pipeline"))  # the API server of Kubeflow Pipelines
    assert asked
    assert not [(kind, name) for kind, name in asked if (kinds[kind], name) not in known]
    spaces = set(re.findall(r"-n (\w+)", PAGE))
    assert spaces == {found["metadata"]["namespace"] for found in known.values()}
    for pod in re.findall(r"exec ([\w-]+)-0 ", PAGE):
        assert ("StatefulSet", pod) in known
    boxes = known["Deployment", "mlflow"]["spec"]["template"]["spec"]["initContainers"]
    assert re.findall(r"deployment/mlflow --container (\w+)", PAGE) == [box["name"] for box in boxes]


def test_images_that_are_built_are_those_that_the_manifests_and_the_settings_name():
    tags = re.findall(r"-t REGISTRY/(\S+)", PAGE)
    image = ClusterSettings().image.rpartition("/")[2]
    images = yaml.safe_load((MANIFESTS / "base" / "kustomization.yaml").read_text())["images"]
    server = next(entry for entry in images if entry["name"] == "mlflow")
    assert tags == [image, f"{server['newName'].rpartition('/')[2]}:{server['newTag']}"]
    assert set(re.findall(r"docker push REGISTRY/(\S+)", PAGE)) == set(tags)
