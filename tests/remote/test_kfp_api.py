"""The stand-in of Kubeflow Pipelines is strict: otherwise the tests against it would prove little."""

import json
import re

import pytest
import yaml
from google.protobuf import json_format

from core.errors import ClusterError
from pipelines.remote.client import connect
from pipelines.remote.submission import Package, upload
from tests.support.kfp_models import Refused, strict

BODIES = {
    "an unknown field": ({"display_name": "x", "enable_caching": True}, 'unknown field "enable_caching"'),
    "a number for a text": ({"display_name": 7}, "display_name=7 must be of type str"),
    "a text for a mapping": ({"runtime_config": "x"}, "the body.runtime_config must be a mapping"),
    "a state that is none": ({"state": "DONE"}, "is none of"),
}


@pytest.mark.parametrize("what", BODIES)
def test_the_stand_in_is_strict(what):
    body, problem = BODIES[what]
    with pytest.raises(Refused, match=re.escape(problem)):
        strict(body, "V2beta1Run")


def test_the_stand_in_refuses_what_no_pipeline_is(api, submission):
    client = connect(host=api.endpoint)
    broken = json.loads(json.dumps(next(yaml.safe_load_all(submission.package.content))))
    broken["root"]["dags"] = {}
    package = Package(content=yaml.safe_dump(broken).encode(), version="x", tasks={})
    with pytest.raises(ClusterError, match="refuses the request"):
        upload(client, package)
    assert json_format.MessageToDict(api.spec(upload(client, submission.package)[1]))
