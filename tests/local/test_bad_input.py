"""What a person gets wrong ends in one line that says what and what to do, and leaves nothing half-done."""

import json
import os
import shlex
import socket
import subprocess
from types import SimpleNamespace

import boto3
import pytest
from click.testing import CliRunner

from core.errors import (
    AdaptPrunerError,
    CheckpointError,
    DataError,
    IntegrityError,
    TargetError,
    UnsupportedModelError,
)
from core.steps.calibrate import run_calibrate
from core.steps.prepare_data import run_prepare_data
from core.storage.store import open_store
from pipelines.cli import main
from tests.support.project import Artifact, command_line, recipe_with, resolve, rewrite_base
from tests.support.servers import BUCKET


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def the_error_line(stderr):
    """Return the one line on stderr, which must be an error line of whole sentences."""
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    assert line[-1] in ".?"
    return line.removeprefix("error: ")


def refused(call, kind):
    """Return the text of the error that ``call`` raises: one line of whole sentences."""
    with pytest.raises(AdaptPrunerError) as caught:
        call()
    assert caught.type is kind
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


SETTINGS = {
    "a key that does not exist": (
        ["--set", "prune.targt=80%"],
        "prune.targt is not a setting. Did you mean prune.target?",
    ),
    "a value out of range": (
        ["--set", "prune.phases=0"],
        "prune.phases=0 must lie between 1 and 1,000. Change it.",
    ),
    "a target above all": (
        ["--set", "prune.target=120%"],
        "prune.target=120% must lie between 0% and 100%. Ask for the share of parameters that stays.",
    ),
    "a target that is no size": (
        ["--set", "prune.target=small"],
        "prune.target=small is neither a count (108M, 1.2B) nor a share (80%). Give one of them.",
    ),
    "an override without a value": (
        ["--set", "prune.target"],
        "--set prune.target must read section.key=value, such as prune.target=80%.",
    ),
    "an override below a value": (["--set", "seed.x=1"], "--set seed.x=1: seed is not a section."),
    "a store of no known kind": (
        ["--set", "storage.store=gs://bucket"],
        "storage.store: gs://bucket is not a store. Give a folder, file:///folder or s3://bucket/prefix.",
    ),
    "an output folder that is a file": (
        ["--output", "held-out.txt"],
        "--output=held-out.txt cannot be written (Not a directory). Give a folder that you may write to.",
    ),
    "an output folder that nobody may write to": (
        ["--output", "/proc/output"],
        "--output=/proc/output cannot be written (No such file or directory). "
        "Give a folder that you may write to.",
    ),
    "a store that nobody may write to": (
        ["--set", "storage.store=/proc/store"],
        "storage.store=/proc/store cannot be written (No such file or directory). "
        "Give a folder that you may write to.",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_wrong_settings_end_the_command_before_it_starts(folder, tmp_path, name):
    options, message = SETTINGS[name]
    before = tree(folder)
    if "--output" not in options:
        options = [*options, "--output", str(tmp_path / "output")]
    result = CliRunner().invoke(main, ["run", "recipe.yaml", *options])
    assert (result.exit_code, result.stdout) == (2, "")
    assert the_error_line(result.stderr) == message
    assert set(tree(folder)) - set(before) <= {
        "store"
    }  # an empty folder: whether it can be written was tried
    assert not (tmp_path / "output" / "run.log").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory). Give the path of a YAML file."),
        ("model: [base", "is not valid YAML: while parsing a flow sequence"),
        ("\0", "is not valid YAML: unacceptable character"),
        ("- model", "must be a mapping of sections such as model: and prune:."),
        ("", "must be a mapping of sections such as model: and prune:."),
    ],
    ids=["missing", "unclosed", "binary", "a list", "empty"],
)
@pytest.mark.parametrize("command", [["run"], ["compile", "-o", "p.yaml"]], ids=["run", "compile"])
def test_a_recipe_that_is_none_is_named(folder, content, message, command):
    if content is not None:
        (folder / "bad.yaml").write_text(content)
    before = tree(folder)
    result = CliRunner().invoke(main, [*command, "bad.yaml"])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: recipe bad.yaml {message}")
    assert tree(folder) == before


def taken_up(folder):
    """Return what of a run, or of its base model, is in the store."""
    return [key for key in open_store(folder / "store").list() if key.startswith(("runs/", "bases/"))]


def resolve_with(changes):
    return lambda: resolve(recipe_with(changes))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("200k", "prune.target=200k is not below the 81,936 parameters of base. Lower it."),
        ("81936", "prune.target=81936 is not below the 81,936 parameters of base. Lower it."),
        ("10%", "prune.target=8,194 parameters cannot be reached: "),
        ("1", "prune.target=1 parameters cannot be reached: "),
    ],
)
def test_a_target_out_of_reach_says_what_can_be_reached(folder, target, message):
    text = refused(resolve_with({"prune.target": target}), TargetError)
    assert text.startswith(message)
    if "reached" in text:
        # Norms, one attention group and one MLP channel a layer: 38,448 + 3 * (96 + 2,880 + 144).
        assert "still has 47,808 parameters, 38,448 of them outside the layers. Raise prune.target." in text
    assert not any(key.startswith("runs/") for key in taken_up(folder))


@pytest.mark.parametrize(
    "base", ["./gone", "gone/and/away", "/gone", "texts.jsonl", "store", "package:nope/x"]
)
def test_a_model_that_is_not_there_is_named(folder, base):
    (folder / "store").mkdir()
    kind = DataError if base.startswith("package:") else CheckpointError
    text = refused(resolve_with({"model.base": base}), kind)
    assert base in text
    assert text.split(". ")[-1].split()[0] in ("Correct", "Install")
    assert not taken_up(folder)


def test_the_hub_out_of_reach_is_one_line(folder, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}"
        )
        text = refused(resolve_with({"model.base": "organisation/model"}), CheckpointError)
    assert text.startswith(
        "model.base=organisation/model is not a local folder or file, and the Hugging Face hub "
    )
    assert "refused" in text
    advice = "Check the name, model.revision, the network and, for a private or gated model, HF_TOKEN."
    assert text.endswith(advice)
    assert not taken_up(folder)


def test_a_family_that_is_not_supported_is_named_before_it_is_taken_up(folder):
    config = json.loads((folder / "base" / "config.json").read_text())
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    text = refused(resolve_with({}), UnsupportedModelError)
    assert text == (
        "model family 'gpt2' is not supported; supported: gemma2, gemma3_text, granite, llama, mistral, "
        "olmo2, phi3, qwen2, qwen3, smollm3. Choose a base model of one of these."
    )
    assert not taken_up(folder)


def test_heads_that_hang_together_are_not_pruned(folder):
    rewrite_base(folder / "base", {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]})
    text = refused(resolve_with({"prune.attention_unit": "kv_group"}), UnsupportedModelError)
    assert text == (
        "prune.attention_unit=kv_group: olmo2 normalises queries and keys over all heads at once, so "
        "removing one changes the others. Set prune.attention_unit to auto or none."
    )
    resolve_with({"prune.attention_unit": "none", "prune.target": "90%"})()


def test_a_hub_repository_of_pickles_alone_is_refused_before_it_is_taken_up(folder, monkeypatch):
    (folder / "base" / "model.safetensors").rename(folder / "base" / "pytorch_model.bin")
    commit = SimpleNamespace(sha="c" * 40)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: commit)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder / "base"))
    text = refused(resolve_with({"model.base": "organisation/model"}), CheckpointError)
    assert "holds only pickles (pytorch_model.bin), which can run code when they are loaded. Give a " in text
    assert (
        "with safetensors weights (pickles are never read): convert it where its pickles are trusted" in text
    )
    assert not taken_up(folder)


def cut_short(shard):
    shard.write_bytes(shard.read_bytes()[:-100])


def overwrite(shard):
    shard.write_bytes(b"\xff" * 1000)


def point_astray(shard):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (shard.parent / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("damage", [cut_short, overwrite, point_astray, os.unlink])
def test_a_damaged_base_checkpoint_is_not_taken_up(folder, damage):
    damage(folder / "base" / "model.safetensors")
    text = refused(resolve_with({}), CheckpointError)
    assert "base" in text
    assert ".safetensors" in text
    assert not taken_up(folder)


def test_a_base_checkpoint_that_was_damaged_in_the_store_is_not_used(folder):
    run, base_uri = resolve(recipe_with({}))
    data_uri = run_prepare_data(run=run, base_uri=base_uri)
    shard = folder / base_uri / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    before = tree(folder)

    def calibrate():
        run_calibrate(
            run=run,
            phase=1,
            checkpoint_uri=base_uri,
            data_uri=data_uri,
            statistics=Artifact(folder / "artifact" / "statistics"),
        )

    text = refused(calibrate, IntegrityError)
    assert "model.safetensors is not what its manifest says" in text
    base = folder / base_uri
    assert (
        f"It is not used. Remove it with `rm -rf {shlex.quote(str(base))}` and run its recipe again" in text
    )
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"calibration.source": {"path": "texts.jsonl", "field": "body"}},
            "texts.jsonl has no column body, but text. Name one of them in the recipe.",
        ),
        (
            {"training.sources": [{"path": "texts.jsonl", "field": "body"}]},
            "texts.jsonl has no column body, but text. Name one of them in the recipe.",
        ),
        (
            {"calibration.source": {"path": "gone.jsonl"}},
            "gone.jsonl is not a file or folder here, nor a Hugging Face data set id. Correct the path.",
        ),
        (
            {"evaluation.perplexity_length": 100_000},
            "held-out.txt does not fill one window of 100,000 tokens. "
            "Name a longer text, or lower evaluation.perplexity_length in a recipe.",
        ),
        (
            {"calibration.sequences": 31},
            "texts.jsonl: only 30 of 30 documents have the 24 tokens of a calibration sequence, but 31 are "
            "needed. Lower calibration.sequences or calibration.sequence_length, set "
            "calibration.packing=true to join short documents, raise calibration.pool_documents, or name a "
            "larger corpus.",
        ),
    ],
    ids=["calibration column", "training column", "missing text", "short text", "small corpus"],
)
def test_texts_that_do_not_serve_are_named_and_no_data_is_published(folder, changes, message):
    run, base_uri = resolve(recipe_with(changes))
    before = tree(folder)
    assert refused(lambda: run_prepare_data(run=run, base_uri=base_uri), DataError) == message
    # The text for perplexity is a publication of its own, made first.
    assert [path for path in tree(folder) if "/held-out-" not in path] == before


def call(folder, *arguments, environment=None):
    command, own = command_line(*arguments)
    return subprocess.run(
        command, cwd=folder, env=own | (environment or {}), capture_output=True, text=True, timeout=300
    )


def test_the_command_itself_exits_with_2_for_wrong_settings(folder):
    done = call(folder, "run", "recipe.yaml", "--set", "prune.targt=80%", "--set", "prune.phases=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: prune.targt is not a setting. Did you mean prune.target?",
        "error: prune.phases=0 must lie between 1 and 1,000. Change it.",
    ]


@pytest.fixture
def wrong_credentials(s3_server):
    return s3_server.environment() | {"AWS_SECRET_ACCESS_KEY": "not-the-secret-key"}


def test_wrong_credentials_fail_the_run_with_1_and_say_which_task_and_how_to_go_on(
    folder, tmp_path, s3_server, s3_store_uri, wrong_credentials
):
    output = tmp_path / "output"
    done = call(
        folder,
        *("run", "recipe.yaml", "--output", output, "--set", f"storage.store={s3_store_uri}"),
        environment=wrong_credentials,
    )
    assert (done.returncode, done.stdout) == (1, "")
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: resolve-base failed: {s3_store_uri}/bases/")
    assert f"{s3_server.endpoint} denies access (" in line
    assert "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and their permissions." in line
    assert line.endswith(
        f"The same command resumes after the last finished step; all output is in {output}/run.log."
    )
    assert "Traceback" not in done.stderr
    assert "not-the-secret-key" not in done.stderr + (output / "run.log").read_text()
    objects = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=s3_store_uri.split("/", 3)[3])
    assert objects["KeyCount"] == 0
