"""A real model, SmolLM2-135M, by the demo's recipe, in one phase."""

import json
import os
from pathlib import Path

import yaml

from core.storage.publication import open_publication
from tests.cluster.test_launcher import final_of
from tests.support.project import ROOT


def test_smollm2(kubeflow, tmp_path):
    recipe = yaml.safe_load((ROOT / "recipes/demo.yaml").read_text())
    own = kubeflow.recipe("model")
    recipe |= {key: own[key] for key in ("name", "storage", "cluster")} | {"tracking": {}}
    recipe["cluster"] |= {"memory": "6Gi", "cache_claim": os.environ.get("CACHE_CLAIM", "")}
    recipe["prune"] |= {"phases": 1, "repair_tokens": "2k"}
    recipe["calibration"] |= {"sequences": 8}
    recipe["training"] |= {"tokens": "4k"}
    recipe["evaluation"] |= {"limit": 5, "perplexity_windows": 4, "speed": False}
    followed = kubeflow.submit(recipe, tmp_path)
    code, text = followed.end()
    assert code == 0, text
    if recipe["cluster"]["cache_claim"] and kubeflow.core is not None:
        logs = [kubeflow.log(pod.metadata.name) for pod in kubeflow.pods(followed.run_ids[0], "evaluate")]
        assert any("copied from the node's cache" in log for log in logs)
    final = Path(open_publication(final_of(recipe)).fetch(tmp_path / "final"))
    record = json.loads((final / "record.json").read_text())
    params = [phase["params"] for phase in record["phases"]]
    assert params[0] == 134_515_008
    assert abs(params[1] - 108_000_000) < 0.0004 * 134_515_008
    assert "SmolLM2" in (final / "report.html").read_text()
