"""The commands that take a model: inspect, generate, evaluate, sensitivity."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedTokenizerFast

from core.machine.precision import Choice
from core.model.build import build_model, load_model
from core.model.config import config_with_layers
from core.model.shape import LayerShape
from core.runs.record import perplexity_text
from core.storage.publication import publish
from tests.support.project import call
from tests.support.recipes import LEAST

SIZES = ((4, 2, 24), (2, 1, 17), (4, 2, 9))
WORDS = ["<eos>", "<user>", "<model>", "what", "is", "the", "capital", "of", "France", "Paris", "?", "."]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of unequal layers with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=len(SIZES),
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        eos_token_id=0,
        max_position_embeddings=128,
    )
    layers = [LayerShape(query_heads=h, kv_heads=k, mlp_width=f) for h, k, f in SIZES]
    network = build_model(config_with_layers(config, layers))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    network.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<eos>").save_pretrained(
        directory
    )
    return directory


def test_inspect_counts_every_parameter(model):
    network = load_model(model)
    result = call("inspect", model)
    assert result.exit_code == 0
    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in network.model.layers]
    for index, (size, params) in enumerate(zip(SIZES, per_layer, strict=True)):
        assert [str(index), *map(str, size), f"{params:,}"] in rows
    total = sum(p.numel() for p in network.parameters())
    assert ["outside", f"{total - sum(per_layer):,}"] in rows
    assert ["total", f"{total:,}"] in rows


def test_inspect_needs_the_config_only(model, tmp_path):
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    assert call("inspect", tmp_path).exit_code == 0


@pytest.mark.parametrize(
    "command",
    [["inspect"], ["generate", "hello"], ["evaluate"], ["sensitivity", "--text", "t.txt"]],
    ids=lambda c: c[0],
)
def test_a_model_that_is_not_there_is_named(command):
    name, *rest = command
    result = call(name, "no/such-model", *rest)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: MODEL=no/such-model is not a folder.")


def test_a_family_that_is_not_supported_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    result = call("inspect", tmp_path)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "gpt2" in result.stderr


def greedy(directory, tokens, length):
    """Greedy decoding by the full forward pass: no cache, none of generate's code."""
    network, answer = load_model(directory), []
    while len(answer) < length:
        token = int(network(torch.tensor([tokens + answer])).logits[0, -1].argmax())
        answer.append(token)
        if token == 0:
            break
    return " ".join(WORDS[token] for token in answer if token)


def test_generate_continues_a_text(model):
    result = call("generate", model, "the capital of", "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == greedy(model, [5, 6, 7], 12).split()


def test_generate_uses_the_chat_template(model, tmp_path):
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    turns = "{% for m in messages %}<user> {{ m.content }} {% endfor %}"
    template = turns + "{% if add_generation_prompt %}<model>{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    result = call("generate", tmp_path, "the capital of", "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == greedy(tmp_path, [1, 5, 6, 7, 2], 12).split()
    assert result.stdout.split() != greedy(tmp_path, [5, 6, 7], 12).split()


def test_generate_samples_by_seed(model):
    answers = [
        call("generate", model, "the", "--temperature", 2, "--seed", seed, "--max-new-tokens", 20).stdout
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_a_corrupt_shard_is_one_line(model, tmp_path):
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    result = call("generate", tmp_path, "the")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "model.safetensors" in result.stderr


def test_evaluate_needs_something_to_measure(model):
    result = call("evaluate", model)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: nothing to evaluate.")


@pytest.mark.parametrize("options", [[], ["--batch-size", "0"], ["--batch-size", "2"]])
def test_evaluate_computes_the_perplexity_of_a_text(model, tmp_path, options):
    torch.manual_seed(1)
    tokens = torch.randint(1, len(WORDS), (700,)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(WORDS[token] for token in tokens))
    recipe = {
        **LEAST,
        "evaluation": {
            "perplexity": {"path": str(tmp_path / "text.txt")},
            "perplexity_length": 60,
            "perplexity_windows": 9,
            "precision": "float32",
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = call("evaluate", model, "--recipe", tmp_path / "recipe.yaml", *options)
    assert result.exit_code == 0, result.output
    windows = torch.tensor(tokens[: 9 * 60]).view(9, 60)
    network = load_model(model)
    with torch.no_grad():
        loss = torch.stack([network(row[None], labels=row[None]).loss for row in windows]).mean()
    assert f"{float(loss.exp()):.2f}" in result.stdout
    assert f"{sum(p.numel() for p in network.parameters()):,}" in result.stdout


def test_evaluate_refuses_a_cache_that_cannot_be_written_before_it_asks(model, tmp_path):
    (tmp_path / "file").touch()
    result = call("evaluate", model, "--task", "mini", "--cache", tmp_path / "file" / "store")
    assert result.exit_code == 2
    assert result.stderr.startswith(
        f"error: --cache={tmp_path}/file/store cannot be written (Not a directory)."
    )


def test_evaluate_asks_nothing_that_its_cache_knows(model, tmp_path):
    write_words(tmp_path / "text.txt", 2000, seed=2)
    known = "perplexity is known from before"

    def evaluated(folder):
        options = ("--text", tmp_path / "text.txt", "--cache", tmp_path / "store")
        result = call("evaluate", folder, *options)
        assert result.exit_code == 0, result.output
        return result.stdout, known in result.stderr

    shown, found = evaluated(model)
    assert not found
    assert evaluated(model) == (shown, True)
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy/README.md").write_text("A card.")
    assert evaluated(tmp_path / "copy") == (shown, True)
    publish(tmp_path / "copy", str(tmp_path / "published"))
    assert evaluated(f"file://{tmp_path}/published") == (shown, True)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, tmp_path / "copy/model.safetensors", metadata={"format": "pt"})
    other, found = evaluated(tmp_path / "copy")
    assert not found
    assert other != shown


def write_words(path, count, seed):
    """A text of random words; returns its tokens."""
    tokens = torch.randint(1, len(WORDS), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text(" ".join(WORDS[token] for token in tokens))
    return tokens


def mean_loss(network, windows):
    with torch.no_grad():
        return float(torch.stack([network(row[None], labels=row[None]).loss for row in windows]).mean())


def test_sensitivity_prunes_each_layer_on_half_of_a_text_and_measures_on_the_other(
    model, tmp_path, monkeypatch
):
    slow = Choice(precision="float32", device="a machine without bfloat16")
    monkeypatch.setattr("core.steps.sensitivity.choose_precision", lambda device: slow)
    tokens = write_words(tmp_path / "text.txt", 1100, seed=2)
    options = ("--text", tmp_path / "text.txt", "--sequences", 2, "--part", "mlp", "--output", tmp_path / "o")
    result = call("sensitivity", model, *options)
    assert result.exit_code == 0, result.output
    assert "50 % of one layer's MLP channels pruned" in result.stdout
    numbers = json.loads((tmp_path / "o" / "sensitivity.json").read_text())
    network, (first, second) = load_model(model), torch.tensor(tokens[:1024]).view(2, 2, 256)
    assert numbers["loss"] == pytest.approx(mean_loss(network, second), abs=1e-5)
    # The last layer, by hand: the channels whose weights and gradients score lowest go, an odd one stays.
    mlp, width = network.model.layers[2].mlp, SIZES[2][2]
    network(first, labels=first).loss.backward()
    scores = sum((p.weight * p.weight.grad).abs().sum(dim=1) for p in (mlp.gate_proj, mlp.up_proj))
    scores += (mlp.down_proj.weight * mlp.down_proj.weight.grad).abs().sum(dim=0)
    with torch.no_grad():
        mlp.down_proj.weight[:, scores.argsort()[: width - round(width / 2)]] = 0
    last = numbers["layers"][2]
    assert last["loss"] == pytest.approx(mean_loss(network, second), abs=1e-5)
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    shown = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    row = ["2", f"{last['importance']:.4f}", f"{100 * last['removed']:.1f}", "%"]
    assert [*row, f"{last['loss_increase']:+.4f}", perplexity_text(last["perplexity"])] in shown
    page = (tmp_path / "o" / "sensitivity.html").read_text()
    assert page.count("<svg") == 1
    assert f"{last['loss_increase']:+.4f}" in page


def test_sensitivity_takes_its_texts_and_sizes_from_a_recipe(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": " ".join(WORDS[1 + (n + k) % 9] for k in range(30))}) for n in range(9)]
    (tmp_path / "calibration.jsonl").write_text("\n".join(rows))
    tokens = write_words(tmp_path / "held-out.txt", 400, seed=3)
    other = write_words(tmp_path / "other.txt", 400, seed=4)
    recipe = {
        **LEAST,
        "calibration": {
            "source": {"path": "calibration.jsonl"},
            "sequences": 8,
            "sequence_length": 20,
            "pool_documents": 9,
        },
        "evaluation": {
            "perplexity": {"path": "held-out.txt"},
            "perplexity_windows": 4,
            "perplexity_length": 50,
            "precision": "float32",
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    network = load_model(model)
    for options, text, count in (
        ((), tokens, 4),
        (("--text", "other.txt", "--sequences", 3), other, 3),
    ):
        result = call("sensitivity", model, "--recipe", "recipe.yaml", *options)
        assert result.exit_code == 0, result.output
        numbers = json.loads(Path("output/sensitivity/sensitivity.json").read_text())
        windows = torch.tensor(text[: count * 50]).view(count, 50)
        assert numbers["loss"] == pytest.approx(mean_loss(network, windows), abs=1e-5)
        assert len(numbers["layers"]) == 3


@pytest.mark.parametrize("value", ["0", "1", "-0.5", "50", "nan"])
def test_a_sparsity_out_of_range_is_named(model, value):
    result = call("sensitivity", model, f"--sparsity={value}", "--text", "t.txt")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: --sparsity={value} must lie between 0 and 1.")


def test_sensitivity_names_what_is_missing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("the capital of France")
    for options, status, message in (
        ((), 2, "no text to measure on. Give --text"),
        (("--text", "short.txt", "--output", "short.txt"), 2, "--output=short.txt cannot be written"),
        (("--text", "gone.txt"), 1, "gone.txt is not a file or folder here"),
        (("--text", "short.txt"), 1, "short.txt does not fill one window of 256 tokens."),
    ):
        result = call("sensitivity", model, *options)
        assert result.exit_code == status, result.output
        assert result.stderr.splitlines()[-1].startswith(f"error: {message}")
