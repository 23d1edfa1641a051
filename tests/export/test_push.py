"""Uploads to the Hugging Face hub, through its own client, to a stand-in on a loopback port."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, dynamic_module_utils

from core.errors import IntegrityError
from core.export.hub import plan_push, push_checkpoint
from core.model.build import load_model
from pipelines.commands.push import push
from tests.support.hub import TOKEN, Cut, Lost, Refuse, after_puts, run_hub
from tests.support.models import random_tokens
from tests.support.uploads import (
    CARD,
    NAME,
    SHARDS,
    files_of,
    goes_up,
    publish_checkpoint,
    refused,
)

ROOT = Path(__file__).resolve().parents[2]


def download(hub, folder, revision="main", token=TOKEN):
    return Path(
        snapshot_download(NAME, revision=revision, local_dir=folder, endpoint=hub.endpoint, token=token)
    )


def test_what_was_pushed_comes_back_bit_by_bit_and_runs_in_stock_transformers(
    hub, published, tmp_path, monkeypatch
):
    url = push_checkpoint(published, NAME, message="First")
    repository = hub.models[NAME]
    assert url == f"{hub.endpoint}/{NAME}/commit/{repository.commit()}"
    assert repository.summaries == ["First"]
    assert not repository.private
    back = download(hub, tmp_path / "back")
    expected = goes_up(published)
    assert {"README.md", "adapt_pruner.json", "config.json", "modeling_unequal_layers.py", *SHARDS} <= set(
        expected
    )
    assert goes_up(back) == expected | {".gitattributes": repository.branches["main"][".gitattributes"]}
    assert len(hub.received) == len(SHARDS)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    tokens = random_tokens()
    logits = load_model(published)(tokens).logits
    assert torch.equal(load_model(back)(tokens).logits, logits)
    stock = AutoModelForCausalLM.from_pretrained(back, trust_remote_code=True)
    assert torch.equal(stock(tokens).logits, logits)


def test_a_push_that_changes_nothing_makes_no_commit_and_says_so(hub, published, caplog):
    url = push_checkpoint(published, NAME)
    caplog.clear()
    assert push_checkpoint(published, NAME) == url
    assert len(hub.models[NAME].summaries) == 1
    assert len(hub.received) == len(SHARDS)
    assert "holds this checkpoint already: nothing to commit" in caplog.text


def test_only_what_differs_goes_up(hub, checkpoint):
    push_checkpoint(checkpoint, NAME)
    (checkpoint / "README.md").write_text(CARD + "More.\n")
    (checkpoint / "tokenizer_config.json").write_text("{ }")
    hub.requests.clear()
    push_checkpoint(checkpoint, NAME)
    assert len(hub.models[NAME].summaries) == 2
    assert len(hub.received) == len(SHARDS)
    assert not [request for request in hub.requests if "objects/batch" in request]
    assert files_of(hub) == goes_up(checkpoint)


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_a_connection_that_breaks_is_gone_on_from_without_sending_again(hub, published, whole):
    hub.add_model(NAME)
    before = hub.models[NAME].commit()

    def cut(request):
        raise Cut

    hub.hook = after_puts(whole, cut)
    text = refused(push_checkpoint, published, NAME)
    assert "cannot be reached during the upload" in text
    assert text.endswith("Run the same command again: files that have arrived are not sent again.")
    assert len(hub.received) == whole
    assert hub.models[NAME].commit() == before
    hub.hook = lambda request: None
    push_checkpoint(published, NAME)
    assert len(hub.received) == len(set(hub.received)) == len(SHARDS)
    assert files_of(hub) == goes_up(published)
    assert len(hub.models[NAME].summaries) == 1


def test_trouble_that_passes_is_not_noticed(hub, published):
    failed = []

    def hook(request):
        if not failed and request.startswith("PUT "):
            failed.append(request)
            raise Refuse(503, "Slow Down")

    hub.hook = hook
    push_checkpoint(published, NAME)
    assert failed
    assert files_of(hub) == goes_up(published)


def test_an_answer_that_is_lost_after_the_commit_does_no_harm(hub, published):
    made = []

    def hook(request):
        if "/commit/" in request and not made:
            made.append(request)
            raise Lost

    hub.hook = hook
    assert "cannot be reached during the upload" in refused(push_checkpoint, published, NAME)
    assert files_of(hub) == goes_up(published)
    push_checkpoint(published, NAME)
    assert len(hub.received) == len(SHARDS)
    assert len(hub.models[NAME].summaries) == 1


def test_readers_see_the_old_checkpoint_until_the_new_one_is_whole(hub, published, tmp_path):
    old = publish_checkpoint(tmp_path / "old", seed=5)
    push_checkpoint(old, NAME)
    seen = []

    def read(request):
        hub.hook = lambda request: None
        seen.append(goes_up(download(hub, tmp_path / f"seen-{len(seen)}")))
        hub.hook = after_puts(0, read)

    hub.hook = after_puts(0, read)
    push_checkpoint(published, NAME)
    assert len(seen) == len(SHARDS)
    for files in seen:
        files.pop(".gitattributes")
        assert files == goes_up(old)
    assert files_of(hub) == goes_up(published)


def test_what_another_checkpoint_has_left_goes_in_the_same_commit_and_all_else_stays(hub, published):
    stale = ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "vocab.json"]
    stale += ["modeling_other.py", "tokenizer.json"]
    kept = ["LICENSE", "NOTICE.txt", "logo.png", "pruned.Q8_0.gguf", "onnx/model.safetensors", "handler.py"]
    hub.add_model(NAME, files={name: name.encode() for name in [*stale, *kept, "README.md"]})
    push_checkpoint(published, NAME)
    assert files_of(hub) == goes_up(published) | {name: name.encode() for name in kept}
    assert len(hub.models[NAME].summaries) == 1


def test_a_commit_that_comes_between_is_not_undone(hub, published):
    hub.add_model(NAME)

    def hook(request):
        if "/commit/" in request:
            hub.models[NAME].branches["main"]["notes.md"] = b"by somebody else"

    hub.hook = hook
    text = refused(push_checkpoint, published, NAME)
    assert text.startswith(f"{NAME} changed in the meantime: A commit has happened since.")
    hub.hook = lambda request: None
    push_checkpoint(published, NAME)
    assert len(hub.received) == len(SHARDS)
    assert files_of(hub) == goes_up(published) | {"notes.md": b"by somebody else"}


def test_a_branch_is_made_where_main_is_and_main_stays(hub, published, checkpoint):
    hub.add_model(NAME, files={"LICENSE": b"free"})
    main = files_of(hub)
    url = push_checkpoint(published, NAME, revision="phase-2")
    assert url.endswith(hub.models[NAME].commit("phase-2"))
    assert files_of(hub) == main
    assert files_of(hub, "phase-2") == goes_up(published) | main
    (checkpoint / "README.md").write_text(CARD + "More.\n")
    push_checkpoint(checkpoint, NAME, revision="phase-2")
    assert files_of(hub) == main
    assert files_of(hub, "phase-2") == goes_up(checkpoint) | main


def test_private_is_kept(hub, published):
    push_checkpoint(published, NAME, private=True)
    assert hub.models[NAME].private
    push_checkpoint(published, NAME)
    assert hub.models[NAME].private
    hub.add_model("team/open")
    assert refused(plan_push, published, "team/open", private=True).startswith("team/open is public, and ")
    text = refused(push_checkpoint, published, "team/open", private=True)
    assert text.startswith("team/open is public, and --private does not change that.")
    assert not hub.models["team/open"].objects


def test_a_publication_is_verified_but_its_card_may_be_edited(hub, published, tmp_path):
    shutil.copytree(published, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text(CARD + "Edited.\n")
    push_checkpoint(tmp_path / "copy", NAME)
    assert files_of(hub)["README.md"].endswith(b"Edited.\n")
    (tmp_path / "copy" / "tokenizer_config.json").write_text("{ }")
    with pytest.raises(IntegrityError):
        push_checkpoint(tmp_path / "copy", NAME)


def call(*arguments):
    return CliRunner().invoke(push, [str(argument) for argument in arguments])


def test_the_command_pushes_and_prints_where(hub, published):
    done = call(published, NAME, "--message", "By command")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{hub.endpoint}/{NAME}/commit/{hub.models[NAME].commit()}\n"
    assert hub.models[NAME].summaries == ["By command"]
    assert f"{NAME}: {len(goes_up(published))} files, " in done.stderr
    assert TOKEN not in done.output


def test_a_dry_run_lists_what_would_change_and_changes_nothing(hub, published, checkpoint):
    done = call(published, NAME, "--dry-run")
    assert done.exit_code == 0, done.output
    assert f"{NAME} would be created" in done.stdout
    assert NAME not in hub.models
    push_checkpoint(published, NAME)
    assert "nothing would change" in call(published, NAME, "--dry-run").stdout
    hub.models[NAME].branches["main"]["model.safetensors"] = b"old"
    (checkpoint / "README.md").write_text(CARD + "More.\n")
    hub.requests.clear()
    lines = [line.split() for line in call(checkpoint, NAME, "--dry-run").stdout.splitlines()]
    assert ["send", "README.md"] in [line[:2] for line in lines]
    assert ["remove", "model.safetensors"] in [line[:2] for line in lines]
    assert [line[:2] for line in lines if line[:1] == ["there"]] == [
        ["there", name]
        for name in sorted(goes_up(checkpoint), key=lambda n: (n in SHARDS, n))
        if name != "README.md"
    ]
    assert all(request.startswith("GET ") for request in hub.requests)


@pytest.mark.slow
def test_a_process_that_is_killed_is_gone_on_from(published, tmp_path):
    """With SIGKILL, at the third shard; all of the client is real, and so is its environment."""
    code = (
        "import sys; from pathlib import Path; from core.export.hub import push_checkpoint;"
        "print(push_checkpoint(Path(sys.argv[1]), sys.argv[2]))"
    )
    with run_hub() as hub:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
        environment = own | hub.environment(str(tmp_path / "cache"))
        environment |= {"PYTHONPATH": str(ROOT), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", code, str(published), NAME]

        def start():
            return subprocess.Popen(
                command,
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        first = start()

        def kill(request):
            first.kill()
            raise Cut

        hub.hook = after_puts(2, kill)
        first.communicate(timeout=300)
        assert first.returncode == -signal.SIGKILL
        assert len(hub.received) == 2
        assert not hub.models[NAME].summaries
        hub.hook = lambda request: None
        second = start()
        stdout, stderr = second.communicate(timeout=300)
        assert second.returncode == 0, stderr
        assert stdout.strip() == f"{hub.endpoint}/{NAME}/commit/{hub.models[NAME].commit()}"
        assert len(hub.received) == len(set(hub.received)) == len(SHARDS)
        assert files_of(hub) == goes_up(published)
        assert TOKEN not in stdout + stderr
        index = json.loads(files_of(hub)["model.safetensors.index.json"])
        assert set(index["weight_map"].values()) == set(SHARDS)
