"""The stand-in of Kubeflow Pipelines is strict: otherwise the tests against it would prove little."""

import json
import re
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format

from core.errors import ClusterError
from core.settings.recipe import load_recipe
from pipelines.remote.client import connect
from pipelines.remote.submission import Package, prepare, upload
from tests.support.kfp_api import run_kfp_api
from tests.support.kfp_models import Refused, strict
from tests.support.kfp_trial import forget_kfp, write_trial


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    forget_kfp(monkeypatch)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    return write_trial(tmp_path, monkeypatch)


@pytest.fixture
def api():
    with run_kfp_api() as running:
        yield running


@pytest.fixture
def submission(recipe):
    return prepare(load_recipe(Path(recipe)))


BODIES = {
    "an unknown field": ({"display_name": "x", "enable_caching": True}, 'unknown field "enable_caching"'),
    "a number for a text": ({"display_name": 7}, "display_name=7 is not of type str"),
    "a text for a mapping": ({"runtime_config": "x"}, "is no V2beta1RuntimeConfig"),
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
