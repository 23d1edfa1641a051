"""The report of a run, one self-contained HTML file, and its table for the terminal."""

import dataclasses
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from core.quantities import count_text, seconds_text
from core.redaction import without_password
from core.report.drawing import inline_svg
from core.report.figures import layers_figure, quality_figure, training_figure, widths_figure
from core.report.templates import listed, render
from core.runs.record import (
    PhaseRecord,
    RunRecord,
    SpeedRecord,
    accuracies,
    chance_text,
    headline_metric,
    perplexity_text,
    score_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_Card = tuple[str, tuple[str, ...], str]
"""A heading, one or two values, and a small text."""

_MANY_TASKS = 4  # above this the benchmarks have a table of their own

_SCREEN_READERS = {
    "widths": "Width of every layer",
    "layers": "Importance and sparsity of every layer",
    "quality": "Perplexity and accuracy against parameters",
    "training": "Training loss and learning rate",
}


def build_report(record: RunRecord, *, compared: Mapping[str, Any] | None = None) -> str:
    """Return the report of a run as one HTML document that loads nothing from elsewhere.

    Equal records give equal text. What was not measured is left out.

    Args:
        record: What the run has measured.
        compared: A comparison with other runs to show, by ``comparison_parts``.
    """
    revision = f" @ {record.revision}" if record.revision else ""
    tracked = f", MLflow run {record.tracking_run}" if record.tracking_run else ""
    tasks = _tasks(record.phases)
    apart = len(tasks) > _MANY_TASKS
    columns = {"phase": _names(record.phases)} | _task_columns(record.phases, tasks, errors=False)
    has_layers = any(phase.importance and phase.sparsity for phase in record.phases)
    seconds: Counter[str] = Counter()
    for phase in record.phases:
        seconds.update(phase.seconds)
    return render(
        "report.html",
        title=_title(record),
        subtitle=f"{record.base}{revision}, run {record.key}{tracked}{_so_far(record)}",
        record=record,
        cards=_headline(record),
        phases=_phase_columns(record, {} if apart else tasks) if record.phases else {},
        has_tasks=bool(tasks),
        repairs=_repair_columns(record.phases),
        repair_title=_repair_title(record),
        distilled=record.distilled_tokens > 0,
        benchmarks=columns if apart else {},
        speed_columns=_speed_columns,
        pictures=_drawn(
            widths=widths_figure(record) if len(record.phases) > 1 else None,
            layers=layers_figure(record) if has_layers else None,
            quality=quality_figure(record),
            training=training_figure(record),
        ),
        seconds=seconds,
        compared=compared,
        usage=_usage(record) if record.checkpoint_uri else (),
        settings=_settings(record.settings, record.chosen),
    )


def build_phase_report(record: RunRecord) -> str:
    """Return the report of one phase as one HTML document that loads nothing from elsewhere.

    ``record`` holds the dense model, the phase before and the phase; or the dense model alone.
    """
    last = record.phases[-1]
    name = f"phase {last.phase}" if last.phase else "dense model"
    text = f"{count_text(last.tokens)} training tokens" if last.tokens else "no training"
    return render(
        "phase.html",
        title=f"{record.name}, {name}",
        subtitle=f"{record.base}, run {record.key}",
        record=record,
        cards=[*_measures(record), ("Time", (seconds_text(sum(last.seconds.values())),), text)],
        pictures=_drawn(
            widths=widths_figure(record),
            training=training_figure(dataclasses.replace(record, phases=(last,))),
        ),
        seconds=last.seconds,
    )


def phase_table(record: RunRecord) -> "Table":
    """Return the table of phases for a terminal; with few benchmarks it fits 80 columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    phases = record.phases
    tasks = _tasks(phases)
    columns = {"phase": _names(phases), "parameters": [f"{phase.params:,}" for phase in phases]}
    columns |= _perplexity_columns(record)
    if len(tasks) <= _MANY_TASKS:
        columns |= _task_columns(phases, tasks, errors=False, chance=False)
    else:
        found = [accuracies(phase).values() for phase in phases]
        means = [f"{100 * sum(values) / len(values):.1f}" if values else "-" for values in found]
        columns[f"accuracy, mean\nof {max(map(len, found))} tasks"] = means
    columns["seconds"] = [f"{sum(phase.seconds.values()):,.0f}" for phase in phases]
    table = Table(title=Text(_title(record)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    if tasks:
        table.caption, table.caption_justify = Text(f"Accuracies in %{_guessing(phases, tasks)}."), "left"
    for header in columns:
        side: Literal["left", "right"] = "left" if header == "phase" else "right"
        table.add_column(Text(header), justify=side, no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(Text(cell) for cell in row))
    return table


def speed_rows(speed: SpeedRecord) -> list[tuple[str, str, str, str]]:
    """Return the speed in one runtime as (measure, base, checkpoint, ratio); above 1 is better."""
    rows = []
    for job, (base, checkpoint) in speed.tokens_per_s.items():
        kind, batch = job.split()
        name = {"prompt": "prefill", "decode": "decoding"}[kind]
        together = f", batch of {batch}" if batch != "1" else ""
        rates = (f"{base:,.1f}", f"{checkpoint:,.1f}", f"{speed.speedups[job]:.2f}")
        rows.append((f"{name}{together} (tokens/s)", *rates))
    (base, checkpoint), (base_bytes, own_bytes) = speed.load_s, speed.memory_bytes
    rows.append(("loading (s)", f"{base:.2f}", f"{checkpoint:.2f}", f"{base / checkpoint:.2f}"))
    megabytes = (f"{base_bytes / 1e6:,.0f}", f"{own_bytes / 1e6:,.0f}", f"{base_bytes / own_bytes:.2f}")
    rows.append(("peak memory (MB)", *megabytes))
    return rows


def _title(record: RunRecord) -> str:
    base = record.base.rstrip("/").rsplit("/", 1)[-1]
    return f"{record.name}: {base}" if base else record.name


def _so_far(record: RunRecord) -> str:
    done, planned = len(record.phases) - 1, record.settings.get("prune", {}).get("phases", 0)
    return f", so far: phase {done} of {planned}" if done < planned else ""


def _headline(record: RunRecord) -> list[_Card]:
    """Return size, perplexity, accuracy (dense and final) and time."""
    if not record.phases:
        return []
    items = _measures(record)
    if seconds := sum(sum(phase.seconds.values()) for phase in record.phases):
        phases = f"{len(record.phases) - 1} phase{'' if len(record.phases) == 2 else 's'}"
        tokens = count_text(sum(phase.tokens for phase in record.phases)) if record.trained else ""
        text = f"{phases}, {tokens} training tokens" if tokens else f"{phases}, no training"
        if record.taught:
            text += ", taught by the base model"
        if masks := record.mask_tokens:
            text += f", {count_text(masks)} tokens of masks"
        if distilled := record.distilled_tokens:
            text += f", {count_text(distilled)} tokens of distillation"
        if taught := record.teacher_tokens:
            text += f", {count_text(taught)} tokens of the teacher's own training"
        if on_gpus := sum(phase.gpu_seconds or 0.0 for phase in record.phases):
            text += f", {seconds_text(on_gpus)} of GPUs"
        items.append(("Time", (seconds_text(seconds),), text))
    return items


def _measures(record: RunRecord) -> list[_Card]:
    """Return size, perplexity and accuracy of the dense and the last model, if known."""
    dense, final = record.phases[0], record.phases[-1]
    counts = (count_text(dense.params), count_text(final.params))
    items: list[_Card] = [("Parameters", counts, _size_text(dense, final))]
    if dense.perplexity and final.perplexity:
        values = (perplexity_text(dense.perplexity), perplexity_text(final.perplexity))
        text = f"{100 * (final.perplexity / dense.perplexity - 1):+.0f} %"
        if record.trained and final.perplexity_pruned is not None:
            text += f"; {perplexity_text(final.perplexity_pruned)} before the last recovery"
        items.append(("Perplexity (lower is better)", values, text))
    before, after = accuracies(dense), accuracies(final)
    if tasks := [task for task in before if task in after]:
        means = [100 * sum(values[task] for task in tasks) / len(tasks) for values in (before, after)]
        text = tasks[0] if len(tasks) == 1 else f"mean of {len(tasks)} benchmarks"
        items.append(("Accuracy (higher is better)", (f"{means[0]:.1f} %", f"{means[1]:.1f} %"), text))
    return items


def _size_text(dense: PhaseRecord, final: PhaseRecord) -> str:
    if final is dense:
        return f"{final.params:,}, not pruned yet"
    miss = final.params - final.target_params
    where = f"{abs(miss):,} {'above' if miss > 0 else 'below'} target" if miss else "exactly the target"
    return f"{final.params:,}, {100 * (1 - final.params / dense.params):.1f} % removed; {where}"


def _speed_columns(speed: SpeedRecord) -> dict[str, Sequence[str]]:
    headers = ("measured alternately", "dense", "pruned", "ratio")
    return dict(zip(headers, zip(*speed_rows(speed), strict=True), strict=True))


def _drawn(**figures: "Figure | None") -> dict[str, str | None]:
    return {
        name: None if figure is None else inline_svg(figure, name=name, label=_SCREEN_READERS[name])
        for name, figure in figures.items()
    }


def _names(phases: Sequence[PhaseRecord]) -> list[str]:
    return [str(phase.phase) if phase.phase else "dense" for phase in phases]


def _tasks(phases: Sequence[PhaseRecord]) -> dict[str, str]:
    """Return every task with its headline metric."""
    found: dict[str, str] = {}
    for task, metrics in (item for phase in phases for item in phase.tasks.items()):
        if (best := headline_metric(metrics)) is not None:
            found.setdefault(task, best[0])
    return found


def _phase_columns(record: RunRecord, tasks: Mapping[str, str]) -> dict[str, list[str]]:
    """Return header to one text a phase; columns without any value are left out."""
    phases = record.phases
    dense = phases[0].params if phases else 1
    columns = {
        "phase": _names(phases),
        "parameters": [f"{phase.params:,}" for phase in phases],
        "of\ndense": [f"{100 * phase.params / dense:.1f} %" for phase in phases],
    }
    columns |= _perplexity_columns(record)
    columns |= _task_columns(phases, tasks, errors=True)
    columns["training\ntokens"] = [count_text(phase.tokens) if phase.tokens else "-" for phase in phases]
    columns["time"] = [seconds_text(sum(p.seconds.values())) if p.seconds else "-" for p in phases]
    columns["of\nGPUs"] = [seconds_text(p.gpu_seconds) if p.gpu_seconds else "-" for p in phases]
    return _without_empty(columns)


def _repair_title(record: RunRecord) -> str:
    done = {
        "masks": record.mask_tokens,
        "repair": any(phase.repair_s for phase in record.phases),
        "distillation": record.distilled_tokens,
    }
    return listed(name for name, value in done.items() if value).capitalize()


def _repair_columns(phases: Sequence[PhaseRecord]) -> dict[str, list[str]]:
    """Return what masks, repair and distillation cost and brought; {} if there was none."""
    phases = [phase for phase in phases if phase.mask_s or phase.repair_s or phase.distillation]
    if not phases:
        return {}
    found = [phase.distillation for phase in phases]
    columns = {
        "phase": _names(phases),
        "masks": [seconds_text(phase.mask_s) if phase.mask_s else "-" for phase in phases],
        "tokens\nof masks": [count_text(phase.mask_tokens) if phase.mask_tokens else "-" for phase in phases],
        "cut and\nrepair": [seconds_text(phase.repair_s) if phase.repair_s else "-" for phase in phases],
        "distillation": [seconds_text(each.seconds) if each else "-" for each in found],
        "distilled\ntokens": [count_text(each.tokens) if each else "-" for each in found],
        "divergence\nbefore": [f"{each.before:.3f}" if each else "-" for each in found],
        "divergence\nafter": [f"{each.after:.3f}" if each else "-" for each in found],
    }
    return _without_empty(columns)


def _perplexity_columns(record: RunRecord) -> dict[str, list[str]]:
    ended = [perplexity_text(phase.perplexity) for phase in record.phases]
    if not record.trained:
        return _without_empty({"perplexity": ended})
    pruned = [perplexity_text(phase.perplexity_pruned) for phase in record.phases]
    return _without_empty({"perplexity\npruned": pruned, "perplexity\nrecovered": ended})


def _without_empty(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    return {header: cells for header, cells in columns.items() if any(cell != "-" for cell in cells)}


def _guessing(phases: Sequence[PhaseRecord], tasks: Iterable[str]) -> str:
    """Name what guessing gives in each task of which that is known."""
    known = {
        task: phase.tasks[task] for phase in phases for task in tasks if "chance" in phase.tasks.get(task, {})
    }
    return "; by chance: " * bool(known) + ", ".join(f"{t} {100 * m['chance']:.0f}" for t, m in known.items())


def _task_columns(
    phases: Sequence[PhaseRecord], tasks: Mapping[str, str], *, errors: bool, chance: bool = True
) -> dict[str, list[str]]:
    columns = {}
    for task, metric in tasks.items():
        found = [phase.tasks.get(task, {}) for phase in phases]
        texts = (chance_text(metrics, "\n") for metrics in found if chance)
        guessing = next(filter(None, texts), "")
        columns[f"{task}\n{metric}{guessing}"] = [score_text(m, metric, error=errors) for m in found]
    return columns


def _usage(record: RunRecord) -> list[tuple[str, str]]:
    """Return commands and code that use the result, each with a title."""
    place = without_password(record.checkpoint_uri.removeprefix("file://"))
    folder, fetch = place, ""
    if "://" in place:
        folder = "pruned"
        fetch = (
            "from core.storage.publication import open_publication\n"
            f"open_publication({place!r}).fetch(Path({folder!r}))\n"
        )
    shell = (
        f'adapt-pruner generate {shlex.quote(folder)} "The capital of France is"\n'
        f"adapt-pruner inspect {shlex.quote(folder)}"
    )
    python = (
        f"from pathlib import Path\nfrom core.model.build import load_model, load_tokenizer\n{fetch}"
        f"model = load_model(Path({folder!r}))\ntokenizer = load_tokenizer(Path({folder!r}))"
    )
    blocks = [("The checkpoint", place), ("On the command line", shell), ("In Python", python)]
    if "://" in place:
        blocks = [blocks[0], blocks[2], blocks[1]]  # fetched in Python first
    if uri := without_password(record.tracking_uri):
        served = uri.startswith(("http://", "https://"))
        command = uri if served else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        blocks.append(("The run in MLflow", command))
    return blocks


def _settings(settings: Mapping[str, Any], chosen: Mapping[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Return section to (setting, value); a chosen precision comes with its reason."""
    own = {key: value for key, value in settings.items() if not isinstance(value, Mapping)}
    sections = {"run": own} | {k: v for k, v in settings.items() if isinstance(v, Mapping)}
    sections.pop("cluster", None)  # it belongs to the compiled pipeline, and means nothing here
    rows = {section: dict(_flat(values, "")) for section, values in sections.items()}
    for section, why in chosen.items():
        if "precision" in rows.get(section, {}):
            rows[section]["precision"] += f" ({why})"
    return {section: list(found.items()) for section, found in rows.items()}


def _flat(value: Any, name: str) -> list[tuple[str, str]]:
    """Flatten settings to (name within the section, text): ``sources[0].path``."""
    if isinstance(value, Mapping) and value:
        dot = "." if name else ""
        return [row for key, inner in value.items() for row in _flat(inner, f"{name}{dot}{key}")]
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        return [row for i, item in enumerate(value) for row in _flat(item, f"{name}[{i}]")]
    if not name:
        return []
    items = value if isinstance(value, list | tuple) else () if value in (None, {}) else (value,)
    return [(name, without_password(", ".join(map(str, items))) or "-")]
