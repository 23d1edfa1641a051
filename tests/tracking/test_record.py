import dataclasses
import json

import pytest

from core.errors import StorageError
from core.redaction import without_password
from core.runs.record import LayerSizes, PhaseRecord, RunRecord, accuracies, headline_metric, perplexity_text
from core.steps.publish import _headlines


@pytest.fixture
def record():
    dense = PhaseRecord(
        phase=0,
        params=134_515_008,
        target_params=134_515_008,
        layers=(
            LayerSizes(query_heads=9, kv_heads=3, mlp_width=1536),
            LayerSizes(query_heads=9, kv_heads=3, mlp_width=1536),
        ),
        perplexity=24.25,
        tasks={"arc_easy": {"acc": 0.5, "acc_norm": 0.375}},
        seconds={"evaluate": 61.5},
    )
    first = PhaseRecord(
        phase=1,
        params=120_000_384,
        target_params=120_000_000,
        layers=(
            LayerSizes(query_heads=6, kv_heads=2, mlp_width=1211),
            LayerSizes(query_heads=9, kv_heads=3, mlp_width=1400),
        ),
        importance=(-1.0, 0.25),
        sparsity=(0.21, 0.09),
        perplexity_pruned=61.0,
        perplexity=37.5,
        tokens=20_480,
        losses=((1, 3.5, 1e-5), (2, 3.25, 2e-5)),
        seconds={"calibrate": 14.0},
    )
    return RunRecord(
        key="3f9a",
        name="demo",
        base="org/model",
        revision="abc",
        settings={"seed": 0, "prune": {"target": "108M", "amplitude": 0.02}, "training": {"sources": []}},
        phases=(dense, first),
        checkpoint_uri="/store/x",
        tracking_uri="sqlite:////m.db",
        tracking_run="f00",
    )


def test_a_record_survives_json(record):
    assert RunRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_the_mean_over_benchmarks_is_one_of_accuracies(record):
    *before, last = record.phases
    tasks = {"a": {"acc": 0.5}, "wikitext": {"word_perplexity": 35.0}, "both": {"average": 0.9}}

    def headlines(more):
        phase = dataclasses.replace(last, tasks=tasks | more)
        return _headlines(dataclasses.replace(record, phases=(*before, phase)))

    assert headlines({"b": {"acc_norm": 0.3}})["mean accuracy"] == pytest.approx(0.4)
    assert "mean accuracy" not in headlines({})


def test_ints_that_came_back_as_floats_are_made_whole(record):
    def floats(value):
        if isinstance(value, dict):
            return {k: floats(v) for k, v in value.items()}
        if isinstance(value, list):
            return [floats(v) for v in value]
        return float(value) if isinstance(value, int) else value

    back, phases = RunRecord.from_dict(floats(record.to_dict())), record.to_dict()["phases"]
    assert back == record
    assert json.dumps(back.to_dict()["phases"]) == json.dumps(phases)  # 9.0 == 9, but is not written like it


def test_a_count_that_is_not_whole_is_refused(record):
    data = record.to_dict()
    data["phases"][0]["params"] = 1.5
    with pytest.raises(StorageError, match=r"phases\.0\.params: Input should be a valid integer"):
        RunRecord.from_dict(data)
    del data["phases"][0]["layers"], data["phases"][0]["params"]
    with pytest.raises(StorageError, match=r"phases\.0\.params: Field required; phases\.0\.layers: Field"):
        RunRecord.from_dict(data)


def test_what_was_not_measured_may_be_missing():
    dense = {"phase": 0, "params": 5, "target_params": 5, "layers": []}
    (phase,) = RunRecord.from_dict({"key": "k", "name": "n", "base": "b", "phases": [dense]}).phases
    assert phase.perplexity is None
    assert phase.tasks == {}
    assert RunRecord.from_dict({"key": "k", "name": "n", "base": "b"}).phases == ()


def test_changing_the_dict_does_not_change_the_record(record):
    data = record.to_dict()
    data["phases"][0]["tasks"]["arc_easy"]["acc"] = 0.9
    data["settings"]["seed"] = 7
    assert record.phases[0].tasks["arc_easy"]["acc"] == 0.5
    assert record.settings["seed"] == 0


def test_a_run_without_training_tokens_is_not_trained(record):
    assert record.trained
    assert not RunRecord(key="", name="", base="", phases=record.phases[:1]).trained


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"acc": 0.5, "acc_norm": 0.4}, ("acc_norm", 0.4)),
        ({"acc_stderr,none": 0.01, "acc,none": 0.5, "acc_norm,none": 0.4}, ("acc_norm", 0.4)),
        ({"acc_stderr": 0.01, "acc": 0.5}, ("acc", 0.5)),
        ({"word_perplexity,none": 21.0}, ("word_perplexity", 21.0)),
        ({"f1_stderr": 0.1, "f1": 0.7}, ("f1", 0.7)),
        ({"f1_stderr": 0.1}, None),
        ({}, None),
    ],
)
def test_one_metric_stands_for_a_task(metrics, expected):
    assert headline_metric(metrics) == expected


def test_perplexities_and_scores_of_other_kinds_are_no_accuracies():
    phase = PhaseRecord(
        phase=0,
        params=1,
        target_params=1,
        layers=(),
        tasks={
            "wikitext": {"word_perplexity": 9.0},
            "q": {"acc": 0.3},
            "preset": {"average": 0.4},
            "truthfulqa_gen": {"bleu_max": 25.3},
            "sums": {"exact_match,strict-match": 0.2},
            "more sums": {"exact_match_get-answer": 0.1},
        },
    )
    assert accuracies(phase) == {"q": 0.3, "sums": 0.2, "more sums": 0.1}
    assert headline_metric(phase.tasks["preset"]) == ("average", 0.4)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (24.126, "24.13"),
        (99.996, "100"),
        (153.4, "153"),
        (420_000.0, "4.2e+05"),
        (None, "-"),
        (float("nan"), "-"),
        (float("inf"), "infinite"),
    ],
)
def test_perplexities_are_short(value, text):
    assert perplexity_text(value) == text


def test_passwords_in_uris_are_hidden():
    assert without_password("http://me:s3cret@host:5000/x") == "http://me:***@host:5000/x"
    assert (
        without_password("postgresql+psycopg2://u:p@h/db, s3://b/k")
        == "postgresql+psycopg2://u:***@h/db, s3://b/k"
    )
    assert without_password("http://host:5000/a@b") == "http://host:5000/a@b"
    for password in ("p@ss", "p/ss", "12345", "p:ss", ""):
        assert without_password(f"http://me:{password}@host/x") == "http://me:***@host/x"
    assert without_password("https://hf_token@host/x") == "https://***@host/x"
    assert (
        without_password("pg://host/db?user=me&password=s3cret&x=1")
        == "pg://host/db?user=me&password=***&x=1"
    )
    for harmless in (
        "s3://bucket/a@b",
        "file:///home/me@work/x",
        "sqlite:////tmp/a@b/x.db",
        "http://h:1?a=b@c",
    ):
        assert without_password(harmless) == harmless
