"""Runs of made-up figures in a store, laid out and hashed as real ones are."""

import hashlib
import json
import math
import random
from pathlib import Path

from core.model.shape import LayerShape, ModelShape
from core.runs.record import LayerSizes, PhaseRecord, RunRecord, SpeedRecord
from core.runs.run import Run
from core.settings.recipe import settings_from_dict
from core.storage.layout import ITEMS, PLAN, RECORD, REPORT
from core.storage.manifest import FileEntry, Manifest

DENSE = 134_515_008
TASKS = ("arc_easy", "piqa")


def publish_quickly(folder, files, metadata=None):
    """What ``publish`` leaves in a folder, without waiting for the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, content in sorted(files.items()):
        (folder / name).write_bytes(content)
        entries.append(FileEntry(path=name, size=len(content), sha256=hashlib.sha256(content).hexdigest()))
    manifest = Manifest(files=tuple(entries), metadata=metadata or {})
    (folder / "MANIFEST.json").write_text(manifest.to_json())


def json_file(**data):
    return json.dumps({"format": 1, **data}).encode()


def write_run(
    store,
    name,
    *,
    skill=0.6,
    phases=3,
    done=None,
    layers=30,
    items=60,
    tasks=TASKS,
    settings=None,
    speed=False,
    trained_steps=20,
):
    """Write a run of which ``done`` phases (None: all) are there, and return its key.

    ``skill`` is about the share of right answers that pruning leaves at best; each phase loses a little.
    """
    recipe = {"name": name, "model": {"base": "org/SmolLM2-135M"}, "storage": {"store": str(store)}}
    recipe["prune"] = {"target": "75%", "phases": phases}
    recipe["calibration"] = {"source": {"path": "texts.jsonl"}}
    recipe["training"] = {"tokens": "1B", "sources": [{"path": "texts.jsonl"}]}
    recipe["evaluation"] = {"perplexity": {"path": "held-out.txt"}, "tasks": list(tasks)}
    for place, value in (settings or {}).items():
        section, key = place.split(".")
        recipe.setdefault(section, {})[key] = value
    chance = random.Random(f"{name} {settings}")
    recipe["seed"] = chance.randrange(10**6)
    own = settings_from_dict(recipe)
    shape = ModelShape(
        layers=(LayerShape(query_heads=9, kv_heads=3, mlp_width=1536),) * layers,
        outside_params=DENSE - layers * 3_540_096,
        layer_params=1152,
        query_head_params=73_728,
        kv_head_params=73_728,
        mlp_channel_params=1728,
    )
    run = Run(
        store=str(Path(store).absolute()),
        key=Run.key_of("rev", own),
        settings=own,
        revision="rev",
        base_uri=f"{store}/bases/rev",
        dense=shape,
        phase_params=tuple(round(DENSE * (1 - 0.25 * phase / phases)) for phase in range(1, phases + 1)),
        job="",
    )
    run.save()
    publish_quickly(Path(run.store, run.folder, "data"), {REPORT: json_file(seconds=30.0)})
    records = [
        _phase(Path(run.store, run.folder), run, phase, phases, skill, chance, items, tasks, trained_steps)
        for phase in range((phases if done is None else done) + 1)
    ]
    if done is None:
        record = RunRecord(
            key=run.key,
            name=name,
            base="org/SmolLM2-135M",
            revision="rev",
            settings=own.to_dict(),
            phases=tuple(records),
            checkpoint_uri=run.uri("final"),
            speed=(_speed(chance),) if speed else (),
        )
        shards = {f"model-{i:05d}.safetensors": b"" for i in range(layers + 1)}
        files = {RECORD: json.dumps(record.to_dict()).encode(), REPORT: json_file(seconds=1.0), **shards}
        publish_quickly(Path(run.store, run.folder, "final"), files, {"measured": own.measured_digest()})
        done_file = json_file(final=run.uri("final"), measured=[own.measured_digest()])
        Path(run.store, run.folder, "DONE.json").write_bytes(done_file)
    return run.key


def _phase(folder, run, phase, phases, skill, chance, items, tasks, steps):
    share = 0.25 * phase / phases
    # The dense model is the same one for all runs, and the items are as hard for each model.
    hard, own = random.Random(1), chance if phase else random.Random(2)
    able = skill - share * skill / 2 if phase else 0.7
    right = {
        task: [float(0.7 * hard.random() + 0.3 * own.random() < able) for _ in range(items)] for task in tasks
    }
    lost = 1 - skill + share if phase else 0.25
    nats = [100 * (2.5 + lost + hard.gauss(0, 0.3) + own.gauss(0, 0.03)) for _ in range(24)]
    perplexity = math.exp(sum(nats) / 2400)
    figures = {
        task: {
            "acc_norm,none": sum(values) / items,
            "acc_norm_stderr,none": math.sqrt(sum(values) * (items - sum(values)) / items**2 / (items - 1)),
        }
        for task, values in right.items()
        if items
    }
    layers = len(run.dense.layers)
    sparsity = [share * (0.5 + i / layers) for i in range(layers)]
    sizes = [
        {"query_heads": 9 - 3 * (s > 0.2), "kv_heads": 3 - (s > 0.2), "mlp_width": round(1536 * (1 - s))}
        for s in sparsity
    ]
    digest = run.settings.measured_digest()
    params = run.phase_params[phase - 1] if phase else DENSE
    losses = [(steps * (phase - 1) + i, 3 - 0.01 * i, 2e-5) for i in range(steps)] if phase else []
    place = folder / "phases" / f"{phase:02d}"
    if figures:
        means = [figures[task]["acc_norm,none"] for task in tasks]
        figures["both"] = {"average": sum(means) / len(means)}
    measured = {"perplexity": perplexity, "tasks": figures, "seconds": 60.0}
    publish_quickly(
        place / f"evaluated-{digest}",
        {REPORT: json_file(**measured), ITEMS: json_file(**_items(right, nats))},
    )
    if phase:
        plan = {
            "params_after": params,
            "sparsity": sparsity,
            "importance": [1 - 2 * i / layers for i in range(layers)],
            "layers": [
                {
                    "query_heads": list(range(size["query_heads"])),
                    "kv_heads": list(range(size["kv_heads"])),
                    "mlp_channels": list(range(size["mlp_width"])),
                }
                for size in sizes
            ],
        }
        trained = {"tokens": 20_000, "losses": losses, "seconds": 100.0}
        publish_quickly(
            place / "calibrated", {REPORT: json_file(seconds=10.0), "statistics.safetensors": b""}
        )
        publish_quickly(place / "scored", {REPORT: json_file(seconds=5.0), PLAN: json_file(**plan)})
        publish_quickly(place / "pruned", {REPORT: json_file(seconds=5.0)})
        publish_quickly(place / "recovered", {REPORT: json_file(**trained)})
    return PhaseRecord(
        phase=phase,
        params=params,
        target_params=params,
        layers=tuple(LayerSizes(**size) for size in sizes),
        importance=(0.5,) * layers if phase else (),
        sparsity=tuple(sparsity) if phase else (),
        perplexity=perplexity,
        tasks=figures,
        tokens=20_000 if phase else 0,
        losses=tuple(losses),
        seconds={"evaluated": 60.0} | ({"recovered": 100.0, "pruned": 20.0} if phase else {}),
    )


def _items(right, nats):
    names = [hashlib.sha256(str(i).encode()).hexdigest()[:16] for i in range(10**4)]
    tasks = {
        task: {
            "items": names[: len(values)],
            "metrics": {"acc_norm": {"kind": "mean", "values": values, "weights": None}},
        }
        for task, values in right.items()
    }
    windows = {"kind": "perplexity", "values": nats, "weights": [100.0] * len(nats)}
    text = {"items": names[: len(nats)], "metrics": {"perplexity": windows}}
    preset = {"average": {"members": [[task, "acc_norm"] for task in tasks], "by_size": False}}
    return {"tasks": tasks, "texts": {"perplexity": text}, "groups": {"both": preset} if tasks else {}}


def _speed(chance):
    ratio = 1 + chance.random()
    return SpeedRecord(
        runtime="torch",
        device="cpu",
        tokens_per_s={"prompt 1": (100.0, 100 * ratio), "decode 1": (10.0, 10 * ratio)},
        speedups={"prompt 1": ratio, "decode 1": ratio},
        load_s=(1.0, 0.9),
        memory_bytes=(10**8, 9 * 10**7),
    )
