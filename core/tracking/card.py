"""The model card of a run's result: the ``README.md`` that lies in its folder and that the hub shows.

It states what was measured and what is known; what is not is left out. The same record gives the same text.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from core.licence import FACTS
from core.record import (
    LayerSizes,
    PhaseRecord,
    RunRecord,
    count_text,
    headline_metric,
    perplexity_text,
    public_path,
    score_text,
)
from core.tracking.card_usage import usage
from core.tracking.report import speed_rows

_PAPER = "[Adapt-Pruner](https://arxiv.org/abs/2502.03460)"
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
        licence: What the base model states of its licence and languages (``core.licence.FACTS``).
        legal_files: Names of the base model's licence files that lie in the checkpoint's folder.
        formats: Formats of ``adapt-pruner export`` that hold such a model.
    """
    parts = [
        _front_matter(record, licence, legal_files),
        f"# {_short_name(record.base)} pruned to {count_text(record.phases[-1].params)} parameters",
        _summary(record),
        _licence_text(record, licence, legal_files),
        _sizes(record),
        _numbers(record),
        usage(model_type=str(config.get("model_type", "")), unequal="auto_map" in config, formats=formats),
        _making(record),
        _settings(record.settings),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def hub_id(record: RunRecord) -> str | None:
    """Return the id of the base model on the Hugging Face hub; None if it came from somewhere else.

    Only a revision on the hub is a commit; all others are digests of their content, and shorter.
    """
    on_the_hub = re.fullmatch("[0-9a-f]{40}", record.revision)
    return record.base if on_the_hub and re.fullmatch(r"[\w.-]+/[\w.-]+", record.base) else None


def _front_matter(record: RunRecord, licence: Mapping[str, Any], legal_files: Sequence[str]) -> str:
    base = hub_id(record)
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base:
        data["base_model"] = base
        if record.trained:
            data["base_model_relation"] = "finetune"
    data |= {name: licence[name] for name in FACTS if name in licence}
    link = _licence_link(record, licence, legal_files)
    data.pop("license_link", None)
    if link:
        data["license_link"] = link
    data["tags"] = ["adapt-pruner", "pruned"]
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---"


def _licence_link(record: RunRecord, licence: Mapping[str, Any], legal_files: Sequence[str]) -> str | None:
    """Return where the licence is: a link of the base's own repository does not lead anywhere from here."""
    link, base = licence.get("license_link"), hub_id(record)
    if link is None or "://" in link or link in legal_files:
        return link
    return f"https://huggingface.co/{base}/blob/{record.revision}/{link}" if base else None


def _summary(record: RunRecord) -> str:
    dense, final = record.phases[0], record.phases[-1]
    phases = len(record.phases) - 1
    tokens = sum(phase.tokens for phase in record.phases)
    training = f"training on {tokens:,} tokens on the way" if tokens else "without any training"
    return (
        f"This is {_base_text(record)}, pruned from {dense.params:,} to {final.params:,} parameters "
        f"({_share(final, dense)}) by {_PAPER} in {phases} phase{'s' if phases > 1 else ''}, {training}."
    )


def _licence_text(record: RunRecord, licence: Mapping[str, Any], legal_files: Sequence[str]) -> str:
    if "license" not in licence:
        known = (
            "The licence of the base model is not known here: nothing that came with its files names one. "
            "Look at the base model before you use or share this one."
        )
    else:
        name = licence.get("license_name") if licence["license"] == "other" else None
        link = _licence_link(record, licence, legal_files)
        known = "The base model, which this one is derived from, states its licence as "
        known += _code(licence["license"])
        known += (f", {_code(name)}" if name else "") + (f" ({link})" if link else "") + "."
    if legal_files:
        verb = "is the base model's" if len(legal_files) == 1 else "are the base model's"
        known += f" {_listed(map(_code, legal_files))} {verb}."
    return known


def _sizes(record: RunRecord) -> str:
    dense, final = record.phases[0], record.phases[-1]
    rows = [("parameters", f"{dense.params:,}", f"{final.params:,} ({_share(final, dense)})")]
    rows.append(("decoder layers", str(len(dense.layers)), str(len(final.layers))))
    for label, name in (("query heads", "query_heads"), ("KV heads", "kv_heads"), ("MLP width", "mlp_width")):
        rows.append((f"{label} of a layer", _range(dense.layers, name), _range(final.layers, name)))
    layers = _table(
        ("layer", "query heads", "KV heads", "MLP width"),
        [
            (str(i), str(layer.query_heads), str(layer.kv_heads), str(layer.mlp_width))
            for i, layer in enumerate(final.layers)
        ],
    )
    return f"## Sizes\n\n{_table(('', 'base model', 'this model'), rows)}\n\n{_folded('Every layer', layers)}"


def _numbers(record: RunRecord) -> str:
    """Return what was measured before and after; "" if nothing was."""
    dense, final = record.phases[0], record.phases[-1]
    evaluation = record.settings.get("evaluation", {})
    rows, parts = [], []
    if dense.perplexity is not None and final.perplexity is not None:
        text = evaluation.get("perplexity") or {}
        windows = (
            f"{evaluation.get('perplexity_windows')} windows of {evaluation.get('perplexity_length')} tokens"
        )
        rows.append(
            (
                f"perplexity (lower is better), {windows} of {_source(text)}",
                perplexity_text(dense.perplexity),
                perplexity_text(final.perplexity),
            )
        )
    limit = evaluation.get("limit")
    items = f"at most {limit} items" if limit else "all items"
    for task, metrics in final.tasks.items():
        headline = headline_metric(metrics)
        if headline is not None and task in dense.tasks:
            scores = [score_text(phase.tasks[task], headline[0]) for phase in (dense, final)]
            rows.append((f"{_code(task)}, {headline[0]}, {items}", scores[0], scores[1]))
    if rows:
        parts.append(_table(("measure", "base model", "this model"), rows))
    if final.tasks:
        parts.append(
            "Benchmarks ran in lm-eval with as many examples in the prompt as a task asks for by itself, and "
            "with none where it does not say; ± is one standard error."
        )
    for speed in record.speed:
        headers = (f"speed in {speed.runtime} on {speed.device}", "base model", "this model", "ratio")
        parts.append(f"{_table(headers, speed_rows(speed))}\n\nA ratio above 1 is better for this model.")
    return "\n\n".join(["## Measured before and after", *parts]) if parts else ""


def _making(record: RunRecord) -> str:
    """Return how it was made: the settings that matter most, and each phase."""
    prune, calibration, training = (
        record.settings.get(name, {}) for name in ("prune", "calibration", "training")
    )
    lines = []
    for text, section, name in (
        ("method", prune, "method"),
        ("target", prune, "target"),
        ("worth of a group by", prune, "criterion"),
        ("importance of a layer by similarity", prune, "similarity"),
        ("what attention loses", prune, "attention_unit"),
        ("profile", prune, "profile"),
        ("seed", record.settings, "seed"),
    ):
        if name in section:
            lines.append(f"* {text}: {_code(section[name])}")
    if calibration.get("source"):
        lines.append(
            f"* calibrated on {calibration['sequences']:,} sequences of {calibration['sequence_length']:,} "
            f"tokens for each pruning step, from {_source(calibration['source'])}"
        )
    if record.trained:
        sources = _listed(_source(source) for source in training.get("sources", ()))
        lines.append(
            f"* trained on {sum(phase.tokens for phase in record.phases):,} tokens in sequences of "
            f"{training['sequence_length']:,}, peak learning rate {training['learning_rate']:g}, "
            f"from {sources}"
        )
    return "\n\n".join(["## How it was made", "\n".join(lines), _phases(record.phases)])


def _phases(phases: Sequence[PhaseRecord]) -> str:
    """Return a table of all phases, without columns that are empty."""
    columns = {
        "phase": [str(phase.phase) if phase.phase else "base model" for phase in phases],
        "parameters": [f"{phase.params:,}" for phase in phases],
        "perplexity pruned": [perplexity_text(phase.perplexity_pruned) for phase in phases],
        "perplexity at the end": [perplexity_text(phase.perplexity) for phase in phases],
        "training tokens": [f"{phase.tokens:,}" if phase.tokens else "-" for phase in phases],
    }
    kept = {header: cells for header, cells in columns.items() if set(cells) != {"-"}}
    return _table(tuple(kept), list(zip(*kept.values(), strict=True)))


def _settings(settings: Mapping[str, Any]) -> str:
    """Return the settings that decide the result, without where it was stored, tracked and run."""
    kept = {name: _public(value) for name, value in settings.items() if name not in _OF_THE_PLACE}
    if not kept:
        return ""
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    return _folded("All settings", f"```yaml\n{text}```")


def _public(value: Any) -> Any:
    """Return a setting without the folders, addresses and passwords that it may name."""
    if isinstance(value, Mapping):
        return {name: _public(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_public(inner) for inner in value]
    return public_path(value) if isinstance(value, str) else value


def _short_name(base: str) -> str:
    return re.split(r"[/\\:]", public_path(base).rstrip("/"))[-1].removesuffix(".gguf") or "A model"


def _base_text(record: RunRecord) -> str:
    base, revision = hub_id(record), record.revision
    if base:
        return f"[{base}](https://huggingface.co/{base}/tree/{revision}) at commit {_code(revision)}"
    name = _code(public_path(record.base))
    return f"{name} (content {_code(revision)})" if revision else name


def _source(source: Mapping[str, Any]) -> str:
    """Return what names a text: its path and, where they are not the usual ones, its subset and split."""
    subset, split = source.get("subset"), source.get("split")
    more = [str(subset)] * bool(subset) + [str(split)] * bool(split and split != "train")
    return _code(public_path(str(source.get("path", "")))) + (f" ({', '.join(more)})" if more else "")


def _share(final: PhaseRecord, dense: PhaseRecord) -> str:
    return f"{100 * final.params / dense.params:.1f} %"


def _range(layers: Sequence[LayerSizes], name: str) -> str:
    sizes = [getattr(layer, name) for layer in layers]
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _code(text: Any) -> str:
    """Return text between backticks, without what would end them, the line or the cell of a table."""
    plain = re.sub(r"[`|\s]+", " ", str(text))
    return f"`{plain}`"


def _listed(items: Any) -> str:
    *first, last = list(items) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _folded(title: str, body: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"
