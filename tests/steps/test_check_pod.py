"""What a pod finds: everything there, and each thing broken alone, in a folder and on a real S3 server."""

import errno
import json
import logging
import os
import tempfile
from importlib import metadata

import pytest
import torch

from components.check_pod import check_pod
from core.errors import ClusterError
from core.steps.check_pod import CHECKS, MARK, run_check_pod
from core.storage.cache import CACHE
from core.storage.store import open_store

GPU = "nvidia.com/gpu"
ADDRESS = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def expected(tmp_path, monkeypatch):
    """What is there in this process; nothing is tracked, as to import MLflow takes seconds."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return {
        "version": metadata.version("adapt-pruner"),
        "store": str(tmp_path / "store"),
        "tracking_uri": "",
        "secret": "adapt-pruner",
        "config_map": "adapt-pruner",
        "accelerators": 0.0,  # as KFP hands on whole numbers
        "accelerator_type": "",
        "shared_memory": "1Mi",
    }


def found_by(expected, caplog):
    """State and words by check, and the text of the error."""
    caplog.set_level(logging.INFO, "core")
    error = ""
    try:
        run_check_pod(expected=expected)
    except ClusterError as raised:
        error = str(raised)
    (line,) = [record.getMessage() for record in caplog.records if MARK in record.getMessage()]
    found = json.loads(line.partition(MARK)[2])
    order = [each["check"] for each in found]
    assert order == [check for check in CHECKS if check in order]
    lines = [f"{each['check']}: {each['said']}" for each in found if each["state"] == "fix"]
    assert error == "\n".join(lines), "the error is what there is to fix"
    return {each["check"]: (each["state"], each["said"]) for each in found}


def wrong(found):
    return {check: said for check, (state, said) in found.items() if state == "fix"}


def test_everything_is_there(expected, store_uri, caplog):
    on_s3 = store_uri.startswith("s3://")
    found = found_by(expected | {"store": store_uri}, caplog)
    assert {check for check, (state, _) in found.items() if state != "ok"} == {"mlflow"}
    assert set(found) == set(CHECKS) - {"accelerators", "cache"} - (set() if on_s3 else {"credentials"})
    assert list(open_store(store_uri).list()) == [], "it has left nothing behind"


@pytest.mark.slow
def test_mlflow_is_there(expected, caplog, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert found_by(expected | {"tracking_uri": uri}, caplog)["mlflow"] == ("ok", f"{uri} answers")


def test_another_version_in_the_image(expected, caplog):
    ours = expected["version"]
    assert wrong(found_by(expected | {"version": "9.9"}, caplog)) == {
        "image": f"it holds version {ours} of adapt-pruner, and this command is 9.9. Build it from "
        "docker/Dockerfile, push it under a new tag, and name that in cluster.image."
    }


def test_a_bucket_that_is_not_there(expected, s3_store_uri, caplog):
    (said,) = [
        text for check, text in wrong(found_by(expected | {"store": "s3://no-such-bucket/x"}, caplog)).items()
    ]
    assert "no-such-bucket" in said


def test_an_endpoint_that_nobody_has_named(expected, s3_store_uri, caplog, monkeypatch):
    monkeypatch.setattr("core.storage.s3._ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", ADDRESS)
    found = wrong(found_by(expected | {"store": "s3://models/x"}, caplog))
    assert set(found) == {"store"}
    assert f"{ADDRESS} cannot be reached" in found["store"]
    assert "config map" not in found["store"]


def test_credentials_that_are_missing(expected, s3_store_uri, caplog, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    found = wrong(found_by(expected | {"store": "s3://models/x"}, caplog))
    assert (
        "the pod lacks AWS_SECRET_ACCESS_KEY, and has no cloud role: the secret adapt-pruner"
        in (found["credentials"])
    )
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    caplog.clear()
    found = wrong(found_by(expected | {"store": "s3://models/x", "secret": ""}, caplog))
    assert "lacks AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in found["credentials"]
    assert "cluster.secret, which is empty" in found["credentials"]
    assert "there are no credentials" in found["store"]


def test_a_store_that_loses_what_is_written(expected, caplog, monkeypatch):
    monkeypatch.setattr("core.storage.store.LocalStore.read_bytes", lambda self, key: b"other")
    assert "returns other bytes than were written" in wrong(found_by(expected, caplog))["store"]


def test_mlflow_that_is_away_or_is_not_named(expected, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ADDRESS)
    found = wrong(found_by(expected, caplog))
    assert set(found) == {"mlflow"}
    assert f"MLflow at {ADDRESS} cannot be reached. Start the server" in found["mlflow"]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    caplog.clear()
    state, said = found_by(expected, caplog)["mlflow"]
    assert (state, "nothing will be tracked" in said) == ("note", True)


@pytest.mark.parametrize(
    ("kind", "wanted", "seen", "said"),
    [
        (GPU, 2, 2, None),
        (GPU, 1, 0, "check the node's driver"),
        (GPU, 4, 3, "PyTorch sees 3: check the node's driver"),
        ("nvidia.com/mig-1g.5gb", 2, 1, "a process sees one MIG device, so set gpus to 1"),
        ("nvidia.com/mig-1g.5gb", 1, 0, "check the node's driver"),
    ],
)
def test_accelerators(expected, caplog, monkeypatch, kind, wanted, seen, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H100 80GB HBM3")
    asked = {"accelerators": float(wanted), "accelerator_type": kind}
    found = found_by(expected | asked, caplog)
    if said is None:
        assert found["accelerators"] == ("ok", f"{wanted} of {kind}: NVIDIA H100 80GB HBM3")
    else:
        assert said in wrong(found)["accelerators"]


def test_shared_memory_that_is_smaller_than_asked_for(expected, caplog):
    volume = os.statvfs("/dev/shm")
    size = volume.f_frsize * volume.f_blocks
    asked = {"shared_memory": str(size)}
    assert wrong(found_by(expected | asked, caplog)) == {}
    caplog.clear()
    found = wrong(found_by(expected | asked | {"shared_memory": str(size + 1)}, caplog))
    assert set(found) == {"/dev/shm"}
    caplog.clear()
    assert "/dev/shm" not in found_by(expected | asked | {"shared_memory": ""}, caplog)


def test_a_scratch_volume_that_belongs_to_root(expected, caplog, monkeypatch):
    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = wrong(found_by(expected, caplog))
    assert set(found) == {"scratch"}
    assert found["scratch"].startswith(f"{os.environ['TMPDIR']} cannot be written (Permission denied).")


def test_a_cache_that_an_image_built_on_ours_has_left_to_root(expected, caplog, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_HOME", str(cache / "huggingface"))
    assert wrong(found_by(expected, caplog)) == {}
    caplog.clear()
    (cache / "huggingface").rmdir()
    (cache / "huggingface").touch()  # tests may run as root, whom no permission stops
    found = wrong(found_by(expected, caplog))
    assert set(found) == {"scratch"}
    assert (
        f"{cache}/huggingface, the HF_HOME of the image, cannot be written (File exists)." in found["scratch"]
    )
    assert f"remove {cache} " in found["scratch"]


def test_a_shared_cache_is_looked_at_and_keeps_nothing_from_working(expected, caplog, monkeypatch, tmp_path):
    assert "cache" not in found_by(expected, caplog)
    caplog.clear()
    monkeypatch.setenv(CACHE, str(tmp_path / "shared"))
    assert found_by(expected, caplog)["cache"][1].endswith(" free")
    caplog.clear()
    (tmp_path / "shared").rmdir()
    (tmp_path / "shared").touch()
    found = found_by(expected, caplog)
    assert found["cache"][0] == "note"
    assert "each task fetches from the store" in found["cache"][1]


def test_the_component_runs_it(expected, capfd):
    check_pod.python_func(expected=expected)
    assert MARK in capfd.readouterr().err
