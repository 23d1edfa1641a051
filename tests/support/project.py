"""A tiny project, a random Llama, texts and a recipe in one folder, and its steps called in this process."""

import copy
import json
import os
import sys
from pathlib import Path

import torch
import yaml
from click.testing import CliRunner
from transformers import LlamaConfig

from core.model.build import build_model
from core.model.config import load_config
from core.settings.recipe import settings_from_dict
from pipelines.cli import main
from tests.support.models import SIZES

ROOT = Path(__file__).resolve().parents[2]

RECIPE = {
    "name": "trial",
    "seed": 7,
    "model": {"base": "base"},
    "prune": {"target": "75%", "phases": 2, "amplitude": 0.01, "width_multiple": 1},
    "calibration": {
        "source": {"path": "texts.jsonl"},
        "sequences": 12,
        "sequence_length": 24,
        "micro_batch": 5,
        "precision": "float32",
    },
    "training": {
        "tokens": "960",
        "sources": [{"path": "texts.jsonl"}],
        "sequence_length": 32,
        "global_batch": 6,
        "micro_batch": 3,
        "learning_rate": 0.01,
        "min_learning_rate": 0.001,
        "warmup_share": 0.2,
        "decay_share": 0.4,
        "teacher": "none",
        "precision": "float32",
    },
    "evaluation": {
        "perplexity": {"path": "held-out.txt"},
        "perplexity_windows": 5,
        "perplexity_length": 40,
        "precision": "float32",
    },
    "storage": {"store": "store"},
}
MEASURED = settings_from_dict(RECIPE).measured_digest()
"""In the names of what is published of what the recipe measures."""
STEPS = 5
"""Optimizer steps of the recipe: 960 // (32 * 6)."""
CHANNEL_PARAMS = 3 * SIZES["hidden_size"]
"""What one MLP channel of the base model costs."""

NO_TRAINING = {"training.tokens": "0", "training.sources": []}
"""Changes of ``RECIPE``."""


def make_project(folder, tokenizer, sizes=SIZES):
    """Write ``base``, ``texts.jsonl``, ``held-out.txt`` and ``recipe.yaml`` into ``folder``."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    torch.manual_seed(0)
    sizes = SIZES | sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = build_model(LlamaConfig(**sizes, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.dim() == 1))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    texts = [topics[name] for name in sorted(topics)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:30]))
    (folder / "held-out.txt").write_text("\n\n".join(texts[30:32]))
    write_recipe(folder / "recipe.yaml")
    return folder


def rewrite_base(base, changes):
    """Change the base model's config, and give it random weights that fit."""
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for old in base.glob("*.safetensors*"):
        old.unlink()
    build_model(load_config(base)).save_pretrained(base)


def recipe_with(changes):
    """Return the recipe with ``{"section.key": value}`` changed."""
    return with_values(RECIPE, changes)


def with_values(data, changes):
    """Return a copy of settings with ``{"section.key": value}`` set."""
    data = copy.deepcopy(data)
    for name, value in changes.items():
        *sections, key = name.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return data


def write_recipe(path, changes=None):
    path.write_text(yaml.safe_dump(recipe_with(changes or {})))
    return path


def command_line(*arguments):
    """Return the command that calls ``adapt-pruner``, and an environment in which any folder finds it."""
    code = "from pipelines.cli import main; main(prog_name='adapt-pruner')"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_"))}
    return [sys.executable, "-c", code, *map(str, arguments)], environment | {"PYTHONPATH": str(ROOT)}


class Artifact:
    """What a step needs of a KFP artifact."""

    def __init__(self, path):
        self.path, self.metadata = str(path), {}


def call(*arguments):
    """What the program does with a command line, in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def resolve(recipe, *, job="job", accelerated=()):
    """Call resolve-base where no other execution is at work."""
    handle, base_uri, being_done_by = resolve_or_tell(recipe, job=job, accelerated=accelerated)
    assert being_done_by == ""
    return handle, base_uri


def resolve_or_tell(recipe, *, job, accelerated=()):
    """Call resolve-base as the pipeline does: five settings apart, the rest as a dict."""
    from core.steps.resolve_base import run_resolve_base

    rest = {name: copy.deepcopy(section) for name, section in recipe.items() if name != "cluster"}
    prune, model = rest["prune"], rest["model"]
    return run_resolve_base(
        base_model=model.pop("base"),
        revision=model.pop("revision", ""),
        target=prune.pop("target"),
        method=prune.pop("method", "adapt-pruner"),
        fixed={"prune": {"phases": prune.pop("phases")}},
        recipe=rest,
        job=job,
        accelerated=accelerated,
    )


def run_phase(run, phase, checkpoint_uri, data_uri, folder):
    """Call the four steps of a phase and its evaluation in this process; return the checkpoint's URI."""
    from core.steps.calibrate import run_calibrate
    from core.steps.prune_step import run_prune_step
    from core.steps.recover_train import run_recover_train
    from core.steps.score_layers import run_score_layers

    place = folder / f"phase-{phase}"
    common = {"run": run, "phase": phase}
    statistics, plan = Artifact(place / "statistics"), Artifact(place / "plan")
    given = {"checkpoint_uri": checkpoint_uri, "data_uri": data_uri, **common}
    run_calibrate(**given, statistics=statistics)
    run_score_layers(**given, plan=plan)
    pruned = run_prune_step(**given, model=Artifact(place / "pruned"))
    recovered = run_recover_train(
        **common, checkpoint_uri=pruned, data_uri=data_uri, model=Artifact(place / "recovered")
    )
    evaluate(run, phase, recovered, data_uri, place)
    return recovered


def evaluate(run, phase, checkpoint_uri, data_uri, folder):
    from core.steps.evaluate import run_evaluate

    summary, picture = (Artifact(folder / name) for name in ("summary", "picture"))
    run_evaluate(
        run=run,
        phase=phase,
        checkpoint_uri=checkpoint_uri,
        data_uri=data_uri,
        summary=summary,
        picture=picture,
    )
    return summary


def run_all(recipe, folder, *, job="job"):
    """Call all steps of a run in this process, in the pipeline's order; return its handle and final URI."""
    from core.steps.finalize import run_finalize
    from core.steps.needs_run import run_needs_run
    from core.steps.prepare_data import run_prepare_data
    from core.steps.publish import run_publish

    run, base_uri = resolve(recipe, job=job)
    if run_needs_run(run=run, being_done_by="").phase:
        data_uri = run_prepare_data(run=run, base_uri=base_uri)
        evaluate(run, 0, base_uri, data_uri, folder)
        checkpoint_uri = base_uri
        for phase in range(1, recipe["prune"]["phases"] + 1):
            checkpoint_uri = run_phase(run, phase, checkpoint_uri, data_uri, folder)
        run_publish(
            run=run,
            checkpoint_uri=checkpoint_uri,
            result=Artifact(folder / "result"),
            report=Artifact(folder / "report"),
            model=Artifact(folder / "model"),
        )
    run_finalize(store=recipe["storage"]["store"], job=job, succeeded=True)
    return run, f"{run['store']}/runs/{run['key']}/final"


def kept_groups(run, phase):
    """Return the base model's query heads, KV heads and MLP channels that each layer has after a phase."""
    kept = [
        (range(layer.query_heads), range(layer.kv_heads), range(layer.mlp_width))
        for layer in run.dense.layers
    ]
    for number in range(1, phase + 1):
        plan = json.loads(Path(run.phase_uri(number, "scored"), "plan.json").read_text())
        kept = [
            tuple([old[i] for i in layer[name]] for old, name in zip(before, names, strict=True))
            for before, layer in zip(kept, plan["layers"], strict=True)
            for names in [("query_heads", "kv_heads", "mlp_channels")]
        ]
    return kept
