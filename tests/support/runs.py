"""Small runs in a store, published as steps publish theirs; and what their manifests claim, read apart."""

import json
import tempfile
from pathlib import Path

from core.storage.interface import join_uri
from core.storage.lease import take_lease
from core.storage.owner import Owner
from core.storage.publication import publish

STEPS = ("calibrated", "scored", "pruned", "recovered", "evaluated")
NAME, BASE, TARGET = "trial", "user/base", "75%"


def put(store, place, **files):
    """Publish files, named ``name_suffix``, at a place of the store."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name.replace("_", ".")).write_bytes(content)
        return publish(Path(folder), join_uri(store.uri, place))


def make_run(store, key, *, phases=2, until=(2, "evaluated"), done=False, job=None, ttl_s=600):
    """Write a run that has come as far as a step of a phase; ``job`` holds its lease."""
    run = f"runs/{key}"
    settings = {"name": NAME, "model": {"base": BASE}, "prune": {"target": TARGET}}
    told = {"settings": settings, "phase_params": list(range(phases))}
    store.write_bytes(f"{run}/run.json", json.dumps(told).encode())
    put(store, f"{run}/data", slice_safetensors=b"1" * 100, report_json=b"{}")
    steps = [(phase, step) for phase in range(1, phases + 1) for step in STEPS]
    for phase, step in steps[: steps.index(until) + 1] if until else ():
        put(store, f"{run}/phases/{phase:02d}/{step}", model_safetensors=b"2" * 200, report_json=b"{}")
    if done:
        put(store, f"{run}/final", model_safetensors=b"3" * 300, report_html=b"<p>")
        store.write_bytes(f"{run}/DONE.json", b"{}")
    if job:
        store.write_bytes(f"jobs/{job}.json", json.dumps({"store": store.uri, "key": key}).encode())
        take_lease(store, run, Owner.of(job), ttl_s=ttl_s)
    return run


def claimed(store):
    """Every manifest, and every key that one lists."""
    found = set()
    for key in store.list():
        folder, _, name = key.rpartition("/")
        if name == "MANIFEST.json":
            manifest = json.loads(store.read_bytes(key))
            within = [folder, *filter(None, [manifest["folder"]])]
            found |= {key, *("/".join([*within, entry["path"]]) for entry in manifest["files"])}
    return found


def snapshot(store):
    """Every key and its content."""
    return {key: store.read_bytes(key) for key in store.list()}
