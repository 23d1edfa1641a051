"""The TrainJob of a training by several nodes: made, followed and ended by the step, against a strict API."""

import copy
import dataclasses
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.nodes import api as nodes_api
from components.nodes import following
from components.nodes.following import train_on_nodes
from components.nodes.train_job import VARIABLE, NodeSettings, job_name
from core.errors import ClusterError, TrainingError
from core.runs.run import Run
from core.steps.recover_train import run_recover_train
from core.storage.publication import find_publication
from tests.support.project import ROOT, Artifact
from tests.support.trainer_api import NAMESPACE, OWN, POD, Refused, finished, pod_of, serving
from tests.training.test_nodes import free_port, variables
from tests.training.test_ranks_step import assert_close_results
from tests.training.test_training_kills import (  # noqa: F401
    job_in,
    processes,
    pruned,
    run_in_a_process,
)


@dataclasses.dataclass
class Of:
    nodes: int = 2


@dataclasses.dataclass
class SettingsOf:
    training: Of = dataclasses.field(default_factory=Of)


@dataclasses.dataclass
class RunOf:
    """As much of a run as the step looks at."""

    store: str = "s3://bucket/store"
    key: str = "0123456789ab"
    settings: SettingsOf = dataclasses.field(default_factory=SettingsOf)

    def handle(self):
        return {"store": self.store, "key": self.key, "job": "j"}


def in_the_pod(api, folder):
    """Be a process of the step's pod: what its environment and its service account's files say."""
    from kubernetes import client, config

    def load():
        configuration = client.Configuration(host=api.address)
        configuration.retries = False
        client.Configuration.set_default(configuration)

    config.load_incluster_config = load
    nodes_api.NAMESPACE = folder / "namespace"
    nodes_api.NAMESPACE.write_text(NAMESPACE)
    os.environ["KFP_POD_NAME"] = OWN
    following.LOOK_S = 0.05


@pytest.fixture
def api(tmp_path, monkeypatch):
    from kubernetes import config

    monkeypatch.setattr(config, "load_incluster_config", None)
    monkeypatch.setattr(nodes_api, "NAMESPACE", None)
    monkeypatch.setattr(following, "LOOK_S", None)
    monkeypatch.setenv("KFP_POD_NAME", "")
    with serving(pods={OWN: copy.deepcopy(POD)}) as found:
        in_the_pod(found, tmp_path)
        yield found


def by_steps(api, *steps):
    """Take one step at each look at the TrainJob; the last one stays."""
    left = iter([*steps, *itertools.repeat(steps[-1], 2000)])
    api.act = lambda job: next(left)(job)


def running(api, *phases, **status):
    def act(job):
        for node, phase in enumerate(phases):
            pod = pod_of(job, node, phase, **status)
            api.pods[pod["metadata"]["name"]] = pod

    return act


def train():
    train_on_nodes(RunOf(), 3, "s3://bucket/store/c", "s3://bucket/store/d")


NAME = job_name(RunOf(), 3)
FIRST = f"{NAME}-node-0-0-x7"


def test_nodes_are_as_the_pod_of_the_step(api, monkeypatch):
    resources = {"requests": {"cpu": "8"}, "limits": {"memory": "256Gi", "nvidia.com/gpu": "4"}}
    monkeypatch.setenv(VARIABLE, NodeSettings(runtime="ours", resources=resources).to_text())
    api.runtimes = ("ours",)
    by_steps(api, lambda job: finished(job, "Complete"))
    train()
    (job,) = api.created
    spec, (patch,) = job["spec"], job["spec"]["runtimePatches"]
    assert job["metadata"] == {
        "name": NAME,
        "labels": {"adapt-pruner/component": "recover-train", "kueue.x-k8s.io/queue-name": "gpus"},
        "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": OWN, "uid": "0-0-4-2"}],
    }
    assert (spec["activeDeadlineSeconds"], spec["runtimeRef"]["name"]) == (86400, "ours")
    trainer = spec["trainer"]
    assert trainer.pop("args")[1:] == [
        "--phase=3",
        "--checkpoint=s3://bucket/store/c",
        "--data=s3://bucket/store/d",
    ]
    own = POD["spec"]["containers"][1]
    assert trainer == {
        "image": own["image"],
        "command": ["python", "-m", "components.nodes.main"],
        "env": own["env"][-2:],
        "numNodes": 2,
        "resourcesPerNode": resources,
    }
    (of_node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    template = of_node["template"]["spec"]["template"]
    assert template["metadata"]["labels"] == {
        "adapt-pruner/component": "recover-train",
        "sidecar.istio.io/inject": "false",
    }
    names = ("serviceAccountName", "nodeSelector", "tolerations", "imagePullSecrets")
    assert template["spec"] == {
        **{name: POD["spec"][name] for name in names},
        "volumes": POD["spec"]["volumes"][:2],
        "containers": [
            {
                "name": "node",
                "volumeMounts": own["volumeMounts"][:2],
                "securityContext": own["securityContext"],
            }
        ],
    }


def test_without_settings_a_node_has_what_the_pod_has(api):
    by_steps(api, lambda job: finished(job, "Complete"))
    train()
    assert api.created[0]["spec"]["trainer"]["resourcesPerNode"] == POD["spec"]["containers"][1]["resources"]


def test_the_step_shows_what_happens_and_leaves_nothing(api, capfd, caplog):
    caplog.set_level("INFO", "components")
    waits = {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]}
    waits["conditions"][0]["message"] = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."

    def logged(*lines):
        def act(job):
            running(api, "Running", "Running")(job)
            api.logs[FIRST] = [f"2026-01-01T00:00:{i:02d}Z {line}" for i, line in enumerate(lines)]

        return act

    by_steps(
        api,
        running(api, "Pending", "Pending", **waits),
        logged("step 1", "step 2"),
        logged("step 1", "step 2", "step 3"),
        lambda job: finished(job, "Complete"),
    )
    train()
    assert capfd.readouterr().err.splitlines() == ["step 1", "step 2", "step 3"]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "2 nodes",
        "2 pending; node 0: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        "2 running",
    ]
    assert api.requests[-1] == "delete trainjobs"
    assert "deletionTimestamp" in api.jobs[NAME]["metadata"]


def test_the_error_is_that_of_the_node_that_ended_first(api):
    def ended(at, **said):
        return {"containerStatuses": [{"state": {"terminated": {"exitCode": 1, "finishedAt": at, **said}}}]}

    def fail(job):
        running(api, "Failed", **ended("2026-01-01T00:00:09Z", message="error: node 1 of 2 ...\n"))(job)
        killed = pod_of(job, 1, "Failed", **ended("2026-01-01T00:00:07Z", reason="OOMKilled"))
        api.pods[killed["metadata"]["name"]] = killed
        finished(job, "Failed", "FailedJobs", "jobset failed due to one or more job failures")

    by_steps(api, running(api, "Running", "Running"), fail)
    with pytest.raises(TrainingError, match=r"^the TrainJob .* has failed: node 1: OOMKilled, exit code 1$"):
        train()
    assert "deletionTimestamp" in api.jobs[NAME]["metadata"]


def test_a_failure_without_pods_is_told_by_the_job(api):
    by_steps(api, lambda job: finished(job, "Failed", "DeadlineExceeded", "took too long"))
    with pytest.raises(TrainingError, match=r"has failed: DeadlineExceeded: took too long$"):
        train()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"allowed": {"get pods"}},
            r"must not create a TrainJob in the namespace team: it lacks create trainjobs\. Apply docker/",
        ),
        ({"allowed": set()}, r"must not read the pod .*: it lacks get pods\."),
        ({"installed": False}, r"^the cluster knows no TrainJob .*Install Kubeflow Trainer, or set training"),
        ({"runtimes": ()}, r"^the cluster has no ClusterTrainingRuntime torch-distributed: .* not found: .*"),
        ({"pods": {}}, r"^Kubernetes refuses to read the pod .* \(404\): pods .* not found\.$"),
    ],
)
def test_what_the_cluster_refuses_is_one_line(api, changes, told):
    for name, value in changes.items():
        setattr(api, name, value)
    with pytest.raises(ClusterError, match=told) as caught:
        train()
    assert "\n" not in str(caught.value)
    assert not api.created


def test_a_process_outside_a_cluster_is_told_so():
    with pytest.raises(ClusterError, match=r"^training\.nodes=2 needs a pod of a Kubernetes cluster .*"):
        train()


def test_the_job_of_an_earlier_attempt_is_ended_first(api):
    by_steps(api, running(api, "Running", "Running"), lambda job: finished(job, "Complete"))
    api.jobs[NAME] = {"metadata": {"name": NAME, "uid": "old"}, "status": {}}
    train()
    assert api.requests[1:6] == [
        "create trainjobs",
        "delete trainjobs",
        *["get trainjobs"] * 2,
        "create trainjobs",
    ]
    assert len(api.created) == 1


def test_an_api_that_is_away_for_a_while_ends_nothing(api):
    looks = iter(range(100))

    def away(request):
        if next(looks) in (2, 3, 5):
            raise Refused(503, "etcdserver: leader changed")

    api.hook = away
    by_steps(api, running(api, "Running", "Running"), lambda job: finished(job, "Complete"))
    train()


def test_a_job_that_somebody_deletes_is_an_error(api):
    by_steps(api, lambda job: job["metadata"].update(deletionTimestamp="now") or job.update(looks=1))
    with pytest.raises(TrainingError, match=rf"^the TrainJob {NAME} was deleted while it trained\."):
        train()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda job: job["spec"].update(podTemplateOverrides=[]), 'unknown field "podTemplateOverrides"'),
        (lambda job: job["spec"]["trainer"].update(numNodes="2"), "must be of type int"),
        (lambda job: job["spec"]["runtimePatches"][0].pop("manager"), "manager.* must not be None"),
    ],
)
def test_the_stand_in_is_strict(api, monkeypatch, change, said):
    made = following.train_job

    def changed(*args):
        change(job := made(*args))
        return job

    monkeypatch.setattr(following, "train_job", changed)
    with pytest.raises(ClusterError, match=rf"^Kubernetes refuses to create a TrainJob \(400\): .*{said}"):
        train()
    assert not api.created


def follow_until_sigterm(address, folder):
    in_the_pod(dataclasses.make_dataclass("Api", ["address"])(address), folder)
    train()


def test_a_step_that_is_told_to_end_takes_the_job_along(api, tmp_path):
    by_steps(api, running(api, "Running", "Running"))
    process = multiprocessing.get_context("fork").Process(
        target=follow_until_sigterm, args=(api.address, tmp_path)
    )
    process.start()
    deadline = time.monotonic() + 60
    while api.requests.count("list pods") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "deletionTimestamp" in api.jobs[NAME]["metadata"]


@pytest.mark.slow
def test_the_step_has_real_nodes_train_and_reads_the_result(
    api,
    processes,  # noqa: F811
    job_in,  # noqa: F811
    tmp_path,
    capfd,
):
    """The stand-in starts what the TrainJob says, as a kubelet does."""
    expected = job_in(str(tmp_path / "one"), save_every="0", optimizer_state="reset")
    run_in_a_process(processes, expected)
    job = job_in(str(tmp_path / "two"), nodes=2, save_every="5 steps", optimizer_state="reset")
    started, port = [], free_port()

    def act(train_job):
        trainer = train_job["spec"]["trainer"]
        name = train_job["metadata"]["name"]
        if not started:
            given = {each["name"]: each["value"] for each in trainer["env"] if "value" in each}
            line = [sys.executable, *trainer["command"][1:], *trainer["args"]]
            for node in range(trainer["numNodes"]):
                environment = os.environ | given | variables(node, port) | {"OMP_NUM_THREADS": "1"}
                with (tmp_path / f"node-{node}.log").open("wb") as log:
                    started.append(subprocess.Popen(line, cwd=ROOT, env=environment, stderr=log))
        running(api, *["Running"] * len(started))(train_job)
        lines = (tmp_path / "node-0.log").read_text().splitlines()
        api.logs[f"{name}-node-0-0-x7"] = [f"{i:09d} {line}" for i, line in enumerate(lines, start=1)]
        codes = [process.poll() for process in started]
        if None not in codes:
            finished(train_job, "Failed" if any(codes) else "Complete")

    api.act = act
    following.LOOK_S = 0.3
    run_recover_train(**job["given"], phase=1, model=Artifact(tmp_path / "model"), on_nodes=train_on_nodes)
    assert find_publication(job["uri"]) is not None
    assert_close_results(job, expected, tmp_path / "fetched")
    shown = capfd.readouterr().err
    assert "2 ranks on 2 nodes, 3 sequences at once on each; each holds all weights" in shown
    assert "saved the training state" in shown
    assert api.created[0]["metadata"]["name"] == job_name(Run.load(job["given"]["run"]), 1)
    assert len(started) == 2
    assert not Path(job["uri"], "_resume").exists()
