"""A checkpoint to upload, and the hub that the client in this process uploads it to."""

import contextlib
import logging
import time

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from core.errors import AdaptPrunerError, HubError
from core.model.checkpoint import save_model
from core.storage.publication import publish
from tests.support.hub import READ_TOKEN, SIGNATURE, TOKEN, run_hub
from tests.support.models import UNEQUAL, tiny

NAME = "team/pruned"
OWN = {"MANIFEST.json", "report.json", "record.json", "report.html"}
SHARDS = [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
CARD = "---\nlibrary_name: transformers\n---\n# A pruned model\n"


def publish_checkpoint(folder, *, seed=0, layers=UNEQUAL):
    """A checkpoint as a run publishes it, with what is the run's own."""
    model = tiny("llama", layers, dtype=torch.float32, seed=seed)
    save_model(model, folder / "made", companions=None, provenance={"base": "team/base"})
    (folder / "made" / "README.md").write_text(CARD)
    (folder / "made" / "tokenizer_config.json").write_text("{}")
    for name in ("report.json", "record.json", "report.html"):
        (folder / "made" / name).write_text("{}")
    publish(folder / "made", str(folder / "final"))
    return folder / "final"


@contextlib.contextmanager
def hub_of_this_process(monkeypatch, tmp_path, caplog):
    """Lead the client to a hub without repositories; at the end the log is searched for secrets."""
    caplog.set_level(logging.DEBUG, logger="core")
    with run_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        template = f"{running.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # xet has a protocol of its own
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits before it tries again
        huggingface_hub.close_session()
        disable_progress_bars()
        yield running
        enable_progress_bars()
        huggingface_hub.close_session()
    assert TOKEN not in caplog.text
    assert READ_TOKEN not in caplog.text
    assert SIGNATURE not in "".join(r.getMessage() for r in caplog.records if r.name.startswith("core"))


def goes_up(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in OWN}


def files_of(hub, branch="main"):
    files = dict(hub.models[NAME].branches[branch])
    files.pop(".gitattributes", None)
    return files


def refused(call, *arguments, kind=HubError, **options):
    """Return the text of the error; it is one line without secrets."""
    with pytest.raises(AdaptPrunerError) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert text.count("\n") == 0
    assert text.endswith(".")
    for secret in (TOKEN, READ_TOKEN, SIGNATURE):
        assert secret not in text
    return text
