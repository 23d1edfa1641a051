"""Twenty phases: Argo compresses the nodes of the workflow, which stays within what it can store."""

import pytest

from core.storage.store import open_store
from pipelines.ir import LARGEST_WORKFLOW_BYTES
from tests.cluster.test_launcher import final_of
from tests.local.test_kills import orphans
from tests.support.kubeflow import LONGEST_S, estimated_bytes, workflow_size

PHASES = 20


def test_twenty_phases(kubeflow, tmp_path, record_property):
    changes = {"prune.phases": PHASES, "training.tokens": "20480"}
    recipe = kubeflow.recipe("phases", changes)
    followed = kubeflow.submit(recipe, tmp_path)
    code, text = followed.end(4 * LONGEST_S)
    assert code == 0, text
    run_id = followed.run_ids[0]
    manifest = kubeflow.manifest(run_id)
    assert manifest["status"].get("compressedNodes"), "it was small enough without"
    found, expected = workflow_size(manifest), estimated_bytes(recipe, tmp_path)
    record_property("bytes of the workflow", found)
    record_property("bytes that the compiler expects", expected)
    assert found == pytest.approx(expected, rel=0.15)  # which counts a second attempt of each task
    assert found <= LARGEST_WORKFLOW_BYTES
    # The tasks that submit has followed are all of them, though most were packed when they ended.
    tasks = kubeflow.workflow(run_id, recipe).tasks
    assert len(tasks) == 6 + 5 * PHASES
    assert {task.phase for task in tasks} == {"Succeeded"}
    assert text.count(" succeeded after ") == len(tasks)
    store = recipe["storage"]["store"]
    assert orphans(store) == set()
    done = {key.split("/")[3] for key in open_store(store).list("runs/") if "/phases/" in key}
    assert {f"{phase:02d}" for phase in range(PHASES + 1)} <= done
    assert final_of(recipe)
