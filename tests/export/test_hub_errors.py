"""What the hub refuses, and what is wrong before it is asked: one line, with advice, without secrets."""

import huggingface_hub
import pytest
from huggingface_hub import constants

from core.export.hub import plan_push, push_checkpoint
from tests.support.hub import READ_TOKEN, Refuse
from tests.support.uploads import NAME, refused


def refuse(hub, request_of, *answer):
    """Let the hub refuse all requests that contain a text."""

    def hook(request):
        if request_of in request:
            raise Refuse(*answer)

    hub.hook = hook


@pytest.mark.parametrize(
    ("request_of", "status", "message", "says"),
    [
        ("POST /api/repos/create", 401, "Invalid username or password.", "does not accept the token"),
        ("/preupload/", 403, "you must use a write token", f"the token may not write to {NAME}: "),
        ("/objects/batch", 403, "Private repository storage limit reached", f"has no room for {NAME} during"),
        ("/commit/", 413, "Payload Too Large", f"has no room for {NAME} during"),
        ("/refs", 404, "Repository not found", f"does not find {NAME}"),
        ("/preupload/", 429, "Too many requests", "answers 429 during"),
        ("/objects/batch", 503, "Service Unavailable", "answers 503 during the upload"),
        ("PUT ", 403, "Request has expired", "the storage of the Hugging Face hub refused during"),
        ("/commit/", 400, "bad file name", "answers 400 during the upload: "),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_advice(hub, published, request_of, status, message, says):
    refuse(hub, request_of, status, message)
    text = refused(push_checkpoint, published, NAME)
    assert says in text
    if status != 404:
        assert message.split(" for ")[0] in text
    assert NAME not in hub.models or not hub.models[NAME].summaries


def test_addresses_of_the_storage_lose_their_signatures(hub, published):
    refuse(hub, "PUT ", 403, "")
    text = refused(push_checkpoint, published, NAME)
    assert f"{hub.endpoint}/storage/{NAME}/" in text


def test_a_hub_without_xet_storage_is_told_apart_from_one_that_is_not_there(hub, published, monkeypatch):
    pytest.importorskip("hf_xet")  # which the client brings on common processors
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    text = refused(push_checkpoint, published, NAME)
    assert "the storage of the Hugging Face hub refused during the upload" in text
    assert "404 Not Found" in text
    assert "A hub without xet storage needs HF_HUB_DISABLE_XET=1." in text


def test_a_gated_repository_is_named(hub, published):
    hub.add_model(NAME)
    refuse(hub, "/preupload/", 403, "Access to model team/pruned is restricted", "GatedRepo")
    assert refused(push_checkpoint, published, NAME).startswith(f"{NAME} is gated: ")


def test_a_token_that_may_not_is_refused(hub, published, monkeypatch):
    assert "the token may not write to other/pruned: " in refused(push_checkpoint, published, "other/pruned")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert f"the token may not write to {NAME}: " in refused(push_checkpoint, published, NAME)
    hub.add_model(NAME)
    text = refused(push_checkpoint, published, NAME)
    assert f"the token may not write to {NAME}: you must use a write token to upload" in text
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for call in (push_checkpoint, plan_push):
        text = refused(call, published, NAME)
        assert "does not accept the token: Invalid credentials in Authorization header" in text
        assert "hf_wrong" not in text
    assert not hub.received


def test_without_a_token_nothing_is_asked(hub, published, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    text = refused(push_checkpoint, published, NAME)
    assert text.startswith("there is no token for the Hugging Face hub. Make one with write access at")
    assert not hub.requests


def test_a_hub_that_is_not_there_is_one_line(hub, published, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the Hugging Face hub cannot be reached: " in refused(push_checkpoint, published, NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert refused(push_checkpoint, published, NAME).startswith("HF_HUB_OFFLINE blocks all requests to")


@pytest.mark.parametrize(
    "name", ["pruned", "datasets/team/pruned", "https://huggingface.co/team/pruned", "team/..", "te am/x", ""]
)
def test_an_id_that_is_none_is_refused_before_anything_is_asked(hub, published, name):
    assert refused(push_checkpoint, published, name).startswith(f"REPOSITORY={name} is not a valid id")
    assert not hub.requests


def test_a_tag_or_a_commit_is_no_place_for_a_checkpoint(hub, published):
    hub.add_model(NAME)
    repository = hub.models[NAME]
    repository.branches["v1"] = dict(repository.branches["main"])
    hub.models[NAME] = type(repository)(branches=repository.branches, tags=("v1",))
    assert refused(push_checkpoint, published, NAME, revision="v1").startswith("revision=v1 is a tag of")
    text = refused(push_checkpoint, published, NAME, revision=repository.commit())
    assert text.endswith("is not the name of a branch. Name one, such as main.")


def test_a_gitignore_that_could_leave_files_out_is_refused(hub, published):
    hub.add_model(NAME, files={".gitignore": b"*.safetensors\n"})
    assert "has a .gitignore" in refused(push_checkpoint, published, NAME)
    assert not hub.received
