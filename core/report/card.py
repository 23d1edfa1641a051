"""The model card of a run's result: the ``README.md`` in its folder, which the hub shows.

Unknown and unmeasured things are left out. Equal records give equal text.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from core.bases.licence import FACTS
from core.report.report import speed_rows
from core.report.templates import code, listed, render
from core.runs.record import (
    PhaseRecord,
    RunRecord,
    chance_text,
    headline_metric,
    perplexity_text,
    public_path,
    score_text,
)

_OF_THE_PLACE = ("storage", "tracking", "cluster")


def model_card(
    record: RunRecord,
    *,
    config: Mapping[str, Any],
    licence: Mapping[str, Any],
    legal_files: Sequence[str] = (),
    formats: Collection[str] = (),
) -> str:
    """Return the card of a run's last phase.

    Args:
        record: The run; the dense model and at least one phase.
        config: The checkpoint's ``config.json``.
        licence: The base model's licence and languages (``core.bases.licence.FACTS``).
        legal_files: The base model's licence files in the checkpoint's folder.
        formats: Formats that the checkpoint can be exported to.
    """
    return render(
        "card.md",
        record=record,
        front_matter=_front_matter(record, licence, legal_files),
        name=_short_name(record.base),
        base=_base_text(record),
        licence=licence,
        licence_link=_licence_link(record, licence, legal_files),
        legal_files=legal_files,
        measures=_measures(record),
        speed_rows=speed_rows,
        model_type=config.get("model_type", ""),
        unequal="auto_map" in config,
        sliced="sliced_hidden_size" in config,
        formats=formats,
        calibrated_on=_source(record.settings.get("calibration", {}).get("source") or {}),
        trained_on=listed(map(_source, record.settings.get("training", {}).get("sources", ()))),
        phases=_phase_columns(record.phases),
        layers=[layer for layer in record.phases[-1].layers if layer.mlp_width],
        settings=_settings(record.settings),
    )


def _hub_id(record: RunRecord) -> str | None:
    """Return the id of the base model on the Hugging Face hub; None if it came from elsewhere.

    Revisions on the hub are commits; all others are content digests, which are shorter.
    """
    on_the_hub = re.fullmatch("[0-9a-f]{40}", record.revision)
    return record.base if on_the_hub and re.fullmatch(r"[\w.-]+/[\w.-]+", record.base) else None


def _front_matter(record: RunRecord, licence: Mapping[str, Any], legal_files: Sequence[str]) -> str:
    base = _hub_id(record)
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base:
        data["base_model"] = base
        if record.trained:
            data["base_model_relation"] = "finetune"
    facts = {**licence, "license_link": _licence_link(record, licence, legal_files)}
    data |= {name: facts[name] for name in FACTS if facts.get(name) is not None}
    data["tags"] = ["adapt-pruner", "pruned"]
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _licence_link(record: RunRecord, licence: Mapping[str, Any], legal_files: Sequence[str]) -> str | None:
    """Return the address of the licence; a link within the base's repository is dead from here."""
    link, base = licence.get("license_link"), _hub_id(record)
    if link is None or "://" in link or link in legal_files:
        return link
    return f"https://huggingface.co/{base}/blob/{record.revision}/{link}" if base else None


def _measures(record: RunRecord) -> list[tuple[str, str, str]]:
    """Return the measures of both models: (measure, base model, this model)."""
    dense, final = record.phases[0], record.phases[-1]
    evaluation = record.settings.get("evaluation", {})
    rows = []
    if dense.perplexity is not None and final.perplexity is not None:
        windows, length = evaluation.get("perplexity_windows"), evaluation.get("perplexity_length")
        text = _source(evaluation.get("perplexity") or {})
        stride = evaluation.get("perplexity_stride")
        sliding = f", sliding by {stride}," if stride else ""
        measure = (
            f"perplexity (lower is better), at most {windows} windows of {length} tokens{sliding} of {text}"
        )
        rows.append((measure, perplexity_text(dense.perplexity), perplexity_text(final.perplexity)))
    limit = evaluation.get("limit")
    items = f"at most {limit} items" if limit else "all items"
    for task, metrics in final.tasks.items():
        headline = headline_metric(metrics)
        if headline is not None and task in dense.tasks:
            scores = [score_text(phase.tasks[task], headline[0], unit=" %") for phase in (dense, final)]
            what = f"{code(task)}, {headline[0]}, {items}{chance_text(metrics, ', ')}"
            rows.append((what, scores[0], scores[1]))
    return rows


def _phase_columns(phases: Sequence[PhaseRecord]) -> dict[str, list[str]]:
    """Return header to one text a phase, without empty columns."""
    columns = {
        "phase": [str(phase.phase) if phase.phase else "base model" for phase in phases],
        "parameters": [f"{phase.params:,}" for phase in phases],
        "perplexity pruned": [perplexity_text(phase.perplexity_pruned) for phase in phases],
        "perplexity at the end": [perplexity_text(phase.perplexity) for phase in phases],
        "training tokens": [f"{phase.tokens:,}" if phase.tokens else "-" for phase in phases],
    }
    return {header: cells for header, cells in columns.items() if set(cells) != {"-"}}


def _settings(settings: Mapping[str, Any]) -> str:
    """Return the settings as YAML, without those of storage, tracking and cluster."""
    kept = {name: _public(value) for name, value in settings.items() if name not in _OF_THE_PLACE}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True) if kept else ""


def _public(value: Any) -> Any:
    """Return a setting without folders, addresses and passwords."""
    if isinstance(value, Mapping):
        return {name: _public(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_public(inner) for inner in value]
    return public_path(value) if isinstance(value, str) else value


def _short_name(base: str) -> str:
    return re.split(r"[/\\:]", public_path(base).rstrip("/"))[-1].removesuffix(".gguf") or "A model"


def _base_text(record: RunRecord) -> str:
    base, revision = _hub_id(record), record.revision
    if base:
        return f"[{base}](https://huggingface.co/{base}/tree/{revision}) at commit {code(revision)}"
    name = code(public_path(record.base))
    return f"{name} (content {code(revision)})" if revision else name


def _source(source: Mapping[str, Any]) -> str:
    """Return a text's path, with its subset and a split other than ``train``."""
    subset, split = source.get("subset"), source.get("split")
    more = [str(subset)] * bool(subset) + [str(split)] * bool(split and split != "train")
    return code(public_path(str(source.get("path", "")))) + (f" ({', '.join(more)})" if more else "")
