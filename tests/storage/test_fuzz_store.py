import json

import pytest
from hypothesis import given

from core.model.build import model_shape
from core.model.config import load_config
from core.model.shape import LayerShape
from core.pruning.plan import LayerPlan, Plan
from core.runs.overview import list_runs
from core.runs.run import Run
from core.steps.finalize import run_finalize
from core.storage.lease import Lease, read_lease
from core.storage.manifest import FileEntry, Manifest
from core.storage.owner import Owner
from core.storage.publication import publish
from core.storage.store import open_store
from core.training.state import read_state
from tests.support.evidence import note
from tests.support.fuzzing import FILES, examples, fuzz_file, fuzzed, outcome, variant
from tests.support.project import RECIPE

SHAPE = LayerShape(query_heads=6, kv_heads=3, mlp_width=40)


def test_changed_manifests_are_read_or_refused(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_text("a")
    document = json.loads(publish(tmp_path / "files", str(tmp_path / "store")).manifest.to_json())
    path = tmp_path / "MANIFEST.json"
    fuzz_file("MANIFEST.json", path, document, lambda: Manifest.from_json(path.read_bytes()), share=3)


@pytest.fixture
def run_file(project, tmp_path):
    """A store with a run, and the content of its run.json."""
    from core.settings.recipe import settings_from_dict

    dense = model_shape(load_config(project / "base"))
    Run(
        store=str(tmp_path / "store"),
        key="key",
        settings=settings_from_dict(RECIPE),
        revision="r",
        base_uri="b",
        dense=dense,
        phase_params=(3, 2),
        job="j",
    ).save()
    path = tmp_path / "store" / "runs" / "key" / "run.json"
    return path, json.loads(path.read_text())


def test_changed_run_files_are_read_or_refused(run_file):
    path, document = run_file
    store = str(path.parents[2])

    def read():
        list_runs(open_store(store))
        Run.load({"store": store, "key": "key"})

    fuzz_file("run.json", path, document, read, share=3)


def test_changed_job_files_are_read_or_refused(run_file):
    store = run_file[0].parents[2]
    path, document = store / "jobs" / "j.json", {"store": str(store), "key": "key", "job": "j"}

    def read():
        run_finalize(store=str(store), job="j", succeeded=False)

    fuzz_file("the file of an execution", path, document, read)


def test_changed_plans_are_read_or_refused(tmp_path):
    layer = LayerPlan(query_heads=(0, 1), kv_heads=(0,), mlp_channels=(0, 2, 3))
    plan = Plan(
        layers=(layer, layer),
        before=(SHAPE, SHAPE),
        checkpoint="c",
        statistics="s",
        importance=(0.1, 0.2),
        sparsity=(0.3, 0.4),
        params_before=9,
        params_after=5,
        target_params=5,
    )
    plan.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())

    def read():
        Plan.load(tmp_path / "plan.json").check("c", (SHAPE, SHAPE))

    fuzz_file("plan.json", tmp_path / "plan.json", document, read, share=3)


def test_changed_training_states_are_read_or_refused(tmp_path):
    progress = {"losses": [[3, 1.5, 0.1], [4, 1.4, 0.1]], "trained_tokens": 9, "seconds": 0.5}
    document = {"format": 1, "shards": 1, "progress": progress, "belongs_to": {"a": "b"}}
    path = tmp_path / "state.json"
    fuzz_file("state.json of a training", path, document, lambda: read_state(tmp_path), share=3)


def test_changed_leases_expire_or_hold(run_file):
    store = open_store(str(run_file[0].parents[2]))
    lease = Lease(number=1, owner=Owner.of("j"), renewed_s=1e9)
    document = json.loads(lease.to_json())

    @fuzzed(3)
    @given(FILES)
    def attempt(how):
        store.write_bytes("runs/key/_lease/0001.json", variant(document, how))
        assert not outcome(lambda: (read_lease(store, "runs/key").is_live(), list_runs(store)))

    attempt()
    note("Security", "files of a lease, changed and damaged", "the lease counts, or has expired", examples(3))


def test_changed_notes_of_an_upload_do_no_harm(s3_store_uri, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    document = {"a.txt": FileEntry.of(tmp_path, "a.txt").sha256, "b.txt": "0" * 64}
    number = iter(range(10**6))

    @fuzzed(0.3)
    @given(FILES)
    def attempt(how):
        uri = f"{s3_store_uri}/{next(number)}"
        open_store(uri).write_bytes("_UPLOADED.json", variant(document, how))
        assert not outcome(lambda: publish(tmp_path, uri))
        assert open_store(uri).exists("MANIFEST.json")

    attempt()
    note(
        "Security",
        "_UPLOADED.json, changed and damaged",
        "the files were published all the same",
        examples(0.3),
    )
