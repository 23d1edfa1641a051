"""The table of one phase, or of all, in Markdown, as the KFP UI and MLflow show it."""

import re
from collections.abc import Iterator, Mapping

from core.quantities import seconds_text
from core.runs.record import PhaseRecord, RunRecord, is_error, perplexity_text, public_path, score_text

_SHOWN = 5
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~-])")


def build_phase_summary(record: RunRecord) -> str:
    """Return the measures of the record's last phase beside those of its first, the dense model."""
    dense, phase = record.phases[0], record.phases[-1]
    shown = [dense, phase] if phase.phase else [dense]
    names = [f"phase {each.phase}" if each.phase else "dense model" for each in shown]
    return f"# {escaped(record.name)}, {names[-1]}\n\n{_table(shown, names)}\n"


def build_description(record: RunRecord) -> str:
    """Return what a run has come to: where it is, and the measures of the first and the last phases."""
    dense, *done = record.phases
    shown = [dense, *done[-_SHOWN:]]
    names = [f"phase {each.phase}" if each.phase else "dense model" for each in shown]
    place = f"Result: `{record.checkpoint_uri}`. Report: `report.html` among the artifacts."
    return f"{escaped(public_path(record.base))}. {place}\n\n{_table(shown, names)}\n"


def _table(phases: list[PhaseRecord], names: list[str]) -> str:
    rows = [(escaped(measure), *cells) for measure, *cells in _rows(phases) if set(cells) != {"-"}]
    lines = [("measure", *names), ("---", *["---:"] * len(names)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def escaped(text: str) -> str:
    """Return a text on one line, escaped for Markdown: ``acc_norm`` without italics."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _rows(phases: list[PhaseRecord]) -> Iterator[tuple[str, ...]]:
    """Yield measures with one cell a phase, a dash if not measured."""
    yield "parameters", *(f"{phase.params:,}" for phase in phases)
    yield "perplexity after pruning", *(perplexity_text(phase.perplexity_pruned) for phase in phases)
    yield "perplexity", *(perplexity_text(phase.perplexity) for phase in phases)
    for task, metric in _metrics(phases[-1].tasks):
        yield (
            f"{task}, {metric}",
            *(score_text(phase.tasks.get(task, {}), metric, unit=" %") for phase in phases),
        )
    yield "tokens of masks", *(f"{phase.mask_tokens:,}" if phase.mask_tokens else "-" for phase in phases)
    distilled = [phase.distillation for phase in phases]
    yield "divergence before distillation", *(f"{each.before:.3f}" if each else "-" for each in distilled)
    yield "divergence after distillation", *(f"{each.after:.3f}" if each else "-" for each in distilled)
    yield "tokens of distillation", *(f"{each.tokens:,}" if each else "-" for each in distilled)
    yield "training tokens", *(f"{phase.tokens:,}" if phase.tokens else "-" for phase in phases)
    on_gpus = [phase.gpu_seconds for phase in phases]
    yield "GPU time", *(seconds_text(seconds) if seconds else "-" for seconds in on_gpus)
    yield "time", *(seconds_text(sum(phase.seconds.values())) if phase.seconds else "-" for phase in phases)


def _metrics(tasks: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, str]]:
    for task, metrics in tasks.items():
        names = dict.fromkeys(name.partition(",")[0] for name in metrics)  # lm-eval: "acc_norm,none"
        yield from ((task, name) for name in names if not is_error(name))
