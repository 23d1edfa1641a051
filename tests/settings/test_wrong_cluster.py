"""What is wrong in the section ``cluster`` is named, all at once."""

import pytest

from tests.support.recipes import LEAST, problems

WRONG = [
    ({"image": "a b"}, "cluster.image=a b is not a valid image."),
    ({"image_pull_policy": "Sometimes"}, "cluster.image_pull_policy=Sometimes must be one of IfNotPresent, "),
    (
        {"image_pull_secrets": ["ok", "A"]},
        "cluster.image_pull_secrets[1]=A is not a valid Kubernetes name",
    ),
    ({"environment": {"A B": "x"}}, "cluster.environment.A B is not a valid variable."),
    ({"environment": {"MY_TOKEN": "x"}}, "cluster.environment.MY_TOKEN could be read in the pipeline."),
    (
        {"environment": {"HTTPS_PROXY": "http://u:p@h"}},
        "cluster.environment.HTTPS_PROXY=http://u:***@h holds",
    ),
    ({"run_as_user": -1}, "cluster.run_as_user=-1 must lie between 0 and 2,147,483,647."),
    ({"secret": "my_keys"}, "cluster.secret=my_keys is not a valid Kubernetes name"),
    ({"config_map": "-x"}, "cluster.config_map=-x is not a valid Kubernetes name"),
    ({"gpus": 65}, "cluster.gpus=65 must lie between 0 and 64."),
    ({"gpu_type": "H 100"}, "cluster.gpu_type=H 100 is not a valid resource."),
    ({"cpu": "four"}, "cluster.cpu=four is not a Kubernetes quantity. Write 4 or 500m."),
    ({"cpu": "0"}, "cluster.cpu=0 is not a Kubernetes quantity."),
    ({"memory": "32 GB"}, "cluster.memory=32 GB is not a Kubernetes quantity. Write 32Gi or 512Mi."),
    ({"memory": "1.5Gi"}, "cluster.memory=1.5Gi is not a Kubernetes quantity."),
    ({"shared_memory": "1GB"}, "cluster.shared_memory=1GB is not a Kubernetes quantity."),
    ({"scratch": "big"}, "cluster.scratch=big is not a Kubernetes quantity."),
    (
        {"scratch": "1Gi", "scratch_storage_class": "A"},
        "cluster.scratch_storage_class=A is not a valid Kubernetes name",
    ),
    ({"scratch_storage_class": "fast"}, "cluster.scratch_storage_class=fast needs scratch."),
    ({"timeout": "200 steps"}, "cluster.timeout=200 steps is not a duration."),
    ({"timeout": "1e9h"}, "cluster.timeout=1e9h is not a duration."),
    ({"retries": 21}, "cluster.retries=21 must lie between 0 and 20."),
    ({"retry_wait": "soon"}, "cluster.retry_wait=soon is not a duration."),
    ({"retry_within": "10"}, "cluster.retry_within=10 is not a duration."),
    ({"retry_within": "0"}, "cluster.retry_within=0 leaves no time for a second attempt."),
    ({"node_selector": {"a b": "c"}}, "cluster.node_selector.a b=c is not a valid node label."),
    ({"node_selector": {"gpu": True}}, "cluster.node_selector.gpu=True must be of type str."),
    ({"node_selector": "gpu"}, "cluster.node_selector='gpu' must be a mapping."),
    ({"gpu_node_selector": {"a": "b c"}}, "cluster.gpu_node_selector.a=b c is not a valid node label."),
    ({"queue": "A"}, "cluster.queue=A is not a valid Kubernetes name"),
    ({"tolerations": [{}]}, "cluster.tolerations[0].key is empty, which needs operator=Exists."),
    ({"tolerations": [{"key": "a b"}]}, "cluster.tolerations[0].key=a b is not a valid key of a taint."),
    (
        {"tolerations": [{"key": "a", "value": "b c"}]},
        "cluster.tolerations[0].value=b c is not a valid value",
    ),
    (
        {"gpu_tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]},
        "cluster.gpu_tolerations[0].value=b has no effect with operator=Exists.",
    ),
    ({"tolerations": [{"key": "a", "effect": "No"}]}, "cluster.tolerations[0].effect=No must be one of "),
    (
        {"components": {"recover-trian": {"gpus": 1}}},
        "cluster.components.recover-trian is not a setting. Did you mean cluster.components.recover-train?",
    ),
    ({"components": {"x": {}}}, "cluster.components.x is not a setting. Known: resolve-base, needs-run, "),
    (
        {"components": {"evaluate": {"gpu": 2}}},
        "cluster.components.evaluate.gpu is not a setting. Did you mean cluster.components.evaluate.gpus?",
    ),
    ({"components": {"evaluate": {"gpus": 99}}}, "cluster.components.evaluate.gpus=99 must lie between"),
    ({"components": {"evaluate": {"image": "x"}}}, "cluster.components.evaluate.image is not a setting."),
    ({"components": {"evaluate": 3}}, "cluster.components.evaluate=3 must be a mapping of settings."),
    (
        {"components": {"evaluate": {"scratch_storage_class": "fast"}}},
        "cluster.components.evaluate.scratch_storage_class=fast needs scratch.",
    ),
    (
        {
            "scratch": "1Gi",
            "scratch_storage_class": "fast",
            "components": {"evaluate": {"scratch": ""}, "publish": {"gpus": 1}},
        },
        "cluster.components.evaluate.scratch_storage_class=fast needs scratch.",
    ),
]


@pytest.mark.parametrize(("cluster", "problem"), WRONG)
def test_what_is_wrong_is_named_with_its_value_and_the_way_out(cluster, problem):
    (found,) = problems({**LEAST, "cluster": cluster})
    assert found.startswith(problem)
    assert found.endswith((".", "?"))


def test_all_that_is_wrong_is_listed_at_once():
    cluster = {"cpu": "four", "gpus": -1, "queue": "A", "components": {"evaluate": {"memory": "x"}, "y": {}}}
    names = [problem.split("=")[0].split(" ")[0] for problem in problems({**LEAST, "cluster": cluster})]
    assert sorted(names) == [
        "cluster.components.evaluate.memory",
        "cluster.components.y",
        "cluster.cpu",
        "cluster.gpus",
        "cluster.queue",
    ]
