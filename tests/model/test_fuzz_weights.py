import json
import shutil
import struct

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from core.bases.importing import import_base
from core.errors import CheckpointError
from core.export.gguf import export_gguf
from core.model.build import load_model
from core.model.checkpoint import INDEX, CheckpointReader, save_model
from core.model.config import load_config
from core.model.gguf_header import read_gguf_header
from core.pruning.scoring.statistics import LayerScores, Statistics
from core.settings.model import ModelSettings
from tests.support.evidence import note
from tests.support.fuzzing import (
    BYTES,
    CHANGES,
    FILES,
    NUMBERS,
    changed,
    damaged,
    fuzz,
    fuzz_file,
    outcome,
    variant,
)

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(project, tmp_path_factory):
    """A folder with the tiny base, whose files the tests of this module overwrite."""
    return shutil.copytree(project / "base", tmp_path_factory.mktemp("fuzz") / "base")


@pytest.fixture(scope="module")
def sound(project):
    return {path.name: path.read_bytes() for path in (project / "base").iterdir()}


@pytest.fixture(autouse=True)
def restored(checkpoint, sound):
    for path in checkpoint.iterdir():
        path.unlink()
    for name, content in sound.items():
        (checkpoint / name).write_bytes(content)


def header_of(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def read_all(folder):
    with CheckpointReader(folder) as reader:
        for name in reader.names():
            reader.shape(name)
            reader.tensor(name)


def read_and_load(folder):
    read_all(folder)
    load_model(folder)


def test_changed_headers_of_safetensors_are_read_or_refused(checkpoint, sound):
    header, data = header_of(sound[WEIGHTS])
    header = {name: header[name] for name in list(header)[:4]} | {"__metadata__": {"format": "pt"}}

    def attempt(changes):
        (checkpoint / WEIGHTS).write_bytes(with_header(changed(header, changes), data))
        return outcome(lambda: read_and_load(checkpoint))

    fuzz("safetensors headers with changed entries", attempt, CHANGES)


def test_damaged_bytes_of_safetensors_are_read_or_refused(checkpoint, sound):
    (length,) = struct.unpack("<Q", sound[WEIGHTS][:8])

    def attempt(changes, within):
        (checkpoint / WEIGHTS).write_bytes(damaged(sound[WEIGHTS], changes, within))
        return outcome(lambda: read_and_load(checkpoint))

    within = st.sampled_from([8, 8 + length, None])
    fuzz("safetensors files with flipped, lost and added bytes", attempt, BYTES, within)


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry(shape=(-2, -2))}, bytes(16)),
        ({"a": entry(shape=(2**62, 8))}, bytes(16)),
        ({"a": entry(shape=(2**63 - 1, 0), offsets=(0, 0))}, b""),
        ({"a": entry(shape=(0, 2**63), offsets=(0, 0))}, b""),
        ({"a": entry(shape=[1] * 100_000, offsets=(0, 4))}, bytes(4)),
        ({"a": entry(), "b": entry()}, bytes(16)),
        ({"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24)),
        ({"a": entry(offsets=(16, 0))}, bytes(16)),
        ({"a": entry(offsets=(0, 2**64 - 1))}, bytes(16)),
        ({"a": entry()}, bytes(15)),
        ({"a": entry()}, bytes(17)),
        ({"a": entry(dtype="I32")}, bytes(16)),
        ({"a": entry(dtype="BOOL", offsets=(0, 4))}, b"\xff" * 4),
        ({"a": entry(dtype="F8_E4M3", offsets=(0, 4))}, bytes(4)),
        ({"a": entry(dtype="F4", offsets=(0, 2))}, bytes(2)),
        ({"a": entry(dtype="C64", offsets=(0, 32))}, bytes(32)),
        ({"a": entry(dtype="PICKLE")}, bytes(16)),
        (b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(16)),
        ({}, b""),
        ({"__metadata__": {"a": "b"}}, b""),
        ({"__metadata__": {"a": 1}, "a": entry()}, bytes(16)),
        (b'{"a":' * 100_000, b""),
        ({"a\x1b[2J\n": entry()}, bytes(16)),
    ],
    ids=str,
)
def test_hostile_safetensors_are_refused(checkpoint, header, data):
    (checkpoint / WEIGHTS).write_bytes(with_header(header, data))
    assert outcome(lambda: read_and_load(checkpoint))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_no_plain_floats_are_refused(checkpoint, dtype):
    tensors = load_file(checkpoint / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, checkpoint / WEIGHTS)
    for read in (lambda: read_all(checkpoint), lambda: load_model(checkpoint)):
        assert f"model.norm.weight has the format {dtype}, but weights must be float64" in outcome(read)


@pytest.mark.parametrize("length", [0, 1, 2**27, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(checkpoint, length):
    (checkpoint / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{}")
    assert outcome(lambda: read_all(checkpoint))


def test_changed_indexes_are_read_or_refused(checkpoint, sound):
    header, _ = header_of(sound[WEIGHTS])
    index = {"metadata": {"total_size": 1}, "weight_map": {n: WEIGHTS for n in header if n != "__metadata__"}}

    fuzz_file(INDEX, checkpoint / INDEX, index, lambda: read_and_load(checkpoint))


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        ".",
        "..",
        "",
        "x.safetensors\0",
        "pytorch_model.bin",
        "x.pt",
    ],
)
def test_an_index_names_safetensors_files_beside_it_and_nothing_else(checkpoint, shard):
    shutil.copyfile(checkpoint / WEIGHTS, checkpoint.parent / "secret.safetensors")
    (checkpoint / "a").mkdir(exist_ok=True)
    shutil.copyfile(checkpoint / WEIGHTS, checkpoint / "a" / "b.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    said = outcome(lambda: read_all(checkpoint))
    shutil.rmtree(checkpoint / "a")
    assert "which is not a safetensors file" in said or "the index names it" in said
    note("Security", "an index that names a file outside of its folder, or a pickle", "refused with one line")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory, project):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_gguf(project / "base", path, dtype="f16")
    return path.read_bytes()


def test_damaged_headers_of_gguf_are_read_or_refused(tmp_path, gguf):
    path = tmp_path / "model.gguf"

    def attempt(changes, within):
        path.write_bytes(damaged(gguf, changes, within))
        return outcome(lambda: read_gguf_header(path))

    within = st.sampled_from([24, 400, 2000, None])
    assert "" in fuzz("GGUF headers with flipped, lost and added bytes", attempt, BYTES, within, share=5)


def test_damaged_gguf_files_are_taken_up_or_refused(tmp_path, gguf):
    path = tmp_path / "model.gguf"

    def attempt(changes, within):
        path.write_bytes(damaged(gguf, changes, within))
        return outcome(lambda: import_base(ModelSettings(base=str(path)), str(tmp_path / "store")))

    within = st.sampled_from([400, 2000, 20_000, None])
    fuzz("GGUF files with flipped, lost and added bytes as base models", attempt, BYTES, within, share=0.2)


def test_changed_numbers_of_gguf_files_are_taken_up_or_refused(tmp_path, gguf):
    path = tmp_path / "model.gguf"
    keys = sorted(
        key
        for key, value in header_values(tmp_path, gguf).items()
        if type(value) is int and key.startswith(("llama.", "tokenizer.", "general."))
    )

    def attempt(changes):
        content = gguf
        for key, value in changes:
            content = patched(content, key, "I", value % 2**32)
        path.write_bytes(content)
        return outcome(lambda: import_base(ModelSettings(base=str(path)), str(tmp_path / "store")))

    changes = st.lists(st.tuples(st.sampled_from(keys), NUMBERS), min_size=1, max_size=2)
    fuzz("GGUF files with other numbers in their metadata as base models", attempt, changes, share=0.3)


def header_values(folder, content):
    (folder / "sound.gguf").write_bytes(content)
    return read_gguf_header(folder / "sound.gguf").values


def gguf_text(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGML" + bytes(20),
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_text(b"a") + struct.pack("<I", 99),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_text(b"a") + struct.pack("<IIQ", 9, 4, 2**61),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_text(b"a") + struct.pack("<IIQ", 9, 8, 2**40),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_text(b"a") + struct.pack("<IIQ", 9, 9, 2),
        b"GGUF"
        + struct.pack("<IQQ", 3, 1, 0)
        + gguf_text(b"t")
        + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0),
        b"GGUF"
        + struct.pack("<IQQ", 3, 1, 0)
        + gguf_text(b"t")
        + struct.pack("<IQIQ", 1, 4, 999, 0)
        + bytes(64),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + gguf_text(b"t") + struct.pack("<I", 2**31),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_text(b"\x1b[2J\xff") + struct.pack("<II", 4, 1),
    ],
)
def test_hostile_gguf_headers_are_refused(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert outcome(lambda: import_base(ModelSettings(base=str(path)), str(tmp_path / "store")))
    assert not (tmp_path / "store").exists()


def patched(content, key, code, value):
    """Give a number of a GGUF file another value."""
    at = content.index(gguf_text(key.encode())) + 8 + len(key) + 4
    length = struct.calcsize(f"<{code}")
    return content[:at] + struct.pack(f"<{code}", value) + content[at + length :]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 2**31),
        ("llama.block_count", 4),
        ("llama.block_count", 0),
        ("llama.embedding_length", 2**31),
        ("llama.embedding_length", 96),
        ("llama.feed_forward_length", 2**30),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count_kv", 2**30),
        ("llama.attention.key_length", 2**30),
        ("llama.vocab_size", 2**31),
    ],
)
def test_sizes_in_a_gguf_file_that_its_tensors_do_not_have_are_refused(tmp_path, gguf, key, value):
    path = tmp_path / "model.gguf"
    path.write_bytes(patched(gguf, key, "I", value))
    assert outcome(lambda: import_base(ModelSettings(base=str(path)), str(tmp_path / "store")))
    note("Security", "GGUF sizes that its tensors do not have", "refused with one line")


def test_changed_statistics_are_read_or_refused(tmp_path):
    scores = LayerScores(query_heads=torch.ones(4), kv_groups=torch.ones(2), mlp_channels=torch.ones(6))
    path = tmp_path / "statistics.safetensors"
    Statistics(similarities=torch.ones(1), scores=(scores,), loss=1.0, tokens=3).save(path)
    content = path.read_bytes()
    header, data = header_of(content)

    def read_as(content):
        path.write_bytes(content)
        return outcome(lambda: Statistics.load(path))

    def told(text):
        return read_as(with_header(header | {"__metadata__": {"about": text}}, data))

    about = json.loads(header["__metadata__"]["about"])
    for missing in ("loss", "tokens"):
        known = {key: value for key, value in about.items() if key != missing}
        apart = {key: repr(value) for key, value in known.items()}  # as earlier versions wrote it
        assert f"('{missing}')" in told(json.dumps(known))
        assert f"('{missing}')" in read_as(with_header(header | {"__metadata__": apart}, data))
    fuzz("what statistics files tell", lambda how: told(variant(about, how).decode("latin-1")), FILES)
    fuzz("headers of statistics files", lambda how: read_as(with_header(changed(header, how), data)), CHANGES)
    fuzz("statistics files, damaged", lambda how: read_as(damaged(content, how)), BYTES)


def test_weights_are_not_taken_for_those_of_another_config(checkpoint):
    config = load_config(checkpoint)
    save_model(load_model(checkpoint), checkpoint / "out", companions=None, provenance={})
    for changes in (
        {"intermediate_size": 41},
        {"vocab_size": 2**23},
        {"num_hidden_layers": 900},
        {"hidden_size": 2**18},
    ):
        (checkpoint / "out" / "config.json").write_text(json.dumps(config.to_dict() | changes))
        with pytest.raises(CheckpointError):
            load_model(checkpoint / "out")
    shutil.rmtree(checkpoint / "out")
