"""What all tests on a real cluster share: the installation, and a run that nobody disturbs."""

import os
import uuid

import pytest

from core.storage.interface import join_uri
from core.storage.publication import publish
from tests.support.kubeflow import Kubeflow

NEEDED = {
    "KF_PIPELINES_ENDPOINT": "the address of Kubeflow Pipelines",
    "IMAGE": "an image of tests/cluster/real/Dockerfile that the nodes can pull",
    "STORE": "s3://BUCKET/PREFIX, which pods and this machine reach",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    missing = [f"{name} ({what})" for name, what in NEEDED.items() if not os.environ.get(name)]
    for item in items:
        if "/cluster/real/" in item.path.as_posix():
            item.add_marker(pytest.mark.cluster)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"not named: {', '.join(missing)}"))


@pytest.fixture(scope="session")
def kubeflow(project):
    """The installation; what the tests have made there is removed at the end."""
    found = Kubeflow(
        namespace=os.environ.get("NAMESPACE", "kubeflow"),
        image=os.environ["IMAGE"],
        place=join_uri(os.environ["STORE"], uuid.uuid4().hex[:8]),
    )
    found.prepare()
    try:
        publish(project / "base", join_uri(found.place, "base"))
        yield found
    finally:
        found.remove_all()


@pytest.fixture
def pods(kubeflow):
    """The installation where its pods can be seen and deleted."""
    if kubeflow.core is None:
        pytest.skip("no kubeconfig: set KUBECONFIG")
    return kubeflow


@pytest.fixture
def own_cluster(pods):
    """The same where nobody else works on it."""
    if not os.environ.get("OWN_CLUSTER"):
        pytest.skip("others may work on the cluster: set OWN_CLUSTER=1 if nodes may be drained there")
    return pods


@pytest.fixture(scope="session")
def undisturbed(kubeflow, tmp_path_factory):
    """A run that nobody disturbs: its recipe, and what followed it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = kubeflow.recipe("undisturbed")
    followed = kubeflow.submit(recipe, folder)
    code, text = followed.end()
    assert code == 0, text
    if kubeflow.core is not None:  # at once: a node that is drained later loses its pods
        followed.labels = [pod.metadata.labels for pod in kubeflow.pods(followed.run_ids[0])]
    return recipe, followed
