"""A sample of a stream: each row as likely as any other, within a limit of reading and of disk."""

import json
import os

import numpy as np
import pytest

from core.data import sampling
from core.data.sampling import MOST_BYTES, READ_FOR_EACH, in_turn, write_sample


@pytest.fixture
def patient(monkeypatch):
    """Streams that halve the sample several times are read to their end."""
    monkeypatch.setattr(sampling, "READ_FOR_EACH", 32)


def numbers_of(file):
    return [json.loads(line)["n"] for line in file.read_bytes().splitlines()]


def counting(rows, read):
    for n in range(rows):
        read.append(n)
        yield {"n": n}


@pytest.mark.parametrize("limit", [{}, {"most_rows": 34}, {"most_bytes": 10**4}])
def test_what_is_not_far_more_than_will_do_is_kept_in_full(tmp_path, limit):
    rows = [{"n": n, "text": "über\n"} for n in range(100)]
    assert write_sample(tmp_path / "rows", rows, seed=0, **limit) == (100, 100)
    assert [json.loads(line) for line in (tmp_path / "rows").read_bytes().splitlines()] == rows


@pytest.mark.parametrize(("limit", "rows"), [({"most_rows": 40}, 1_000), ({"most_bytes": 400}, 1_000)])
def test_every_row_is_equally_likely(patient, tmp_path, limit, rows):
    found, sizes = np.zeros(rows, int), []
    for seed in range(120):
        kept, read = write_sample(tmp_path / "rows", ({"n": n} for n in range(rows)), seed=seed, **limit)
        numbers = numbers_of(tmp_path / "rows")
        assert (len(numbers), read) == (kept, rows)
        assert numbers == sorted(set(numbers))
        found[numbers] += 1
        sizes.append(kept)
    assert 40 <= min(sizes) <= max(sizes) <= 120
    tenths = found.reshape(10, -1).sum(axis=1)
    expected = tenths.sum() / 10  # some 800; its spread is below its root
    assert np.abs(tenths - expected).max() < 4 * np.sqrt(expected)


def test_the_seed_alone_decides(tmp_path):
    samples = []
    for seed in (1, 1, 2):
        write_sample(tmp_path / "rows", ({"n": n} for n in range(500)), seed=seed, most_rows=20)
        samples.append(numbers_of(tmp_path / "rows"))
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize("limit", [{"most_rows": 10}, {"most_bytes": 100}])
def test_reading_ends_where_far_more_than_will_do_was_read(tmp_path, limit):
    read = []
    kept, seen = write_sample(tmp_path / "rows", counting(10**6, read), seed=0, **limit)
    assert len(read) == seen <= 11 * READ_FOR_EACH  # a row has 9 bytes and more
    assert seen >= (10 if "most_rows" in limit else 7) * READ_FOR_EACH
    assert max(numbers_of(tmp_path / "rows")) > seen / 2
    assert kept >= 10 or "most_bytes" in limit


def test_the_disk_holds_no_more_than_is_said(patient, tmp_path, monkeypatch):
    most, sizes, replace = 1_000, [], os.replace

    def replacing(half, file):
        sizes.append(file.stat().st_size + os.path.getsize(half))
        replace(half, file)

    monkeypatch.setattr(sampling.os, "replace", replacing)
    for seed in range(20):
        write_sample(tmp_path / "rows", ({"n": n} for n in range(9_000)), seed=seed, most_bytes=most)
        sizes.append((tmp_path / "rows").stat().st_size)
    assert len(sizes) > 40
    assert max(sizes) <= MOST_BYTES * most + 20


def test_a_single_row_larger_than_all_that_will_do_is_kept(tmp_path):
    assert write_sample(tmp_path / "rows", [{"n": 0, "text": "x" * 999}], seed=0, most_bytes=10) == (1, 1)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_fewer_rows_stay_than_will_do(tmp_path, most):
    for seed in range(200):
        rows = ({"n": n} for n in range(3 * most + 1 + seed % (30 * most)))
        kept, _ = write_sample(tmp_path / "rows", rows, seed=seed, most_rows=most)
        assert most <= kept <= 3 * most


def test_of_rows_larger_than_all_that_will_do_one_stays(tmp_path):
    rows = [{"n": n, "text": "x" * 99} for n in range(4)]
    for seed in range(50):
        assert write_sample(tmp_path / "rows", rows, seed=seed, most_bytes=64)[0] >= 1


def test_a_text_has_as_many_bytes_as_in_utf8(tmp_path):
    text = "Ещё одно предложение. " * 50
    write_sample(tmp_path / "rows", [{"text": text}], seed=0)
    assert (tmp_path / "rows").stat().st_size == len(text.encode()) + len('{"text": ""}\n')


def test_half_a_character_is_kept_as_it_came(tmp_path):
    write_sample(tmp_path / "rows", [{"text": "a\ud83d\\b"}], seed=0)
    assert json.loads((tmp_path / "rows").read_bytes()) == {"text": "a\ud83d\\b"}


def test_files_are_in_the_sample_by_their_sizes(patient, tmp_path):
    import datasets

    for name, count in (("a", 900), ("b", 300)):
        lines = "".join(json.dumps({"n": n, "file": name}) + "\n" for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")]
    shares = []
    for seed in range(12):
        stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
        kept, read = write_sample(tmp_path / "rows", in_turn(stream, seed), seed=seed, most_rows=40)
        assert read == 1_200
        rows = [json.loads(line) for line in (tmp_path / "rows").read_bytes().splitlines()]
        shares.append(sum(row["file"] == "a" for row in rows) / kept)
        assert {row["n"] < 450 for row in rows if row["file"] == "a"} == {True, False}
    assert np.mean(shares) == pytest.approx(0.75, abs=0.06)
