"""The manifests of docker/kubernetes, given to the real API server, which checks them and keeps nothing."""

import pytest

from tests.support.manifests import MANIFESTS, render


@pytest.mark.parametrize("folder", ["base", "trial"])
def test_the_api_server_takes_the_manifests(pods, folder):
    from kubernetes import client, dynamic

    dynamic_client = dynamic.DynamicClient(client.ApiClient())
    objects = render(MANIFESTS / folder)
    for each in objects:
        resource = dynamic_client.resources.get(api_version=each["apiVersion"], kind=each["kind"])
        each["metadata"]["namespace"] = pods.namespace
        name = each["metadata"]["name"]
        each["metadata"]["name"] = f"{pods.name}-{name}"  # no conflict with what is installed
        told = dynamic_client.server_side_apply(
            resource,
            body=each,
            name=each["metadata"]["name"],
            namespace=pods.namespace,
            field_manager=pods.name,
            query_params=[("dryRun", "All"), ("fieldValidation", "Strict")],
        )
        assert told.metadata.uid, name
    names = [each["metadata"]["name"] for each in objects]
    left = pods.core.list_namespaced_service(pods.namespace).items
    assert not {each.metadata.name for each in left} & set(names)
