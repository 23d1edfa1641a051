import json

import pytest
import torch

from core.errors import CheckpointError
from core.model.build import check_tied, load_model, model_shape
from core.model.checkpoint import (
    INDEX,
    PROVENANCE,
    Checkpoint,
    save_model,
    write_checkpoint,
)
from tests.support.models import UNEQUAL, tiny


@pytest.fixture
def checkpoint(tmp_path):
    save_model(tiny("llama", UNEQUAL), tmp_path, companions=None, provenance={"base": "tiny"})
    return tmp_path


def test_one_shard_a_layer_and_one_for_the_rest(checkpoint):
    index = json.loads((checkpoint / INDEX).read_text())
    shards = {name: shard for name, shard in index["weight_map"].items()}
    assert {shard for name, shard in shards.items() if name.startswith("model.layers.1.")} == {
        "model-00002-of-00004.safetensors"
    }
    assert shards["lm_head.weight"] == shards["model.norm.weight"] == "model-00004-of-00004.safetensors"
    total = sum(p.numel() * p.element_size() for p in load_model(checkpoint).parameters())
    assert index["metadata"]["total_size"] == total


def test_what_was_opened_is_not_read_again(checkpoint):
    model, opened = load_model(checkpoint), Checkpoint(checkpoint)
    assert opened.layers == UNEQUAL
    assert (opened.provenance, opened.generation_config) == ({"base": "tiny"}, {})
    assert opened.dtype == torch.float64
    for name in ("config.json", PROVENANCE):
        (checkpoint / name).unlink()
    assert opened.provenance == {"base": "tiny"}
    again = load_model(opened).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_config_alone_can_be_opened(checkpoint):
    for shard in checkpoint.glob("*.safetensors*"):
        shard.unlink()
    opened = Checkpoint(checkpoint)
    assert model_shape(opened.config).layers == opened.layers == UNEQUAL
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        _ = opened.dtype


def test_a_layer_is_read_alone(checkpoint):
    layer = Checkpoint(checkpoint).layer(2)
    assert layer["mlp.down_proj.weight"].shape == (48, 7)
    assert len(layer) == 9


def test_a_tied_output_head_that_was_stored_is_not_written_again(tmp_path):
    model = tiny("llama-tied")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" in state
    write_checkpoint(tmp_path / "base", model.config, [state], 1, companions=None, provenance={})
    Checkpoint(tmp_path / "base").rewrite(tmp_path / "copy", model.config, provenance={})
    with Checkpoint(tmp_path / "copy").weights() as reader:
        assert set(reader.names()) == state.keys() - {"lm_head.weight"}
    copied = load_model(tmp_path / "copy").state_dict()
    assert all(torch.equal(copied[name], tensor) for name, tensor in state.items())


def test_a_head_that_is_tied_by_the_config_and_stored_otherwise_is_refused(tmp_path):
    model = tiny("llama-tied")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, more in (("same", 0), ("other", 1)):
        state["lm_head.weight"] += more
        write_checkpoint(tmp_path / name, model.config, [state], 1, companions=None, provenance={})
    check_tied(Checkpoint(tmp_path / "same"))
    with pytest.raises(
        CheckpointError, match=r"config\.json ties lm_head\.weight to model\.embed_tokens\.weight"
    ):
        check_tied(Checkpoint(tmp_path / "other"))


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(tmp_path):
    model = tiny("llama")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    write_checkpoint(
        tmp_path, model.config, [model.state_dict() | old], 1, companions=None, provenance={"base": "old"}
    )
    assert load_model(tmp_path).state_dict().keys() == model.state_dict().keys()


def test_companions_of_the_base_come_along_and_weights_do_not(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "model.safetensors", "notes.txt"):
        (base / name).write_text(name)
    save_model(tiny("llama"), tmp_path / "out", companions=base, provenance={"base": "b"})
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE", "adapt_pruner.json"} <= copied
    assert not {"model.safetensors", "notes.txt"} & copied


def test_a_missing_shard_is_named(checkpoint):
    (checkpoint / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00004\.safetensors is missing"):
        load_model(checkpoint)


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"\xff" * 8 + b[8:], lambda b: b""])
def test_a_corrupt_shard_is_named(checkpoint, damage):
    shard = checkpoint / "model-00001-of-00004.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00004\.safetensors is not a valid safetensors"
    ):
        load_model(checkpoint)
