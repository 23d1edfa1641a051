"""The model card: its front matter, its numbers, its code, and what it leaves out."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import LlamaConfig, dynamic_module_utils

from core.export.gguf import export_gguf
from core.export.padded import export_padded
from core.model.build import build_model, load_model, load_tokenizer
from core.model.checkpoint import save_model
from core.report.card import model_card
from core.runs.record import DistillationRecord, LayerSizes, PhaseRecord, RunRecord, SpeedRecord
from core.runs.run import Run
from core.storage.publication import open_publication
from tests.support.models import SIZES
from tests.support.project import recipe_with, run_all

LICENCE = {"license": "other", "license_name": "tiny", "license_link": "LICENSE", "language": ["en"]}
BASE_CARD = f"---\n{yaml.safe_dump(LICENCE)}---\n# The base\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRETS = ("pa55word", "s3kret", "bucket-of-ours", "mlflow.internal", "alice", "registry.internal")


@pytest.fixture(scope="module")
def finished(project, tmp_path_factory):
    """A run of two phases on a base model with a licence: the run, and its final folder."""
    folder = tmp_path_factory.mktemp("card")
    shutil.copytree(project, folder / "project")
    base = folder / "project" / "base"
    (base / "README.md").write_text(BASE_CARD)
    (base / "LICENSE").write_text("Do as you please.")
    (base / "NOTICE").write_text("Made by us.")
    recipe = recipe_with({"storage.store": str(folder / "store"), "storage.keep": "all"})
    with contextlib.chdir(folder / "project"):
        handle, final = run_all(recipe, folder)
    return Run.load(handle), Path(final)


@pytest.fixture(scope="module")
def record(finished):
    return RunRecord.from_dict(json.loads((finished[1] / "record.json").read_text()))


@pytest.fixture(scope="module")
def config(finished):
    return json.loads((finished[1] / "config.json").read_text())


def parsed(text):
    """Return the front matter as the hub's client reads it, and the text after it."""
    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    return card.data, card.text


def rows(text, heading):
    """Return the cells of the first table after a heading, by the first cell."""
    lines = text.split(heading, 1)[1].split("\n| ", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def number(text):
    return float(text.split()[0].replace(",", ""))


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)\n```", text, re.DOTALL)


def test_the_card_is_part_of_the_publication_beside_the_licence_files(finished):
    _, final = finished
    assert {"README.md", "LICENSE", "NOTICE"} <= set(open_publication(str(final)).manifest.paths)
    assert (final / "NOTICE").read_text() == "Made by us."
    assert parsed((final / "README.md").read_text())


def test_the_licence_goes_through_all_phases(finished):
    run, final = finished
    places = [Path(run.phase_uri(phase, step)) for phase in (1, 2) for step in ("pruned", "recovered")]
    for place in [Path(run.base_uri), *places, final]:
        stated = json.loads((place / "adapt_pruner.json").read_text())
        assert {name: stated[name] for name in LICENCE} == LICENCE
    data, text = parsed((final / "README.md").read_text())
    assert {name: getattr(data, name) for name in LICENCE} == LICENCE
    assert (
        "states its licence as `other`, `tiny` (LICENSE). `LICENSE` and `NOTICE` are the base model's."
        in text
    )


def test_without_a_licence_the_card_says_so(record, config):
    data, text = parsed(model_card(record, config=config, licence={}))
    assert data.license is None
    assert data.language is None
    assert "The licence of the base model is not known" in text
    assert "states its licence" not in text


def test_a_base_of_the_hub_is_linked_and_its_licence_too(record, config):
    from_hub = dataclasses.replace(record, base="team/base", revision=COMMIT)
    data, text = parsed(model_card(from_hub, config=config, licence=LICENCE))
    assert (data.base_model, data.base_model_relation) == ("team/base", "finetune")
    assert data.license_link == f"https://huggingface.co/team/base/blob/{COMMIT}/LICENSE"
    assert f"[team/base](https://huggingface.co/team/base/tree/{COMMIT}) at commit `{COMMIT}`" in text
    data, _ = parsed(model_card(from_hub, config=config, licence=LICENCE, legal_files=["LICENSE"]))
    assert data.license_link == "LICENSE"


@pytest.mark.parametrize("base", ["base", "data/base", "package:p/m.gguf", "s3://bucket-of-ours/x/base"])
def test_a_base_of_elsewhere_is_not_taken_for_one_of_the_hub(record, config, base):
    data, text = parsed(model_card(dataclasses.replace(record, base=base), config=config, licence=LICENCE))
    assert data.base_model is None
    assert data.license_link is None  # a file that is not here
    assert "huggingface.co" not in text
    assert f"(content `{record.revision}`)" in text


def test_the_numbers_are_those_of_the_record(finished, record):
    _, final = finished
    _, text = parsed((final / "README.md").read_text())
    dense, *phases = record.phases
    last = phases[-1]
    model = load_model(final)
    assert last.params == sum(p.numel() for p in model.parameters())
    assert f"pruned from {dense.params:,} to {last.params:,} parameters" in text
    assert f"in 2 phases, with {sum(p.tokens for p in phases):,} tokens of training in between." in text
    sizes = rows(text, "## Sizes")
    assert [number(cell) for cell in sizes["parameters"]] == [dense.params, last.params]
    layers = rows(text, "<summary>Every layer</summary>")
    views = model.config.per_layer_config
    assert {int(i): [int(cell) for cell in cells] for i, cells in layers.items()} == {
        i: [view.num_attention_heads, view.num_key_value_heads, view.intermediate_size]
        for i, view in enumerate(views)
    }
    (measured,) = rows(text, "## Measured before and after").values()
    assert [number(cell) for cell in measured] == pytest.approx([dense.perplexity, last.perplexity], rel=5e-3)
    table = rows(text, "## How it was made")
    assert [number(cells[0]) for cells in table.values()] == [phase.params for phase in record.phases]
    for phase in phases:
        found = [number(cell) for cell in table[str(phase.phase)]]
        expected = [phase.params, phase.perplexity_pruned, phase.perplexity, phase.tokens]
        assert found == pytest.approx(expected, rel=5e-3)


def test_layers_that_went_whole_are_not_counted(record, config):
    *before, last = record.phases
    gone = LayerSizes(query_heads=0, kv_heads=0, mlp_width=0)
    last = dataclasses.replace(last, layers=(last.layers[0], gone, *last.layers[1:]))
    whole = dataclasses.replace(before[0], layers=(before[0].layers[0], *before[0].layers))
    _, text = parsed(
        model_card(dataclasses.replace(record, phases=(whole, *before[1:], last)), config=config, licence={})
    )
    sizes = rows(text, "## Sizes")
    count = len(record.phases[0].layers)
    assert [number(cell) for cell in sizes["decoder layers"]] == [count + 1, count]
    assert not [cell for cells in sizes.values() for cell in cells if cell.startswith("0 to")]
    layers = rows(text, "<summary>Every layer</summary>")
    assert list(layers) == [str(i) for i in range(count)]
    assert [int(cells[2]) for cells in layers.values()] == [
        each.mlp_width for each in record.phases[-1].layers
    ]


def test_benchmarks_tell_their_limits_and_errors(record, config):
    tasks = {"piqa": {"acc": 0.6, "acc_norm": 0.6623, "acc_norm_stderr": 0.0212}}
    worse = {"piqa": {"acc": 0.5, "acc_norm": 0.5501, "acc_norm_stderr": 0.0225}}
    dense, *between, last = record.phases
    measured = (
        dataclasses.replace(dense, tasks=tasks),
        *between,
        dataclasses.replace(last, tasks={**worse, "only here": {"acc": 0.1}}),
    )
    for limit, items in ((50, "at most 50 items"), (0, "all items")):
        evaluation = record.settings["evaluation"] | {"limit": limit}
        changed = dataclasses.replace(
            record, phases=measured, settings=record.settings | {"evaluation": evaluation}
        )
        _, text = parsed(model_card(changed, config=config, licence={}))
        table = rows(text, "## Measured before and after")
        assert table[f"`piqa`, acc_norm, {items}"] == ["66.2 % ± 2.1", "55.0 % ± 2.2"]
        assert "only here" not in text
        assert "examples in the prompt that each task defines" in text


def test_speed_is_shown_where_it_was_measured(record, config):
    speed = SpeedRecord(
        runtime="torch",
        device="cpu",
        tokens_per_s={"decode 1": (10.0, 15.0)},
        speedups={"decode 1": 1.5},
        load_s=(2.0, 1.0),
        memory_bytes=(300_000_000, 200_000_000),
    )
    _, text = parsed(model_card(dataclasses.replace(record, speed=(speed,)), config=config, licence={}))
    assert "| decoding (tokens/s) | 10.0 | 15.0 | 1.50 |" in text
    assert "| speed in torch on cpu |" in text


def test_what_was_not_measured_or_trained_is_left_out(record, config):
    phases = tuple(
        PhaseRecord(phase=p.phase, params=p.params, target_params=p.target_params, layers=p.layers)
        for p in record.phases
    )
    bare = dataclasses.replace(record, phases=phases, base="team/base", revision=COMMIT)
    data, text = parsed(model_card(bare, config=config, licence={}))
    assert "base_model_relation" not in data.to_dict()
    assert "in 2 phases, without any training." in text
    assert "## Measured before and after" not in text
    assert "lm-eval" not in text
    assert "trained on" not in text
    assert "| phase | parameters |\n" in text
    distillation = DistillationRecord(seconds=9.0, tokens=98_304, before=0.7, after=0.5)
    distilled = (*phases[:-1], dataclasses.replace(phases[-1], distillation=distillation))
    _, text = parsed(model_card(dataclasses.replace(bare, phases=distilled), config=config, licence={}))
    assert "without any training, and 98,304 tokens of distillation from the base model right after" in text
    assert "learnt from" not in text


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (0, "In training it learnt from the base model, too."),
        (4096, "too, which was itself trained on 4,096 tokens of the same texts before."),
    ],
)
def test_a_teacher_is_named(tokens, said, record, config):
    first, *phases = record.phases
    phases[0] = dataclasses.replace(phases[0], teacher_tokens=tokens)
    taught = record.settings | {"training": record.settings["training"] | {"teacher": "base"}}
    taught = dataclasses.replace(record, phases=(first, *phases), settings=taught)
    assert said in parsed(model_card(taught, config=config, licence={}))[1]
    assert "learnt from" not in parsed(model_card(record, config=config, licence={}))[1]


def test_nothing_tells_where_it_was_made(record, config):
    settings = json.loads(json.dumps(record.settings))
    settings["model"]["base"] = "s3://bucket-of-ours/bases/base?X-Amz-Signature=s3kret"
    settings["storage"]["store"] = "s3://bucket-of-ours/prefix"
    settings["tracking"]["uri"] = "https://bob:pa55word@mlflow.internal"
    settings["cluster"] |= {"image": "registry.internal/image", "secret": "s3kret"}
    settings["calibration"]["source"]["path"] = "/home/alice/texts.jsonl"
    settings["training"]["sources"][0]["path"] = "~alice/texts.jsonl"
    settings["evaluation"]["task_data"] = {"piqa": "file:///home/alice/piqa"}
    private = dataclasses.replace(
        record,
        settings=settings,
        base=settings["model"]["base"],
        checkpoint_uri="s3://bucket-of-ours/final",
        tracking_uri=settings["tracking"]["uri"],
    )
    text = model_card(private, config=config, licence=LICENCE)
    assert not [secret for secret in SECRETS if secret in text]
    assert text.count("texts.jsonl") >= 2
    assert "# base pruned to" in text


def test_the_settings_read_back(finished, record):
    text = (finished[1] / "README.md").read_text()
    (block,) = blocks(text, "yaml")
    shown = yaml.safe_load(block)
    assert shown == {k: v for k, v in record.settings.items() if k not in ("storage", "tracking", "cluster")}


def run_code(code, folder):
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue()


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def answer_of(folder):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    tokens = torch.tensor([tokenizer.encode("The capital of France is")])
    return tokenizer.decode(model.generate(tokens, max_new_tokens=20)[0], skip_special_tokens=True) + "\n"


def test_the_code_of_the_card_runs(finished, modules_cache):
    """Both blocks, as they stand, in the published folder: the answers are the same."""
    _, final = finished
    stock, own = blocks((final / "README.md").read_text(), "python")
    assert "trust_remote_code=True" in stock
    assert "core." not in stock
    assert run_code(stock, final) == run_code(own, final) == answer_of(final)


def test_layers_of_equal_size_need_no_trust(record, tmp_path, tokenizer):
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    save_model(build_model(LlamaConfig(**sizes)), tmp_path, companions=None, provenance={})
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = model_card(record, config=config, licence={}, formats=["gguf"])
    stock, own = blocks(text, "python")
    assert "trust" not in text
    assert "it is a plain `llama` checkpoint" in text
    assert "padded" not in text
    assert run_code(stock, tmp_path) == run_code(own, tmp_path) == answer_of(tmp_path)


def test_what_the_card_promises_of_exports_holds(finished, tmp_path):
    _, final = finished
    commands = "\n".join(blocks((final / "README.md").read_text(), "bash"))
    assert "--format gguf" in commands
    assert "--format padded" in commands
    assert "--format decilm" not in commands  # its widths are no multiples of 256
    export_gguf(final, tmp_path / "model.gguf")
    export_padded(final, tmp_path / "padded")


@pytest.mark.parametrize(("formats", "shown"), [([], []), (["decilm", "padded"], ["decilm", "padded"])])
def test_only_formats_that_hold_it_are_shown(record, config, formats, shown):
    _, text = parsed(model_card(record, config=config, licence={}, formats=formats))
    assert re.findall(r"--format (\w+)", text) == shown
    assert "vllm serve . --trust-remote-code" in text
    assert "not tested on GPUs" in text
