"""The manifests of docker/kubernetes, given to the real API server, which checks them and keeps nothing."""

import pytest

from tests.support.kubeflow import Objects
from tests.support.manifests import MANIFESTS, render


@pytest.mark.parametrize("folder", ["base", "trial"])
def test_the_api_server_takes_the_manifests(pods, folder):
    cluster, objects = Objects(pods.namespace), render(MANIFESTS / folder)
    for each in objects:
        each["metadata"]["namespace"] = pods.namespace
        name = each["metadata"]["name"]
        each["metadata"]["name"] = f"{pods.name}-{name}"  # no conflict with what is installed
        assert cluster.apply(each, ("dryRun", "All")).metadata.uid, name
    names = [each["metadata"]["name"] for each in objects]
    left = pods.core.list_namespaced_service(pods.namespace).items
    assert not {each.metadata.name for each in left} & set(names)
