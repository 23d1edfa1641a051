"""The image: what its Dockerfile promises, what is locked, and what is in the wheel that it installs."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from core.settings.cluster import ClusterSettings

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
LOCK = ROOT / "docker" / "requirements.lock"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("components", "core", "pipelines")


def instructions():
    """The Dockerfile as (instruction, arguments), lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def stages():
    """The instructions of each stage, its FROM first."""
    found = []
    for instruction in instructions():
        if instruction[0] == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def copied(stage):
    """The paths that a stage takes from the build context."""
    sources = [
        arguments.split()[:-1] for name, arguments in stage if name == "COPY" and "--from" not in arguments
    ]
    return [source for paths in sources for source in paths]


def ignored(path):
    """Whether .dockerignore keeps a path out of the build context: the last line that matches counts."""
    result = False
    for line in (ROOT / ".dockerignore").read_text().split("\n"):
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").replace("**/", "*")
            if any(fnmatch.fnmatch(str(part), pattern) for part in (path, *path.parents)):
                result = not line.startswith("!")
    return result


# --- Dockerfile


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run(
        [hadolint, "--no-fail", "--format", "json", DOCKERFILE], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == []


def test_the_base_image_is_an_argument_that_must_be_given():
    assert instructions()[0] == ("ARG", "BASE_IMAGE")
    assert [arguments.split()[0] for name, arguments in instructions() if name == "FROM"] == [
        "${BASE_IMAGE}",
        "${BASE_IMAGE}",
    ]
    usage = re.findall(r"--build-arg BASE_IMAGE=(\S+)", DOCKERFILE.read_text())
    assert usage
    assert all("@sha256:" in image for image in usage)
    assert "latest" not in DOCKERFILE.read_text()


def test_tasks_run_as_a_user_who_is_not_root_and_owns_a_home():
    *_, final = stages()
    users = [arguments for name, arguments in final if name == "USER"]
    assert len(users) == 1
    assert re.fullmatch(r"[1-9]\d*:0", users[0]), "by number: Kubernetes cannot check a name for root"
    names = [name for name, _ in final]
    assert "RUN" not in names[names.index("USER") :]
    (environment,) = [arguments for name, arguments in final if name == "ENV"]
    variables = dict(pair.split("=") for pair in environment.split())
    for name in ("HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        assert variables[name].startswith("/tmp/"), "the root filesystem may be read-only"
    assert any("useradd" in arguments and variables["HOME"] in arguments for _, arguments in final)


def test_kfp_can_bring_its_own_command():
    assert "ENTRYPOINT" not in {name for name, _ in instructions()}


def test_the_final_stage_installs_the_lock_before_the_wheel_and_holds_no_sources():
    *_, final = stages()
    assert copied(final) == ["docker/requirements.lock"]
    installs = [arguments for name, arguments in final if name == "RUN" and "pip install" in arguments]
    lock, wheel = installs
    assert "--requirement /tmp/requirements.lock" in lock
    assert "from=build" in wheel
    assert "--no-deps /dist/*.whl" in wheel
    assert all("--no-cache-dir" in install for install in installs)


def test_the_build_context_holds_what_is_copied_and_nothing_else():
    for source in {path for stage in stages() for path in copied(stage)}:
        assert (ROOT / source).exists(), source
        assert not ignored(Path(source)), source
    for other in (
        "tests/cluster/test_docker.py",
        ".git/HEAD",
        "output/demo/run.log",
        "docker/Dockerfile",
        ".venv/x",
    ):
        assert ignored(Path(other)), other
    assert ignored(Path("core/__pycache__/config.pyc"))


def test_versions_agree():
    version = PROJECT["project"]["version"]
    assert f'org.opencontainers.image.version="{version}"' in DOCKERFILE.read_text()
    assert ClusterSettings().image.endswith(f":{version}")
    (setuptools,) = re.findall(r"setuptools==(\S+)", DOCKERFILE.read_text())
    (wanted,) = map(Requirement, PROJECT["build-system"]["requires"])
    assert wanted.name == "setuptools"
    assert wanted.specifier.contains(setuptools)


# --- requirements.lock


def pins():
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_the_lock_pins_public_versions_once_and_in_order():
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", line), (
            "a local version such as +cpu is on one index only"
        )
    assert lines == sorted(set(lines), key=lambda line: line.split("==")[0])
    assert len(pins()) == len(lines)


def test_the_lock_holds_what_the_project_needs_in_a_version_that_it_allows():
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement


def test_the_lock_holds_no_tools_and_nothing_that_depends_on_the_build_of_torch():
    tools = {Requirement(text).name for text in PROJECT["project"]["optional-dependencies"]["dev"]}
    needed_otherwise = {"docker", "kubernetes", "setuptools"}  # the first two by kfp
    assert not (tools - needed_otherwise) & pins().keys()
    assert not [name for name in pins() if name.startswith("nvidia-") or name in ("triton", "adapt-pruner")]


def test_the_lock_is_complete():
    """Every requirement of every locked package is locked; made by another way than by docker/lock.py."""
    report = subprocess.run(
        [sys.executable, "-m", "pip", "inspect", "--local"], capture_output=True, text=True, check=True
    )
    metadata = {
        canonicalize_name(package["metadata"]["name"]): package["metadata"]
        for package in json.loads(report.stdout)["installed"]
    }
    for name, version in pins().items():
        if name not in metadata or metadata[name]["version"].split("+")[0] != version:
            continue  # another version is installed here, which may need something else
        for requirement in map(Requirement, metadata[name].get("requires_dist", [])):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed = canonicalize_name(requirement.name)
                assert needed in pins() or needed.startswith(("nvidia-", "cuda-", "triton")), (name, needed)


# --- wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The files of the wheel, built from a copy: a build in place would take up what an earlier one left."""
    folder = tmp_path_factory.mktemp("build")
    left = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "output", "shared", "node_modules"
    )
    shutil.copytree(ROOT, folder / "source", ignore=left)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(folder / "source")], check=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_our_packages_whole_and_nothing_else(wheel):
    found = {name for name in wheel if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert found == wanted
    assert "core/settings/schema.py" in found


def test_the_build_stage_has_all_that_the_wheel_is_made_of(wheel):
    build, _ = stages()
    sources = set(copied(build))
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} <= sources
    project = PROJECT["project"]
    assert {"pyproject.toml", project["readme"], *project["license-files"]} <= sources


def test_the_wheel_brings_the_command_the_licence_and_no_tools(wheel):
    information = {Path(name).name: data.decode() for name, data in wheel.items() if ".dist-info/" in name}
    assert "adapt-pruner = pipelines.cli:main" in information["entry_points.txt"]
    assert information["LICENSE"] == (ROOT / "LICENSE").read_text()
    required = [
        Requirement(line.removeprefix("Requires-Dist: "))
        for line in information["METADATA"].splitlines()
        if line.startswith("Requires-Dist: ")
    ]
    assert {r.name for r in required if r.marker is None} == {
        Requirement(text).name for text in PROJECT["project"]["dependencies"]
    }
