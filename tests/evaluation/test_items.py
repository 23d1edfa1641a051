import json
import math

import pytest

from core.errors import FormatError, StorageError
from core.evaluation.benchmarks import measure_tasks
from core.evaluation.items import (
    GroupMetric,
    ItemResults,
    Items,
    MetricItems,
    numbered,
    read_items,
)
from core.settings.evaluation import EvaluationSettings
from core.storage.publication import publish

ITEMS = Items(
    tasks={
        "arc_easy": ItemResults(
            items=("a", "b", "b#2"), metrics={"acc": MetricItems(kind="mean", values=(1.0, 0.0, 0.0))}
        )
    },
    texts={
        "perplexity": ItemResults(
            items=("w",),
            metrics={"perplexity": MetricItems(kind="perplexity", values=(math.inf,), weights=(7.0,))},
        )
    },
    groups={"all": {"acc": GroupMetric(members=(("arc_easy", "acc"),), by_size=True)}},
)


def published(tmp_path, files):
    folder = tmp_path / "out"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return publish(folder, str(tmp_path / "store/evaluated"))


def test_items_come_back_as_they_were_written(tmp_path):
    assert read_items(published(tmp_path, {"items.json": ITEMS.to_json()})) == ITEMS


def test_an_evaluation_of_an_older_version_has_none(tmp_path):
    assert read_items(published(tmp_path, {"report.json": "{}"})) is None


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"format": 2}, FormatError, "is of format 2"),
        ({"tasks": {"piqa": {"items": ["a", "b"], "metrics": {}}}}, None, ""),
        (
            {
                "tasks": {
                    "piqa": {"items": ["a"], "metrics": {"acc": {"kind": "mean", "values": [1, 0]}}},
                }
            },
            StorageError,
            "1 items, but 2 values",
        ),
        (
            {"texts": {"t": {"items": ["a"], "metrics": {"x": {"kind": "median", "values": [1]}}}}},
            StorageError,
            "should be 'mean', 'perplexity' or 'bits'",
        ),
    ],
)
def test_what_is_read_is_checked(tmp_path, change, error, said):
    found = published(tmp_path, {"items.json": json.dumps(json.loads(ITEMS.to_json()) | change)})
    if error is None:
        read_items(found)
        return
    with pytest.raises(error, match=said):
        read_items(found)


def test_a_metric_over_all_items_is_its_formula():
    mean = MetricItems(kind="mean", values=(1.0, 0.0, 0.5))
    words = MetricItems(kind="perplexity", values=(3.0, 5.0, 1.0), weights=(2.0, 1.0, 4.0))
    size = MetricItems(kind="bits", values=(3.0, 5.0, 1.0), weights=(2.0, 1.0, 4.0))
    assert mean.over_all() == 0.5
    assert words.over_all() == pytest.approx(math.exp(9 / 7))
    assert size.over_all() == pytest.approx(math.log2(math.exp(9 / 7)))
    assert MetricItems(kind="perplexity", values=(1000.0,)).over_all() == math.inf


def test_equal_items_are_numbered_in_their_order():
    assert numbered(["a", "b", "a", "a"]) == ("a", "b", "a#2", "a#3")


def test_figures_of_tasks_follow_from_their_items(llama, tokenizer, tmp_path):
    rows = [
        {
            "question": q,
            "correct_answer": a,
            "distractor1": "a bear",
            "distractor2": "stones",
            "distractor3": "tea",
            "support": "",
        }
        for q, a in [("What is iron?", "metal"), ("What is a hen?", "a bird"), ("What is iron?", "metal")]
    ]
    pages = [{"page": "Iron is metal .\n It rusts ."}, {"page": "A hen lays eggs in the morning ."}]
    for name, data in {"sciq": rows, "wikitext": pages}.items():
        (tmp_path / name / "test").mkdir(parents=True)
        (tmp_path / name / "test/data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    settings = EvaluationSettings(
        tasks=("sciq", "wikitext"), task_data={name: str(tmp_path / name) for name in ("sciq", "wikitext")}
    )
    found = measure_tasks(lambda: (llama, tokenizer), settings)
    sciq, wikitext = found.items.tasks["sciq"], found.items.tasks["wikitext"]
    assert sciq.items[2] == f"{sciq.items[0]}#2"
    assert set(sciq.metrics["acc"].values) <= {0.0, 1.0}
    assert wikitext.metrics["word_perplexity"].weights == (7.0, 8.0)
    for task, items in found.items.tasks.items():
        derived = {name: metric.over_all() for name, metric in items.metrics.items()}
        assert derived == pytest.approx({name: found.figures[task][name] for name in derived})
        assert {name for name in found.figures[task] if "stderr" not in name} - {"chance"} == derived.keys()
