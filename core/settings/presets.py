"""Sets of benchmarks by name: those of the paper's Table 6, and a small one that needs no download.

Imports no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A task of a preset."""

    task: str
    """lm-eval's name of a task or a group, or one of our own (``core.evaluation.mini``)."""
    metric: str
    """What counts of it."""
    shots: int | None = 0
    """Examples before each question; None for those that the task brings."""
    averaged: bool = True
    """Whether it is part of the preset's average: all accuracies are."""


PRESETS: dict[str, tuple[Benchmark, ...]] = {
    "commonsense": (
        Benchmark(task="arc_easy", metric="acc_norm"),
        Benchmark(task="arc_challenge", metric="acc_norm"),
        Benchmark(task="boolq", metric="acc"),
        Benchmark(task="hellaswag", metric="acc_norm"),
        Benchmark(task="openbookqa", metric="acc_norm"),
        Benchmark(task="piqa", metric="acc_norm"),
        Benchmark(task="social_iqa", metric="acc"),
        Benchmark(task="winogrande", metric="acc"),
        Benchmark(task="wikitext", metric="word_perplexity", averaged=False),
    ),
    "llm": (
        Benchmark(task="bbh", metric="exact_match_get-answer", shots=3),
        Benchmark(task="truthfulqa_mc1", metric="acc", shots=1),
        Benchmark(task="agieval", metric="acc_norm"),
        Benchmark(task="mmlu", metric="acc", shots=5),
    ),
    "mini": (
        Benchmark(task="mini_facts", metric="acc"),
        Benchmark(task="mini_grammar", metric="acc"),
        Benchmark(task="mini_series", metric="acc"),
    ),
}
"""Name of a preset to its benchmarks, in the order of the tables."""
