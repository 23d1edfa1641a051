"""The registry on SQLite: what registering leaves, who moves an alias, and the rule of promotion."""

import contextlib
import dataclasses
import threading

import pytest
from click.testing import CliRunner

from core.errors import SettingsError
from core.evaluation.items import GroupMetric, ItemResults, Items, MetricItems
from core.evaluation.observed import can_be_averaged, observed
from core.settings.registry import RegistrySettings
from core.settings.storage import TrackingSettings
from core.steps.promotion import decide, headlines, promote
from core.storage.publication import publish
from core.tracking import registry as registry_module
from core.tracking.registry import CHAMPION, EVALUATED, MEASURED, Registry, Version
from pipelines.cli import main
from tests.support.registry import candidate


@pytest.fixture
def name(request):
    return request.node.originalname


def test_registering_makes_a_candidate_whose_figures_are_those_of_the_last_phase(uri, name):
    tracker, version = candidate(uri, name, "one", perplexity=37.25, params=100)
    client = tracker.client
    found = client.get_model_version_by_alias(name, "candidate")
    assert (str(found.version), found.source) == (version, "s3://models/runs/one/final")
    assert found.run_id == tracker.parent_run_id
    parent = client.get_run(tracker.parent_run_id)
    (model,) = [
        model
        for model in client.search_logged_models([parent.info.experiment_id])
        if model.tags["checkpoint_uri"] == "s3://models/runs/one/final"
    ]
    assert (model.status, model.params) == ("READY", {"base": "b"})
    assert {m.key: (m.value, m.step) for m in model.metrics} == {"perplexity": (37.25, 2), "params": (100, 2)}
    assert {m.key: m.dataset_name for m in model.metrics} == {"perplexity": "c4", "params": None}
    assert [output.model_id for output in parent.outputs.model_outputs] == [model.model_id]
    points = client.get_metric_history(tracker.parent_run_id, "perplexity")
    assert [(point.step, point.value) for point in points] == [(2, 37.25)]  # the series has no point more

    assert candidate(uri, name, "one", perplexity=37.25)[1] == version
    again = client.get_run(tracker.parent_run_id)
    assert len(again.outputs.model_outputs) == 1
    newer = candidate(uri, name, "two", perplexity=30.0)[1]
    assert int(newer) == int(version) + 1
    assert str(client.get_model_version_by_alias(name, "candidate").version) == newer


def test_of_two_that_promote_at_once_the_second_compares_again(uri, name, monkeypatch):
    """Both have compared with the same champion; each looks at the alias once the other does, if it can."""
    champion = candidate(uri, name, "old", perplexity=30.0)[1]
    rivals = [candidate(uri, name, key, perplexity=29.0)[1] for key in ("left", "right")]
    registry = Registry(uri, name)
    assert registry.move(CHAMPION, champion, expected="")
    together, moved = threading.Barrier(2), {}
    find = Registry.find

    def find_together(self, which):
        found = find(self, which)
        with contextlib.suppress(threading.BrokenBarrierError):  # the other one waits for its turn
            together.wait(timeout=1.5)
        return found

    monkeypatch.setattr(Registry, "find", find_together)

    def move(version):
        moved[version] = Registry(uri, name).move(CHAMPION, version, expected=champion)

    threads = [threading.Thread(target=move, args=[version]) for version in rivals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(moved.values()) == [False, True]
    monkeypatch.undo()
    assert moved[registry.find(CHAMPION).number]
    assert registry.client.get_registered_model(name).tags == {}, "no claim is left"


def test_a_claim_of_a_dead_process_stops_nobody(uri, name):
    version = candidate(uri, name, "only", perplexity=30.0)[1]
    registry = Registry(uri, name)
    registry.client.set_registered_model_tag(name, "adapt_pruner.moving.dead", "1000")
    assert registry.move(CHAMPION, version, expected="")
    assert registry.client.get_registered_model(name).tags == {}
    registry.client.set_registered_model_tag(name, "adapt_pruner.moving.live", "99999999999")
    registry_module._PATIENCE_S, before = 0.0, registry_module._PATIENCE_S
    try:
        with pytest.raises(registry_module.TrackingError, match=f"Others are promoting {name}"):
            registry.move(CHAMPION, version, expected=version)
    finally:
        registry_module._PATIENCE_S = before


def test_the_decision_is_in_the_registry_and_on_the_runs_page(uri, name):
    first = candidate(uri, name, "first", perplexity=30.0)[1]
    registry = Registry(uri, name)
    dry = promote(registry, RegistrySettings(), "candidate", dry_run=True)
    assert (dry.promoted, registry.find(CHAMPION)) == (True, None)
    assert not promote(registry, RegistrySettings(first=False), "candidate").promoted
    assert promote(registry, RegistrySettings(), "candidate").verdict == "no champion"
    assert registry.find(CHAMPION).number == first
    assert promote(registry, RegistrySettings(), "candidate").verdict == "is the champion"

    worse, version = candidate(uri, name, "worse", perplexity=31.0)
    decision = promote(registry, RegistrySettings(), "candidate")
    assert (decision.promoted, decision.verdict) == (False, "worse"), decision.sentence
    assert registry.find(CHAMPION).number == first
    found = registry.client.get_model_version(name, version)
    assert found.tags["adapt_pruner.decision"] == "not promoted"
    assert found.tags["adapt_pruner.decided_against"] == first
    assert "3.3 % worse in perplexity" in found.description
    assert "| perplexity | 31.00 | 30.00 |" in found.description
    files = worse.client.list_artifacts(worse.parent_run_id, "promotion")
    names = [f"promotion/version-{version}-against-version-{first}.{kind}" for kind in ("json", "md")]
    assert sorted(file.path for file in files) == names

    assert promote(registry, RegistrySettings(margin=0.05), "candidate").promoted
    assert registry.find(CHAMPION).number == version
    # The older run publishes again: it was decided on, and does not take the place back.
    assert promote(registry, RegistrySettings(margin=1.0), first, again=False).verdict == "decided before"
    assert registry.find(CHAMPION).number == version


def of(number, measured="m", **metrics):
    tags = {"adapt_pruner.measured": measured} if measured else {}
    return Version(number=number, checkpoint_uri="", run_id="", tags=tags, metrics=metrics)


def accuracy(task, value, error=None):
    figures = {f"{task}/acc_norm_none": value, f"{task}/acc_none": 0.1, f"{task}/acc_stderr_none": 0.5}
    return figures | ({} if error is None else {f"{task}/acc_norm_stderr_none": error})


@pytest.mark.parametrize(
    ("metric", "candidate", "champion", "verdict", "says"),
    [
        ("perplexity", {"perplexity": 30.2}, {"perplexity": 30.0}, "not worse", "0.67 % worse"),
        ("perplexity", {"perplexity": 31.0}, {"perplexity": 30.0}, "worse", "margin of 1 % is exceeded"),
        ("perplexity", {"perplexity": 20.0}, {"perplexity": 30.0}, "not worse", "33 % better"),
        ("perplexity", {}, {"perplexity": 30.0}, "not comparable", "has no perplexity"),
        # 1.96 * hypot(0.003, 0.004) = 0.0098: the interval is worse by 0.0098 above the difference
        ("arc", accuracy("arc", 0.5, 0.003), accuracy("arc", 0.5, 0.004), "not worse", "standard errors"),
        ("arc", accuracy("arc", 0.499, 0.003), accuracy("arc", 0.5, 0.004), "not certain", "More items"),
        ("arc", accuracy("arc", 0.47, 0.003), accuracy("arc", 0.5, 0.004), "worse", "all of it beyond"),
        ("arc", accuracy("arc", 0.49), accuracy("arc", 0.5), "not worse", "1 points"),
        ("piqa", accuracy("arc", 0.5), accuracy("arc", 0.5), "not comparable", "its tasks are arc"),
        # the mean of two has errors of hypot(a, b) / 2
        (
            "accuracy",
            accuracy("arc", 0.6, 0.004) | accuracy("piqa", 0.4, 0.003),
            accuracy("arc", 0.5, 0.004) | accuracy("piqa", 0.5, 0.003),
            "not worse",
            "(95 % interval: 0.69 points better to 0.69 points worse)",
        ),
    ],
)
def test_the_rule(metric, candidate, champion, verdict, says):
    rule = RegistrySettings(metric=metric, margin=0.01)
    decision = decide("m", rule, of("5", **candidate), of("3", **champion))
    assert decision.verdict == verdict, decision.sentence
    assert decision.promoted == (verdict == "not worse")
    assert says in decision.to_markdown()
    assert decision.sentence.startswith("Version 5 is")


def measured_at(folder, name, items):
    """Publish results by item as evaluate does; return a version's tags that lead to them."""
    (folder / name).mkdir()
    (folder / name / "items.json").write_text(items.to_json())
    publish(folder / name, str(folder / f"{name}-published"))
    return {EVALUATED: str(folder / f"{name}-published"), MEASURED: "m"}


def test_items_of_a_metric_by_a_filter_are_compared_in_pairs(tmp_path):
    def version(number, right):
        values = tuple(float(i < right) for i in range(200))
        metrics = {"exact_match_get-answer": MetricItems(kind="mean", values=values)}
        items = Items(tasks={"bbh": ItemResults(items=tuple(map(str, range(200))), metrics=metrics)})
        figures = {"bbh/exact_match_get-answer": right / 200, "bbh/exact_match_stderr_get-answer": 0.03}
        return version_with(number, measured_at(tmp_path, f"v{number}", items), **figures)

    newer, champion = version("5", 99), version("3", 100)
    for metric in ("accuracy", "bbh"):
        found = decide("m", RegistrySettings(metric=metric, margin=0.01), newer, champion)
        assert "200 items" in found.comparison.how


def version_with(number, tags, **metrics):
    return dataclasses.replace(of(number, **metrics), tags=tags)


def test_results_by_item_are_compared_in_pairs(tmp_path):
    """Windows whose losses differ widely, but whose differences do not: only pairs can tell."""
    names = tuple(f"w{i}" for i in range(64))
    losses = [100.0 + 50 * (i % 8) for i in range(64)]

    def text(more, ids=names, weight=100.0):
        spread = 0.3 if more else 0.0
        values = tuple(loss + more + (i % 3 - 1) * spread for i, loss in enumerate(losses[: len(ids)]))
        metric = MetricItems(kind="perplexity", values=values, weights=(weight,) * len(ids))
        items = ItemResults(items=ids, metrics={"perplexity": metric})
        return Items(texts={"perplexity": items}), metric.over_all()

    rule = RegistrySettings(margin=0.01)
    base, dense = text(0.0)
    champion = version_with("3", measured_at(tmp_path, "champion", base), perplexity=dense)
    for more, verdict in ((0.5, "not worse"), (2.0, "worse"), (0.98, "not certain"), (-5.0, "not worse")):
        items, perplexity = text(more)
        tags = measured_at(tmp_path, f"{verdict}{more}", items)
        found = decide("m", rule, version_with("5", tags, perplexity=perplexity), champion)
        assert found.verdict == verdict, found.sentence
        assert "paired bootstrap over the 64 windows" in found.to_markdown()
        assert found.comparison.worse == pytest.approx(perplexity / dense - 1)
        assert found.comparison.low <= found.comparison.worse <= found.comparison.high
    for name, changes, says in (
        ("few", {"ids": names[:5]}, "5 windows only"),
        ("others", {"ids": tuple(f"x{i}" for i in range(64))}, "no item in common"),
        ("tokenizer", {"weight": 90.0}, "tokenizer"),
    ):
        items, perplexity = text(0.0, **changes)
        tags = measured_at(tmp_path, name, items)
        found = decide("m", rule, version_with("5", tags, perplexity=perplexity), champion)
        assert found.verdict == "not comparable"
        assert says in found.sentence
    gone = version_with("5", {EVALUATED: str(tmp_path / "nowhere")}, perplexity=perplexity)
    assert "difference alone" in decide("m", rule, gone, champion).to_markdown()


def test_accuracy_is_compared_on_the_items_of_all_tasks(tmp_path):
    def results(right, count):
        names, values = tuple(map(str, range(count))), tuple(float(i < right) for i in range(count))
        wrong = MetricItems(kind="mean", values=(0.0,) * count)
        return ItemResults(
            items=names, metrics={"acc": wrong, "acc_norm": MetricItems(kind="mean", values=values)}
        )

    def version(number, **right):
        items = Items(tasks={task: results(n, 200) for task, n in right.items()})
        figures = {f"{task}/acc_norm_none": n / 200 for task, n in right.items()}
        return version_with(number, measured_at(tmp_path, f"v{number}", items), **figures)

    champion = version("3", arc=100, piqa=120)
    rule = RegistrySettings(metric="accuracy", margin=0.02)
    same, worse = version("5", arc=100, piqa=120), version("6", arc=80, piqa=120)
    found = decide("m", rule, same, champion)
    assert (found.verdict, found.comparison.low, found.comparison.high) == ("not worse", 0.0, 0.0)
    found = decide("m", rule, worse, champion)
    assert found.verdict == "worse"
    assert found.comparison.worse == pytest.approx(0.05)
    assert "400 items" in found.comparison.how
    found = decide("m", RegistrySettings(metric="arc", margin=0.2), worse, champion)
    assert (found.verdict, found.comparison.worse) == ("not worse", pytest.approx(0.1))
    assert "200 items" in found.comparison.how


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_counts_as_one_task_and_not_as_its_members(tmp_path, by_size):
    """A tenth of a point gained in each of 57 members does not outweigh 20 lost in the other task."""
    members = [f"mmlu_{i}" for i in range(57)]

    def version(number, arc, each):
        def results(right):
            values = MetricItems(kind="mean", values=tuple(float(i < right) for i in range(100)))
            return ItemResults(items=tuple(map(str, range(100))), metrics={"acc": values})

        group = GroupMetric(members=tuple((name, "acc") for name in members), by_size=by_size)
        tasks = {"arc": results(arc)} | {name: results(each) for name in members}
        items = Items(tasks=tasks, groups={"mmlu": {"acc": group}})
        figures = {"arc/acc_none": arc / 100, "mmlu/acc_none": each / 100}
        return version_with(number, measured_at(tmp_path, f"v{number}", items), **figures)

    better_in_mmlu, champion = version("5", 40, 31), version("3", 60, 30)
    found = decide("m", RegistrySettings(metric="accuracy", margin=0.02), better_in_mmlu, champion)
    assert found.verdict == "worse"
    assert found.comparison.worse == pytest.approx(0.095)
    # Members that count alike have a list each, of which the mean of two tasks cannot be drawn.
    assert ("5800 items" in found.comparison.how) == by_size
    found = decide("m", RegistrySettings(metric="mmlu", margin=0.0), better_in_mmlu, champion)
    assert (found.verdict, found.comparison.worse) == ("not worse", pytest.approx(-0.01))
    assert "5700 items" in found.comparison.how


def test_a_mean_over_a_group_and_a_member_of_it_is_not_drawn_in_pairs():
    """The member's items are in both lists: drawn twice, they would make the mean look surer than it is."""
    values = MetricItems(kind="mean", values=(1.0, 0.0))
    results = ItemResults(items=("0", "1"), metrics={"acc": values})
    group = GroupMetric(members=(("part", "acc"), ("other", "acc")), by_size=True)
    tasks = {"part": results, "other": results, "arc": results}
    items = Items(tasks=tasks, groups={"all": {"acc": group}})

    def averaged(*names):
        return can_be_averaged(items, {name: observed(items, name, "acc") for name in names})

    assert averaged("all", "arc")
    assert averaged("part", "other", "arc")
    assert not averaged("all", "part")


def test_what_was_measured_otherwise_is_not_compared():
    for measured, verdict in (("other", "not comparable"), ("", "not worse"), ("m", "not worse")):
        versions = of("5", perplexity=30.0), of("3", measured, perplexity=30.0)
        assert decide("m", RegistrySettings(), *versions).verdict == verdict


def test_headlines_are_those_of_the_report():
    metrics = {"a/acc_none": 0.5, "a/acc_stderr_none": 0.1, "b/exact_match_strict-match": 0.25, "params": 3}
    metrics |= {"c/acc": 0.1, "c/acc_norm": 0.2, "c/acc_norm_stderr": 0.3, "speedup/torch/load": 2.0}
    metrics |= {"d/exact_match_b": 0.3, "d/exact_match_a": 0.4, "d/exact_match_stderr_a": 0.05}
    assert headlines(metrics) == {"a": (0.5, 0.1), "b": (0.25, None), "c": (0.2, 0.3), "d": (0.4, 0.05)}


def test_a_name_with_a_dot_is_a_models(uri, name):
    assert candidate(uri, "Llama-3.2-1B 80%", "one", perplexity=30.0)[1] == "1"


@pytest.mark.parametrize("wrong", ["org/model", "a:b", "it's", 'a"b', " a"])
def test_a_name_that_mlflow_does_not_take_is_refused_before_anything_runs(wrong):
    with pytest.raises(SettingsError, match="must hold no slash, colon or quote"):
        TrackingSettings(model_name=wrong)


def test_the_command_prints_the_decision_and_its_exit_status_tells_it(uri, name):
    def called(*arguments):
        return CliRunner().invoke(main, ["promote", name, "--tracking-uri", uri, *arguments])

    candidate(uri, name, "first", perplexity=30.0)
    assert called("--no-first").exit_code == 3
    assert called("--dry-run").output.endswith("there was no champion. Nothing was changed.\n")
    assert called().exit_code == 0
    candidate(uri, name, "worse", perplexity=31.0)
    refused = called("--margin", "0.03")
    assert refused.exit_code == 3
    assert "31.00" in refused.output
    assert "Version 2 is not promoted: it is 3.3 % worse in perplexity than version 1" in refused.output
    assert called("--margin", "0.04").exit_code == 0
    missing = called("--version", "7")
    assert missing.exit_code == 1
    assert f"error: {name} has no version 7" in missing.output
    assert dataclasses.asdict(Registry(uri, name).find(CHAMPION))["number"] == "2"
