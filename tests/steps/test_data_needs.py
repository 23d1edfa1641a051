"""The disk that prepare-data is said to take, before a run is submitted."""

import json

import pytest

from core.data.mixture import bytes_that_do, write_slices
from core.data.sampling import MOST_BYTES
from core.model.build import load_tokenizer
from core.quantities import parse_bytes
from core.steps import data_needs
from core.steps.data_needs import ROW_BYTES, data_disk_bytes, data_shortage
from pipelines.remote.submission import planned
from tests.steps.test_needs import settings_with
from tests.support.hub import Repository, run_hub

SMALL = 500


@pytest.fixture
def hub(monkeypatch):
    data_needs._sizes.cache_clear()
    repository = Repository(branches={"main": {"train.jsonl": b"x" * SMALL}})
    with run_hub(datasets={"team/lines": repository}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        yield hub
    data_needs._sizes.cache_clear()


def run_of(*sources, tokens="1b", **cluster):
    return settings_with(training__tokens=tokens, training__sources=list(sources), cluster=cluster)


def tokens_of(settings):
    training = settings.training
    return training.total_steps * training.global_batch * training.sequence_length


def test_texts_that_lie_here_leave_the_slices_alone(project):
    settings = run_of({"path": str(project / "texts.jsonl")}, tokens="20k")
    assert data_disk_bytes(settings) == ROW_BYTES * tokens_of(settings)
    assert data_disk_bytes(run_of({"path": str(project / "texts.jsonl")}, tokens="0")) == 0


def test_hub_data_sets_count_with_what_is_kept_of_them_or_less_if_they_are_small(hub, project):
    known, unknown = {"path": "team/lines", "weight": 3.0}, {"path": "team/gone", "weight": 1.0}
    settings = run_of(unknown, {"path": str(project / "texts.jsonl"), "weight": 1.0})
    slices = ROW_BYTES * tokens_of(settings)
    half = MOST_BYTES * bytes_that_do(tokens_of(settings) / 2)
    assert half > 5 * slices
    assert data_disk_bytes(settings) == half + slices
    assert data_disk_bytes(run_of(known)) == 8 * SMALL + slices
    quarter = MOST_BYTES * bytes_that_do(tokens_of(settings) / 4)
    for both in ((known, unknown), (unknown, known)):
        assert data_disk_bytes(run_of(*both)) == 8 * SMALL + quarter + slices


def test_a_slice_of_a_hub_data_set_is_downloaded_in_full(hub):
    settings = run_of({"path": "team/lines", "split": "train[:50%]"})
    assert data_disk_bytes(settings) == 9 * SMALL + ROW_BYTES * tokens_of(settings)
    assert data_disk_bytes(run_of({"path": "team/gone", "split": "train[:50%]"})) == 0


@pytest.mark.parametrize(("name", "times"), [("a.jsonl", 0), ("a.txt", 3), ("a.txt.gz", 9), ("a.parquet", 9)])
def test_files_count_with_what_is_written_of_them(hub, tmp_path, name, times):
    (tmp_path / name).write_bytes(b"x" * 1_000)
    settings = run_of({"path": str(tmp_path / name)})
    assert data_disk_bytes(settings) == times * 1_000 + ROW_BYTES * tokens_of(settings)


@pytest.mark.parametrize("path", ["package:no_such_package/x", "/nowhere/texts.txt"])
def test_texts_that_pods_alone_have_leave_an_automatic_volume_out(hub, path):
    settings, _ = planned(run_of({"path": "team/lines"}, {"path": path}, scratch="auto"))
    assert settings.cluster.of("prepare-data").scratch == ""


def test_a_hub_that_does_not_answer_is_asked_once(hub, monkeypatch):
    asked = []

    def refuse(self, path, **options):
        asked.append(path)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    settings = run_of({"path": "team/lines"}, {"path": "team/others"})
    most = 2 * MOST_BYTES * bytes_that_do(tokens_of(settings) / 2)
    for _ in range(2):
        assert data_disk_bytes(settings) == most + ROW_BYTES * tokens_of(settings)
    assert asked == ["team/lines"]


def test_an_automatic_volume_holds_it_and_one_that_is_too_small_is_a_hint(hub):
    settings, _ = planned(run_of({"path": "team/gone"}, scratch="auto"))
    given = parse_bytes(settings.cluster.of("prepare-data").scratch)
    assert given > 1.2 * data_disk_bytes(settings)
    assert list(data_shortage(settings)) == []
    own = {"prepare-data": {"scratch": "7Gi"}}
    settings, _ = planned(run_of({"path": "team/gone"}, scratch="auto", components=own))
    assert settings.cluster.of("prepare-data").scratch == "7Gi"
    (hint,) = data_shortage(settings)
    assert "GB of scratch, and its pods get 7Gi. Set cluster.components.prepare-data.scratch=" in hint
    settings, _ = planned(run_of({"path": "team/gone"}))
    assert settings.cluster.of("prepare-data").scratch == ""
    assert list(data_shortage(settings)) == []


def test_the_slices_take_what_is_said(project, tmp_path):
    texts = [{"text": f"number {n} " * 9} for n in range(400)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    settings = run_of({"path": str(tmp_path / "texts.jsonl")}, tokens="6k")
    training = settings.training
    write_slices(
        training.sources,
        load_tokenizer(project / "base"),
        sequence_length=training.sequence_length,
        sequences=[training.total_steps * training.global_batch],
        packing=training.packing,
        seed=0,
        directory=tmp_path / "out",
    )
    (file,) = (tmp_path / "out" / "slices").iterdir()
    assert data_disk_bytes(settings) <= file.stat().st_size <= data_disk_bytes(settings) + 500
