"""The Markdown table of a phase, read back by a Markdown parser."""

import dataclasses

import pytest
from markdown_it import MarkdownIt

from core.report.summary import build_phase_summary, escaped
from core.runs.record import DistillationRecord, LayerSizes, PhaseRecord, RunRecord

DENSE = PhaseRecord(
    phase=0,
    params=134_515_008,
    target_params=134_515_008,
    layers=(LayerSizes(query_heads=9, kv_heads=3, mlp_width=1536),),
    perplexity=18.2249,
    tasks={
        "arc_easy": {"acc": 0.552, "acc_stderr": 0.0132, "acc_norm": 0.5},
        "wiki_text": {"word_perplexity": 31.5},
    },
    seconds={"evaluate": 96.2},
)
PHASE = dataclasses.replace(
    DENSE,
    phase=2,
    params=120_525_120,
    perplexity=153.4,
    perplexity_pruned=500_000.0,
    tasks={"arc_easy": {"acc": 0.501, "acc_stderr": 0.0144, "acc_norm": 0.25, "acc_norm_stderr": 0.01}},
    tokens=1_205_000,
    seconds={"calibrate": 60.0, "recover-train": 140.0},
)


def record(*phases, name="a_recipe_of *mine*"):
    return RunRecord(key="k", name=name, base="org/model", revision="r", settings={}, phases=phases)


def shown(text):
    """Heading and rows as a reader of the rendered Markdown sees them; nothing but plain text is allowed."""
    rows, heading, cells = [], "", []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        if token.type == "inline":
            assert {child.type for child in token.children} <= {"text", "text_special"}, token.content
            cells.append("".join(child.content for child in token.children))
        elif token.type == "heading_close":
            heading, cells = cells[0], []
        elif token.type == "tr_close":
            rows.append(tuple(cells))
            cells = []
    return heading, rows


def test_a_phase_stands_beside_the_dense_model():
    assert shown(build_phase_summary(record(DENSE, PHASE))) == (
        "a_recipe_of *mine*, phase 2",
        [
            ("measure", "dense model", "phase 2"),
            ("parameters", "134,515,008", "120,525,120"),
            ("perplexity after pruning", "-", "5.0e+05"),
            ("perplexity", "18.22", "153"),
            ("arc_easy, acc", "55.2 % ± 1.3", "50.1 % ± 1.4"),
            ("arc_easy, acc_norm", "50.0 %", "25.0 % ± 1.0"),
            ("training tokens", "-", "1,205,000"),
            ("time", "1 min 36 s", "3 min 20 s"),
        ],
    )


def test_only_shares_are_in_percent_and_no_error_is_a_result():
    tasks = {
        "wikitext": {"word_perplexity": 31.5, "bits_per_byte": 0.62},
        "bbh": {"exact_match_get-answer": 0.25, "exact_match_stderr_get-answer": 0.005},
        "llm": {"average": 0.4, "average_stderr": 0.01, "chance": 0.25},
    }
    _, rows = shown(build_phase_summary(record(dataclasses.replace(DENSE, tasks=tasks))))
    assert rows[3:-1] == [
        ("wikitext, word_perplexity", "31.50"),
        ("wikitext, bits_per_byte", "0.62"),
        ("bbh, exact_match_get-answer", "25.0 % ± 0.5"),
        ("llm, average", "40.0 % ± 1.0"),
        ("llm, chance", "25.0 %"),
    ]


def test_a_distillation_stands_among_the_measures():
    distillation = DistillationRecord(seconds=9.0, tokens=98_304, before=0.7512, after=0.5218)
    _, rows = shown(
        build_phase_summary(
            record(DENSE, dataclasses.replace(PHASE, distillation=distillation, mask_tokens=4096))
        )
    )
    assert ("divergence before distillation", "-", "0.751") in rows
    assert ("divergence after distillation", "-", "0.522") in rows
    assert ("tokens of distillation", "-", "98,304") in rows
    assert ("tokens of masks", "-", "4,096") in rows


def test_the_dense_model_stands_alone():
    heading, rows = shown(build_phase_summary(record(DENSE)))
    assert heading == "a_recipe_of *mine*, dense model"
    assert rows[0] == ("measure", "dense model")
    assert ("wiki_text, word_perplexity", "31.50") in rows
    assert "perplexity after pruning" not in {row[0] for row in rows}


@pytest.mark.parametrize(
    "name", ["a|b", "_x_ __y__", "`c` [d](e) <b>f</b>", "# g", "~~h~~ \\i *j*", "k\nl", "1. m", "![n](o)"]
)
def test_a_name_is_shown_as_it_is(name):
    assert shown(f"# {escaped(name)}\n")[0] == " ".join(name.split())
    table = f"| x |\n|---|\n| {escaped(name)} |\n"
    assert shown(table)[1] == [("x",), (" ".join(name.split()),)]
