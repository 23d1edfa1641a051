"""Pods deleted, a node drained, no memory, a run terminated: the end has the bits of one undisturbed."""

import os
import random
import re
import subprocess
import time

import pytest

from tests.cluster.test_launcher import final_of
from tests.local.test_kills import content, orphans
from tests.support.kubeflow import LONGEST_S, wait_until

COMPONENTS = {
    # the longest time that a pod of it lives before it is deleted, in seconds; that of training counts from
    # when its log tells of a saved state, as training itself is short
    "resolve-base": 4.0,
    "needs-run": 2.0,
    "prepare-data": 4.0,
    "evaluate": 4.0,
    "calibrate": 4.0,
    "score-layers": 4.0,
    "prune-step": 4.0,
    "recover-train": 4.0,
    "publish": 4.0,
    "finalize": 2.0,
}


@pytest.fixture
def same_bits(undisturbed, tmp_path):
    """Whether a run has published what the undisturbed one has."""
    expected = content(final_of(undisturbed[0]), tmp_path / "expected")

    def check(recipe):
        assert content(final_of(recipe), tmp_path / "found") == expected
        assert orphans(recipe["storage"]["store"]) == set()

    return check


def wait_for_training(kubeflow, followed):
    """Wait until a run has saved a state of its training; return the pod and the step."""

    def found():
        assert followed.process.poll() is None, followed.text
        for pod in kubeflow.computing(followed.run_ids[-1], "recover-train"):
            if steps := saved_steps(kubeflow.log(pod)):
                return pod, steps[-1]

    followed.has_begun()
    return wait_until(found, LONGEST_S, "it never trained")


def saved_steps(log):
    return [int(step) for step in re.findall(r"saved the training state of step (\d+)", log)]


def resumed_steps(kubeflow, followed):
    """The steps at which the training of a run went on, by the logs of its pods that are left."""
    logs = [
        kubeflow.log(pod.metadata.name)
        for run_id in followed.run_ids
        for pod in kubeflow.pods(run_id, "recover-train")
    ]
    return [int(step) for log in logs for step in re.findall(r"resumed at step (\d+)", log)]


def test_a_run_whose_pods_are_deleted_in_every_component(pods, same_bits, tmp_path, record_property):
    recipe = pods.recipe("deleted")
    followed = pods.submit(recipe, tmp_path, "--attempts=12")
    followed.has_begun()
    chance, due, victims, saved = random.Random(os.environ.get("SEED", "1")), {}, {}, []
    while followed.process.poll() is None:
        component_of = {
            pod.metadata.name: pod.metadata.labels["adapt-pruner/component"]
            for pod in pods.pods(followed.run_ids[-1])
        }
        for pod, since in pods.computing(followed.run_ids[-1]).items():
            component = component_of.get(pod)
            if component is None or component in victims:
                continue
            if component == "recover-train" and pod not in due:
                if not (saved := saved_steps(pods.log(pod))):
                    continue
                due[pod] = time.time() - since + chance.uniform(0, COMPONENTS[component])
            age = due.setdefault(pod, chance.uniform(0, COMPONENTS[component]))
            if time.time() - since >= age:
                pods.delete_pod(pod)
                victims[component] = round(time.time() - since, 1)
        time.sleep(0.3)
    code, text = followed.end()
    record_property("seconds of work that was lost, by component", victims)
    record_property("runs", len(followed.run_ids))
    assert code == 0, text
    same_bits(recipe)
    if saved:
        assert max(resumed_steps(pods, followed)) >= saved[-1]
    # A pod may end before it is deleted.
    assert "recover-train" in victims
    assert len(victims) >= len(COMPONENTS) - 3, victims


def test_a_node_is_drained_while_it_trains(own_cluster, same_bits, tmp_path):
    recipe = own_cluster.recipe("drained")
    followed = own_cluster.submit(recipe, tmp_path, "--attempts=3")
    pod, step = wait_for_training(own_cluster, followed)
    with own_cluster.drained(pod):
        time.sleep(20)
        assert not own_cluster.computing(followed.run_ids[-1])
    code, text = followed.end()
    assert code == 0, text
    same_bits(recipe)
    assert max(resumed_steps(own_cluster, followed)) >= step


def test_a_pod_without_memory_is_named_and_the_next_run_resumes(pods, same_bits, tmp_path):
    recipe = pods.recipe("memory")
    recipe["cluster"] |= {"retries": 1, "components": {"calibrate": {"memory": "150Mi"}}}
    code, text = pods.submit(recipe, tmp_path).end()
    assert code == 1, text
    assert "error: phase 1 calibrate: it ran out of memory (" in text
    assert "Raise cluster.components.calibrate.memory" in text
    del recipe["cluster"]["components"]
    code, text = pods.submit(recipe, tmp_path).end()
    assert code == 0, text
    same_bits(recipe)


def test_a_run_that_is_terminated_says_so_and_the_next_one_resumes(pods, same_bits, tmp_path):
    recipe = pods.recipe("terminated")
    followed = pods.submit(recipe, tmp_path, "--attempts=3")
    _, step = wait_for_training(pods, followed)
    pods.client.runs.run_service_terminate_run(followed.run_ids[0])
    code, text = followed.end()
    assert code == 1, text
    assert "error: the run was terminated, by a person or a program." in text
    assert len(followed.run_ids) == 1, "what a person has ended is not started again"
    wait_until(lambda: not pods.computing(followed.run_ids[0]), 120, "its pods go on")
    followed = pods.submit(recipe, tmp_path)
    code, text = followed.end()
    assert code == 0, text
    same_bits(recipe)
    assert max(resumed_steps(pods, followed)) >= step


def test_a_workflow_controller_that_is_killed_goes_on(own_cluster, same_bits, tmp_path):
    recipe = own_cluster.recipe("controller")
    followed = own_cluster.submit(recipe, tmp_path)
    wait_for_training(own_cluster, followed)
    if command := os.environ.get("RESTART_CONTROLLER"):
        subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
    elif not own_cluster.delete_controller():
        pytest.skip("Argo's controller is no pod with app=workflow-controller: RESTART_CONTROLLER names none")
    code, text = followed.end()
    assert code == 0, text
    same_bits(recipe)
