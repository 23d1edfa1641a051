"""The recipe files: each is what a row of the paper says, loads, compiles, and can reach its target."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from core.errors import SettingsError
from core.evaluation.task_data import task_problems
from core.model.build import model_shape
from core.model.shape import LayerShape
from core.pruning.planning import StepRequest, plan_step, sizing_for
from core.pruning.scoring.statistics import LayerScores, Statistics
from core.pruning.sparsity import smallest_params
from core.settings.recipe import load_recipe
from pipelines.adapt_accel import compile_pipeline, largest_phases
from pipelines.cli import main
from tests.support.models import llama_similarities

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAPER = [path for path in RECIPES if path.stem != "demo"]

TABLE_8 = {0.02: "4.43B", 0: "4.54B", 0.005: "4.62B", 0.01: "4.61B", 0.04: "4.04B"}


def prune_only(*targets):
    return [(target, "0", 1, 50, 0.02) for target in targets]


# base, and the (target, tokens, phases, steps a phase, amplitude) of each command in the head of the file
ROWS = {
    "table1-llama-3.1-8b": ("meta-llama/Llama-3.1-8B", prune_only("6.66B", "5.25B", "3.96B")),
    "table1-llama-3.2-3b": ("meta-llama/Llama-3.2-3B", prune_only("2.70B", "2.10B", "1.59B")),
    "table1-llama-3.2-1b": ("meta-llama/Llama-3.2-1B", prune_only("1.05B", "851M", "669M")),
    "table3-mobilellm-350m": ("facebook/MobileLLM-350M", [("125M", "3.87B", 20, 1, 0.02)]),
    "table4-mobilellm-600m": (
        "facebook/MobileLLM-600M",
        [("350M", "3.87B", phases, 1, 0.02) for phases in (20, 9)],
    ),
    "table4-mobilellm-1b": (
        "facebook/MobileLLM-1B",
        [("600M", "3.87B", phases, 1, 0.02) for phases in (20, 10)],
    ),
    "table5-qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", [("376.1M", "3.87B", 5, 1, 0.02)] * 2),
    "table5-deepseek-r1-qwen-1.5b": (
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        [("1005.5M", "3.87B", 11, 1, 0.02)],
    ),
    "figure4-mobilellm-350m": (
        "facebook/MobileLLM-350M",
        [("125M", "1B", phases, 1, 0.02) for phases in (20, 1, 9, 12, 38, 96)],
    ),
    "table8-llama-3.1-8b": (
        "meta-llama/Llama-3.1-8B",
        [(target, "0", 1, 50, amplitude) for amplitude, target in TABLE_8.items()],
    ),
}

TABLE_2 = {  # billions of tokens
    "Open-Orca/OpenOrca": 1.80,
    "allenai/WildChat-1M": 0.66,
    "lmsys/lmsys-chat-1m": 0.49,
    "teknium/OpenHermes-2.5": 0.49,
    "HuggingFaceH4/ultrachat_200k": 0.20,
    "openbmb/UltraInteract_sft": 0.18,
    "O1-OPEN/OpenO1-SFT": 0.074,
    "yahma/alpaca-cleaned": 0.012,
    "databricks/databricks-dolly-15k": 0.0036,
}

# The published geometries, with the published parameter counts as a check of what is written here.
# MobileLLM has a model type of its own, under which it is read as Llama.
GEOMETRIES = {
    "meta-llama/Llama-3.1-8B": (8_030_261_248, LlamaConfig, (32, 4096, 14336, 32, 8, 128256), False),
    "meta-llama/Llama-3.2-3B": (3_212_749_824, LlamaConfig, (28, 3072, 8192, 24, 8, 128256), True),
    "meta-llama/Llama-3.2-1B": (1_235_814_400, LlamaConfig, (16, 2048, 8192, 32, 8, 128256), True),
    "facebook/MobileLLM-350M": (345_300_000, LlamaConfig, (32, 960, 2560, 15, 5, 32000), True),
    "facebook/MobileLLM-600M": (603_100_000, LlamaConfig, (40, 1152, 3072, 18, 6, 32000), True),
    "facebook/MobileLLM-1B": (1_010_000_000, LlamaConfig, (54, 1280, 3584, 20, 5, 32000), True),
    "Qwen/Qwen2.5-0.5B": (494_032_768, Qwen2Config, (24, 896, 4864, 14, 2, 151936), True),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (
        1_777_088_000,
        Qwen2Config,
        (28, 1536, 8960, 12, 2, 151936),
        False,
    ),
}


def commands(path):
    """The commands in the head of a recipe, as the command line itself reads them."""
    head = re.sub(r" \\\n#\s*", " ", path.read_text())
    lines = re.findall(r"^#\s+adapt-pruner run (.*)$", head, re.MULTILINE)
    run = main.commands["run"]
    return [run.make_context("run", shlex.split(line)).params for line in lines]


def variants(path):
    """The settings of each of a recipe's commands."""
    return [load_recipe(path, command["overrides"]) for command in commands(path)]


def geometry(base):
    _, config, (layers, hidden, width, heads, kv_heads, vocabulary), tied = GEOMETRIES[base]
    return model_shape(
        config(
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=width,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
        )
    )


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def test_there_is_a_recipe_for_each_row_of_the_paper():
    assert {path.stem for path in PAPER} == set(ROWS)


@by_name(RECIPES)
def test_a_recipe_bears_the_name_of_its_file(path):
    assert load_recipe(path).name == path.stem


@by_name(PAPER)
def test_a_recipe_and_its_commands_are_the_row_of_the_paper(path):
    base, rows = ROWS[path.stem]
    found = variants(path)
    assert {settings.model.base for settings in found} == {base}
    assert found[0] == load_recipe(path), "the first command is the file as it stands"
    assert [
        (s.prune.target, s.training.tokens, s.prune.phases, s.prune.steps_per_phase, s.prune.amplitude)
        for s in found
    ] == rows


@by_name(PAPER)
def test_the_commands_of_a_recipe_name_it_and_write_to_places_of_their_own(path):
    found = commands(path)
    assert {command["recipe"] for command in found} == {Path("recipes", path.name)}
    outputs = [command["output"] for command in found]
    assert outputs[0] is None
    assert None not in outputs[1:]
    assert len(set(outputs)) == len(outputs)


@by_name(PAPER)
def test_recipes_of_the_paper_share_its_settings(path):
    for settings in variants(path):
        calibration, training, prune = settings.calibration, settings.training, settings.prune
        assert (calibration.sequences, calibration.sequence_length) == (512, 64)
        assert (prune.similarity, prune.phase_sizes, prune.width_multiple) == ("cosine", "geometric", 1)
        assert (prune.repair, training.teacher) == ("none", "none")
        assert (training.sequence_length, training.global_batch) == (1024, 128)
        assert (training.learning_rate, training.min_learning_rate) == (2e-5, 2e-6)
        assert (training.warmup_share, training.decay_share, training.weight_decay) == (0.05, 0.10, 0)
        assert (training.precision, settings.evaluation.precision) == ("bfloat16", "bfloat16")
        assert {source.path: source.weight for source in training.sources} == TABLE_2
        assert len(settings.evaluation.benchmarks()) == 13
        held_out, calibrated = settings.evaluation.perplexity, calibration.source
        assert (held_out.path, held_out.split) != (calibrated.path, calibrated.split)


@by_name(RECIPES)
def test_lm_eval_has_the_tasks_of_a_recipe(path):
    assert task_problems(load_recipe(path).evaluation) == []


@pytest.mark.slow
@by_name(RECIPES)
def test_a_recipe_and_its_variants_compile(path, tmp_path):
    for settings in variants(path) or [load_recipe(path)]:
        if settings.prune.phases > 30 and settings.prune.phases > largest_phases(settings):
            with pytest.raises(SettingsError, match="use `adapt-pruner run`, which has no such limit"):
                compile_pipeline(settings, tmp_path / "pipeline.yaml")
        else:
            compile_pipeline(settings, tmp_path / "pipeline.yaml")
            assert (tmp_path / "pipeline.yaml").stat().st_size < 2**20


@pytest.mark.parametrize("base", GEOMETRIES)
def test_a_base_model_can_be_cut_to_every_target_that_recipes_ask_of_it(base):
    dense = geometry(base)
    published = GEOMETRIES[base][0]
    assert dense.num_params() == pytest.approx(published, rel=0 if published % 1000 else 0.006)
    targets = [s.prune for path in PAPER if ROWS[path.stem][0] == base for s in variants(path)]
    assert targets
    for prune in targets:
        target = prune.target_params(dense.num_params())
        assert smallest_params(sizing_for(prune, dense, dense), target) < target < dense.num_params()


@pytest.mark.parametrize(
    "base", ["meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-1B"]
)
def test_the_percentages_of_table_1_are_shares_of_each_decoder_layer(base):
    dense = geometry(base)
    found = [
        s.prune.target_params(0)
        for path in PAPER
        if "table1" in path.stem
        for s in variants(path)
        if s.model.base == base
    ]
    for target, share in zip(found, (0.2, 0.4, 0.6), strict=True):
        layers = []
        for layer in dense.layers:
            kv_heads = layer.kv_heads - int(layer.kv_heads * share)
            heads = kv_heads * layer.heads_per_group
            width = round(layer.mlp_width * (1 - share))
            layers.append(LayerShape(query_heads=heads, kv_heads=kv_heads, mlp_width=width))
        assert target == pytest.approx(dense.with_layers(tuple(layers)).num_params(), rel=0.012)
        assert target != pytest.approx(dense.num_params() * (1 - share), rel=0.015)


def plan_all_steps(prune, dense, similarities):
    """The sparsities after each step of a phase on a model that never changes how alike its layers are."""
    current, sparsities = dense, [(0.0,) * len(dense.layers)]
    target = prune.target_params(dense.num_params())
    for number in range(prune.steps_per_phase):
        scores = tuple(
            LayerScores(
                query_heads=torch.zeros(layer.query_heads),
                kv_groups=torch.zeros(layer.kv_heads),
                mlp_channels=torch.zeros(layer.mlp_width),
            )
            for layer in current.layers
        )
        step = plan_step(
            StepRequest(
                statistics=Statistics(
                    similarities=torch.tensor(similarities, dtype=torch.float64),
                    scores=scores,
                    loss=1.0,
                    tokens=1,
                ),
                dense=dense,
                current=current,
                sparsity=sparsities[-1],
                target_params=target,
                steps_left=prune.steps_per_phase - number,
                settings=prune,
            )
        )
        current, sparsities = step.shape, [*sparsities, step.sparsity]
        if current.num_params() <= target:
            break
    return current, sparsities


@pytest.mark.parametrize(
    "path", [p for p in PAPER if p.stem in ("table1-llama-3.1-8b", "table8-llama-3.1-8b")], ids=str
)
def test_runs_without_training_add_the_papers_amplitude_at_each_step(path):
    dense = geometry("meta-llama/Llama-3.1-8B")
    # Channels in bundles of 64: the same shares, fewer numbers to sort.
    layer = replace(dense.layers[0], mlp_width=dense.layers[0].mlp_width // 64)
    dense = replace(dense, layers=(layer,) * 32, mlp_channel_params=64 * dense.mlp_channel_params)
    similarities = llama_similarities()
    mean = sum(similarities) / 32
    largest = max(abs(value - mean) for value in similarities)
    for settings in variants(path):
        prune = settings.prune
        shape, sparsities = plan_all_steps(prune, dense, similarities)
        target = prune.target_params(dense.num_params())
        assert abs(shape.num_params() - target) <= dense.mlp_channel_params / 2
        removed = (dense.num_params() - target) / sum(map(dense.prunable_params, dense.layers))
        for similarity, first in zip(similarities, sparsities[1], strict=True):
            expected = removed / 50 - prune.amplitude * (mean - similarity) / largest
            assert first == pytest.approx(max(0, expected), abs=1e-12)


def test_the_readme_lists_every_recipe():
    text = (ROOT / "recipes" / "README.md").read_text()
    assert {path.name for path in RECIPES} == set(re.findall(r"`([\w.-]+\.yaml)`", text))
