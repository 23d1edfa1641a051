"""A run on the cluster from ``submit --wait`` to its published checkpoint, and the same again."""

import contextlib
import re

import pytest

from core.model.checkpoint import CheckpointReader
from core.storage.interface import join_uri
from core.storage.publication import open_publication
from tests.cluster.test_launcher import final_of
from tests.local.test_kills import content, orphans
from tests.support.kubeflow import COMPONENT, estimated_bytes, modified, workflow_size
from tests.support.project import run_all

TASKS = (
    "resolve-base",
    "needs-run",
    "prepare-data",
    "evaluate dense model",
    "phase 1 calibrate",
    "phase 1 score-layers",
    "phase 1 prune-step",
    "phase 1 recover-train",
    "evaluate phase 1",
    "publish",
    "finalize",
)


def ends(text):
    """What was said of the end of each task."""
    return dict(re.findall(r"^\d\d:\d\d:\d\d  (\S.*?) {2,}(succeeded|failed|skipped).*$", text, re.MULTILINE))


def test_a_run_ends_as_one_of_this_machine(kubeflow, undisturbed, tmp_path):
    recipe, followed = undisturbed
    assert ends(followed.text) == dict.fromkeys(TASKS, "succeeded")
    assert followed.text.rstrip().endswith("succeeded")
    assert orphans(recipe["storage"]["store"]) == set()

    with contextlib.chdir(tmp_path):
        here = recipe | {"storage": {"store": str(tmp_path / "store")}}
        _, expected = run_all(here, tmp_path / "artifacts")
    mine, theirs = content(expected, tmp_path / "a"), content(final_of(recipe), tmp_path / "b")
    assert mine.keys() == theirs.keys()
    # Bits are equal only where processor and torch are.
    assert {name for name in mine if mine[name] != theirs[name]} <= {
        name for name in mine if name.endswith(".safetensors")
    }
    assert largest_difference(expected, final_of(recipe), tmp_path) < 1e-4


def largest_difference(uri, other, folder):
    readers = [
        CheckpointReader(open_publication(place).fetch(folder / f"weights-{i}"))
        for i, place in enumerate((uri, other))
    ]
    with readers[0] as first, readers[1] as second:
        assert sorted(first.names()) == sorted(second.names())
        return max(float((first.tensor(name) - second.tensor(name)).abs().max()) for name in first.names())


def test_pods_carry_their_component_and_phase(pods, undisturbed):
    labels = [each for each in undisturbed[1].labels if "adapt-pruner/phase" in each]
    found = {(each[COMPONENT], each["adapt-pruner/phase"]) for each in labels}
    assert {("evaluate", "0"), ("evaluate", "1"), ("recover-train", "1")} <= found


def test_the_workflow_is_as_large_as_the_compiler_expects(kubeflow, undisturbed, tmp_path):
    recipe, followed = undisturbed
    found, expected = workflow_size(kubeflow.manifest(followed.run_ids[0])), estimated_bytes(recipe, tmp_path)
    assert found == pytest.approx(expected, rel=0.05)


def test_the_same_again_does_nothing(kubeflow, undisturbed, tmp_path):
    recipe, _ = undisturbed
    final = join_uri(final_of(recipe), "MANIFEST.json")
    before = modified(final)
    code, text = kubeflow.submit(recipe, tmp_path).end()
    assert code == 0, text
    assert "already there" in text
    done = [name for name, end in ends(text).items() if end == "succeeded"]
    assert sorted(done) == ["finalize", "needs-run", "resolve-base"]
    assert modified(final) == before
