"""What belongs to nothing is found and removed; all else stays, whatever happens meanwhile."""

import contextlib
import json
import time
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest

from core.steps.finalize import run_finalize
from core.steps.prepare_data import run_prepare_data
from core.storage.garbage import PATIENCE_S, clean, find_garbage
from core.storage.interface import join_uri
from core.storage.lease import LEFT_S, TTL_S, Lease, read_lease, take_lease
from core.storage.owner import Owner
from core.storage.publication import MANIFEST, open_publication, publish
from core.storage.store import open_store
from tests.support.evidence import note
from tests.support.project import recipe_with, resolve, run_all, run_phase
from tests.support.publications import read, write
from tests.support.runs import claimed, make_run, put, snapshot
from tests.support.servers import Reply, s3_proxy

pytestmark = pytest.mark.slow

TABLE = "Leases and cleaning"
CLEANER = Owner.of("clean-test")
KEY = "0123456789ab"


def keys_of(found):
    return {file.key for piece in found.garbage for file in piece.files}


def orphans(run):
    """Keys that killed publishers and old states leave in a run that is done."""
    return {
        f"{run}/data/_UPLOADED.json",
        f"{run}/final/0a1b2c3d4e5f6071/model.safetensors",
        f"{run}/phases/01/scored/plan.json.old",
        f"{run}/phases/01/recovered/_resume/00000120/optimizer.safetensors",
        f"{run}/phases/01/recovered/_resume/00000120/{MANIFEST}",
        f"{run}/phases/03/calibrated/statistics.safetensors",
    }


def write_lease(store, run, job, *, age_s, ttl_s=TTL_S):
    """Write the lease of a pod that spoke last ``age_s`` ago."""
    lease = Lease(number=1, owner=Owner.of(job), renewed_s=time.time() - age_s, ttl_s=ttl_s)
    store.write_bytes(f"{run}/_lease/0001.json", lease.to_json())


def leave_orphans(store, run):
    for key in orphans(run):
        store.write_bytes(key, b"x" * 50)


def interrupt_write(store, key):
    """Begin a write of 5 MiB to ``key`` and never end it; return how it can be told that it is there."""
    if (root := store.local_path("")) is not None:
        folder, _, name = key.rpartition("/")
        (root / folder).mkdir(parents=True, exist_ok=True)
        part = root / folder / f".{name}.0a1b2c3d.part"
        part.write_bytes(bytes(5 << 20))
        return part.exists
    client = boto3.client("s3")
    bucket, prefix = store.uri.removeprefix("s3://").split("/")
    at = {"Bucket": bucket, "Key": f"{prefix}/{key}"}
    upload = client.create_multipart_upload(**at)["UploadId"]
    client.upload_part(**at, UploadId=upload, PartNumber=1, Body=bytes(5 << 20))

    def is_there():
        uploads = client.list_multipart_uploads(Bucket=bucket, Prefix=f"{prefix}/").get("Uploads", ())
        return upload in {entry["UploadId"] for entry in uploads}

    return is_there


def test_what_interrupted_writes_left_is_listed_apart_and_can_be_discarded(store):
    store.write_bytes("runs/a/final/there", b"12345")
    is_there = interrupt_write(store, "runs/a/final/model.safetensors")
    interrupt_write(store, "runs/b/final/model.safetensors")
    (file,) = store.stored("runs/a/")
    assert (file.key, file.size, file.upload) == ("runs/a/final/there", 5, "")
    assert abs(file.modified_s - time.time()) < 600
    (part,) = store.unfinished("runs/a/")
    assert part.size == 5 << 20
    assert abs(part.modified_s - time.time()) < 600
    assert is_there()
    store.discard(part)
    store.discard(part)
    assert not is_there()
    assert list(store.unfinished("runs/a/")) == []
    assert len(list(store.unfinished())) == 1
    assert list(store.list()) == ["runs/a/final/there"]


def test_a_run_that_is_done_loses_all_that_no_manifest_claims(store):
    run = make_run(store, KEY, done=True)
    before = snapshot(store)
    leave_orphans(store, run)
    is_there = interrupt_write(store, f"{run}/final/model.safetensors")
    store.write_bytes("jobs/old.json", json.dumps({"store": store.uri, "key": KEY}).encode())
    found = find_garbage(store)
    parts = {file.key for file in store.unfinished()}
    assert keys_of(found) == orphans(run) | {"jobs/old.json"} | parts
    removed = clean(store, found.garbage, CLEANER)
    assert {file.key for file in removed} == keys_of(found)
    assert sum(file.size for file in removed) > 5 << 20
    assert not is_there()
    assert snapshot(store) == before
    assert claimed(store) | {f"{run}/run.json", f"{run}/DONE.json"} == set(before)
    assert find_garbage(store).garbage == []
    note(TABLE, "files of rivals, states and half a transfer in a run that is done, then clean", "all gone")


def test_a_publication_whose_files_stand_in_a_folder_of_their_own_keeps_them(store, tmp_path):
    run = make_run(store, KEY, done=True)
    at = f"{run}/phases/03/calibrated"
    store.write_bytes(f"{at}/model.safetensors", b"of a rival that died")
    mine = write(tmp_path / "mine", {"model.safetensors": b"mine"})
    published = publish(mine, join_uri(store.uri, at))
    assert published.manifest.folder
    found = find_garbage(store)
    assert keys_of(found) == {f"{at}/model.safetensors"}
    clean(store, found.garbage, CLEANER)
    assert read(open_publication(join_uri(store.uri, at)).fetch(tmp_path / "fetched")) == {
        "model.safetensors": b"mine"
    }
    note(TABLE, "a publication beside the files of a rival that died, then clean", "it stays, the rest goes")


def test_what_an_interrupted_run_needs_to_go_on_stays(store):
    run = make_run(store, KEY, until=(2, "pruned"))
    state = put(store, f"{run}/phases/02/recovered/_resume/00000120", optimizer_safetensors=b"4" * 400)
    put(store, f"{run}/phases/03/calibrated/_resume/000004", stage_safetensors=b"4" * 40)
    put(store, f"{run}/phases/03/scored/_resume/training/000011", state_safetensors=b"4" * 40)
    put(store, f"{run}/generated/_resume/000128", generated_safetensors=b"4" * 40)
    needed = snapshot(store)
    store.write_bytes(f"{run}/phases/02/recovered/half.safetensors", b"5")
    store.write_bytes(f"{run}/phases/01/recovered/_resume/00000060/optimizer.safetensors", b"6")
    store.write_bytes(f"{run}/phases/01/calibrated/_resume/000004/stage.safetensors", b"7")
    found = find_garbage(store)
    assert keys_of(found) == {
        f"{run}/phases/01/calibrated/_resume/000004/stage.safetensors",
        f"{run}/phases/02/recovered/half.safetensors",
        f"{run}/phases/01/recovered/_resume/00000060/optimizer.safetensors",
    }
    clean(store, found.garbage, CLEANER)
    assert snapshot(store) == needed
    assert state.manifest.total_bytes == 400
    put(store, f"{run}/generated", generated_safetensors=b"4" * 80)
    (left,) = find_garbage(store).garbage
    assert left.reason == "the base model's own text so far that is published"
    assert {file.key.partition("/_resume/")[0] for file in left.files} == {f"{run}/generated"}
    note(TABLE, "an interrupted run with a training state, then clean", "the state stays, the rest goes")


def test_a_run_that_somebody_works_on_is_spared(store):
    run = make_run(store, KEY, until=(1, "scored"), job="worker")
    leave_orphans(store, run)
    interrupt_write(store, f"{run}/phases/01/pruned/model.safetensors")
    before = snapshot(store)
    found = find_garbage(store)
    assert found.garbage == []
    assert found.spared == {run: f"{Owner.of('worker')} works on it"}
    assert clean(store, found.garbage, CLEANER) == []
    assert snapshot(store) == before
    note(TABLE, "clean beside a run that somebody works on", "not touched; said who works on it")


def test_a_run_that_is_started_while_the_question_stands_is_spared(store, caplog):
    run = make_run(store, KEY, done=False)
    leave_orphans(store, run)
    found = find_garbage(store)
    assert keys_of(found) >= orphans(run) - {f"{run}/phases/03/calibrated/statistics.safetensors"}
    take_lease(store, run, Owner.of("worker"))
    before = snapshot(store)
    assert clean(store, found.garbage, CLEANER) == []
    assert snapshot(store) == before
    assert "job worker" in caplog.text
    note(TABLE, "a run is started between the listing of garbage and the answer yes", "not touched")


def test_what_is_written_while_the_question_stands_is_not_removed(store):
    run = make_run(store, KEY, until=(1, "scored"))
    half = f"{run}/phases/01/pruned/model.safetensors"
    store.write_bytes(half, b"half")
    found = find_garbage(store)
    assert keys_of(found) == {half}
    put(store, f"{run}/phases/01/pruned", model_safetensors=b"half")  # the publisher's rerun takes it up
    before = snapshot(store)
    assert clean(store, found.garbage, CLEANER) == []
    assert snapshot(store) == before


def test_only_what_was_shown_is_removed(store):
    run = make_run(store, KEY, done=True)
    shown, later = (f"{run}/final/{name}/model.safetensors" for name in ("shown", "later"))
    store.write_bytes(shown, b"1")
    found = find_garbage(store)
    store.write_bytes(later, b"1")
    (removed,) = clean(store, found.garbage, CLEANER)
    assert removed.key == shown
    assert keys_of(find_garbage(store)) == {later}


def test_cleaning_keeps_executions_out_meanwhile(store, monkeypatch):
    run = make_run(store, KEY)
    leave_orphans(store, run)
    seen = []
    delete = type(store).delete

    def spy(self, key):
        if "_lease" not in key:
            seen.append(read_lease(store, run).owner.job)
        delete(self, key)

    monkeypatch.setattr(type(store), "delete", spy)
    clean(store, find_garbage(store).garbage, CLEANER)
    assert set(seen) == {"clean-test"}
    assert read_lease(store, run) is None


def test_leases_and_pointers_of_dead_runs_go(store):
    dead = make_run(store, "dead00000000", job="dead")
    write_lease(store, dead, "dead", age_s=TTL_S)
    make_run(store, "live00000000", job="live")
    found = find_garbage(store)
    assert keys_of(found) == {f"{dead}/_lease/0001.json", "jobs/dead.json"}
    removed = clean(store, found.garbage, CLEANER)
    assert {file.key for file in removed} == keys_of(found)
    assert [key for key in store.list() if "_lease" in key or "jobs" in key] == [
        "jobs/live.json",
        "runs/live00000000/_lease/0001.json",
    ]
    note(TABLE, "lease and job file of an execution that ended, then clean", "gone; the run stays")


def test_a_run_one_of_whose_pods_was_told_to_end_is_left_alone_as_long_as_any_other(store):
    """Another pod may be alive and, for a moment, not have renewed the lease."""
    run = make_run(store, KEY, until=(1, "scored"), job="worker")
    half = f"{run}/phases/01/pruned/model.safetensors"
    store.write_bytes(half, b"half")
    write_lease(store, run, "worker", age_s=LEFT_S + 1, ttl_s=LEFT_S)
    found = find_garbage(store)
    assert found.garbage == []
    assert found.spared == {run: f"{Owner.of('worker')} was told to end less than ten minutes ago"}
    write_lease(store, run, "worker", age_s=TTL_S, ttl_s=LEFT_S)
    assert keys_of(find_garbage(store)) == {half, f"{run}/_lease/0001.json", "jobs/worker.json"}
    note(TABLE, "clean beside a run one of whose pods was told to end", "not touched for ten minutes")


def test_an_execution_that_has_yet_to_close_its_run_is_left_alone(store):
    run = make_run(store, KEY, done=True, job="waiting")
    write_lease(store, run, "waiting", age_s=TTL_S)
    found = find_garbage(store)
    assert found.garbage == []
    assert "has yet to close it" in found.spared[run]


def test_base_models_stay_and_what_is_half_taken_up_stays_for_a_day(store):
    put(store, "bases/whole", model_safetensors=b"7")
    store.write_bytes("bases/whole/9f8e7d6c5b4a3021/model.safetensors", b"8")
    store.write_bytes("bases/half/model.safetensors", b"9")
    is_there = interrupt_write(store, "bases/half/other.safetensors")
    assert find_garbage(store).garbage == []
    found = find_garbage(store, patience_s=0)
    parts = {file.key for file in store.unfinished()}
    assert keys_of(found) == {
        "bases/whole/9f8e7d6c5b4a3021/model.safetensors",
        "bases/half/model.safetensors",
        *parts,
    }
    assert clean(store, found.garbage, CLEANER) == []  # a day has not passed for the second look
    assert is_there()
    clean(store, found.garbage, CLEANER, patience_s=0)
    assert not is_there()
    assert sorted(store.list()) == [f"bases/whole/{MANIFEST}", "bases/whole/model.safetensors"]
    assert PATIENCE_S == 24 * 3600
    note(TABLE, "a base model half taken up, then clean", "left alone for a day; whole ones stay")


FOREIGN = (
    "notes.txt",
    "runs/readme.txt",
    f"runs/{KEY}/notes.txt",
    f"runs/{KEY}/phases/01/mine/plan.json",
    f"runs/{KEY}/_lease/notes.txt",
    "jobs/mine.json",
    "jobs/deeper/mine.json",
    "bases/mine",
    "data/corpus.jsonl",
)


def test_files_outside_of_the_layout_are_spared_and_told_of(store):
    make_run(store, KEY, done=True)
    for key in FOREIGN:
        store.write_bytes(key, b"mine")
    before = snapshot(store)
    found = find_garbage(store, patience_s=0)
    assert found.garbage == []
    assert sorted(found.foreign) == sorted(FOREIGN)
    clean(store, found.garbage, CLEANER, patience_s=0)
    assert snapshot(store) == before
    note(TABLE, "somebody's own files in a store, then clean", "not touched; said which", len(FOREIGN))


@pytest.mark.parametrize("key", ["../../etc", "a/b", "..", "", "a\nb"])
def test_a_pointer_that_leads_elsewhere_is_foreign(tmp_path, key):
    store = open_store(tmp_path / "store")
    store.write_bytes("jobs/evil.json", json.dumps({"key": key}).encode())
    found = find_garbage(store, patience_s=0)
    assert (found.garbage, found.foreign) == ([], ["jobs/evil.json"])


def test_what_is_damaged_is_left_for_people(store):
    run = make_run(store, KEY, done=True)
    store.write_bytes(f"{run}/data/{MANIFEST}", b"{")
    store.write_bytes(f"{run}/data/loose", b"1")
    put(store, "runs/headless/data", slice_safetensors=b"1")
    store.write_bytes("runs/headless/data/loose", b"1")
    before = snapshot(store)
    found = find_garbage(store, patience_s=0)
    assert found.garbage == []
    assert found.spared == {
        f"{run}/data": "its manifest is damaged",
        "runs/headless": "it has no run.json",
    }
    clean(store, found.garbage, CLEANER, patience_s=0)
    assert snapshot(store) == before


def test_a_link_that_leads_out_of_the_store_is_removed_and_not_followed(tmp_path):
    store = open_store(tmp_path / "store")
    run = make_run(store, KEY, done=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    (tmp_path / "store" / run / "final/folder").symlink_to(outside)
    (tmp_path / "store" / run / "final/file").symlink_to(outside / "precious")
    found = find_garbage(store)
    assert keys_of(found) == {f"{run}/final/file"}
    clean(store, found.garbage, CLEANER)
    assert (outside / "precious").read_text() == "mine"


def test_uploads_that_may_not_be_listed_stop_no_cleaning(s3_server, s3_store_uri, monkeypatch, caplog):
    store = open_store(s3_store_uri)
    run = make_run(store, KEY, done=True)
    leave_orphans(store, run)

    def deny_listing_uploads(request, forward):
        if request.method == "GET" and "uploads" in parse_qs(urlsplit(request.path).query, True):
            return Reply(status=403, body=b"<Error><Code>AccessDenied</Code></Error>")
        return forward()

    with s3_proxy(s3_server, deny_listing_uploads) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        denied = open_store(s3_store_uri)
        clean(denied, find_garbage(denied).garbage, CLEANER)
    assert "incomplete uploads are not looked for" in caplog.text
    assert "AccessDenied" in caplog.text
    assert not orphans(run) & set(store.list())
    note(TABLE, "the server denies the listing of incomplete uploads", "said; the rest is cleaned")


@pytest.mark.parametrize("keep", ["last", "2"])
def test_finalize_of_a_run_leaves_no_orphan(store, project, tmp_path, keep):
    recipe = recipe_with({"storage.store": store.uri, "storage.keep": keep})
    with contextlib.chdir(project):
        handle, base_uri = resolve(recipe, job="job")
        run = f"runs/{handle['key']}"
        data_uri = run_prepare_data(run=handle, base_uri=base_uri)
        run_phase(handle, 1, base_uri, data_uri, tmp_path)
        leave_orphans(store, run)
        interrupt_write(store, f"{run}/phases/02/pruned/model.safetensors")
        store.write_bytes("jobs/killed.json", json.dumps(handle).encode())
        run_finalize(store=store.uri, job="job", succeeded=False)
        assert orphans(run) <= set(store.list())  # a run that failed keeps what it has
        assert not [key for key in store.list() if "_lease" in key or key == "jobs/job.json"]
        handle, _ = run_all(recipe, tmp_path)
    present, gone = {key for key in store.list() if not key.startswith("answers/")}, ()
    if keep == "last":
        gone = [f"{run}/phases/{phase}/{step}/" for phase in ("01", "02") for step in ("pruned", "recovered")]
    if keep == "2":
        gone = [f"{run}/phases/01/{step}/" for step in ("pruned", "recovered")]
    expected = {
        key
        for key in claimed(store)
        if not key.startswith(tuple(gone)) or key.endswith((f"/{MANIFEST}", "/report.json"))
    }
    assert present == expected | {f"{run}/run.json", f"{run}/DONE.json"}
    assert list(store.unfinished()) == []
    found = find_garbage(store)
    assert (found.garbage, found.spared, found.foreign) == ([], {}, [])
    where = "S3" if store.local_path("") is None else "a folder"
    note(TABLE, f"a run with killed publishers and old states ends, on {where}", "no orphan is left")
