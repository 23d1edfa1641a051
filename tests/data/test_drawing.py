"""Sources in random order, in their shares, with malformed rows, in one process or in several."""

import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from core.data import mixture
from core.data.drawing import Seen
from core.data.json_files import elements
from core.data.mixture import slice_name, write_slices
from core.data.rows import open_rows
from core.data.workers import Reader, Workers
from core.errors import AdaptPrunerError, DataError, StorageError
from core.settings.texts import TextSource
from tests.support.texts import drawn

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]


def lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def texts(name, count, words=(20, 60), seed=0):
    rng = random.Random(f"{name} {seed}")
    return [{"text": f"{name}{n} " + "a1 " * rng.randint(*words) + name} for n in range(count)]


def slices_of(folder, sequences, sources, tokenizer, **changes):
    asked = {"sequence_length": 128, "packing": "whole", "seed": 3} | changes
    report = write_slices(sources, tokenizer, sequences=sequences, directory=folder, **asked)
    return report, [load_file(folder / slice_name(n + 1)) for n in range(len(sequences))]


def names_in(tensors, tokenizer):
    """How often each document's name, a letter, opens one in a slice."""
    ids = tensors["input_ids"].reshape(-1)
    begins = np.flatnonzero(tensors["starts"].reshape(-1))
    firsts = [tokenizer.decode(ids[place : place + 1]) for place in begins]
    return {name: firsts.count(name) for name in set(firsts)}


def test_each_phase_sees_both_files_of_a_source_in_their_share(tmp_path, tokenizer):
    lines(tmp_path / "two/a.jsonl", texts("A", 1200))
    lines(tmp_path / "two/b.jsonl", texts("B", 3600))
    source = TextSource(path=str(tmp_path / "two"))
    sequences = [400, 600, 800, 1000]
    report, slices = slices_of(tmp_path / "out", sequences, [source], tokenizer)
    assert report.sources[0].passes == 1
    total = 0
    for tensors in slices:
        found = names_in(tensors, tokenizer)
        count = found["A"] + found["B"]
        total += count
        spread = 4 * (0.25 * 0.75 / count) ** 0.5  # of a fair draw without replacement: at most this
        assert abs(found["A"] / count - 0.25) < spread
    assert total > 3300  # three quarters of it: none of the files is done early


def test_the_order_has_no_trace_of_the_rows_places(tmp_path, tokenizer):
    source = TextSource(path=str(lines(tmp_path / "a.jsonl", [{"text": str(n)} for n in range(12_000)])))
    places = np.array([int(text) for text in drawn(source, tokenizer)])
    assert sorted(places) == list(range(12_000))
    order = np.arange(12_000)
    assert abs(np.corrcoef(order, places)[0, 1]) < 0.04
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.04
    for part in np.split(places, 12):
        assert abs(part.mean() - 6_000) < 4 * 12_000 / 12**0.5 / 1_000**0.5


def test_each_phase_has_the_proportions_of_the_mixture(tmp_path, tokenizer):
    weights, sizes = {"A": 5.0, "B": 2.0, "C": 1.0}, {"A": (5, 15), "B": (60, 90), "C": (20, 30)}
    sources = [
        TextSource(path=str(lines(tmp_path / f"{name}.jsonl", texts(name, 4000, sizes[name]))), weight=weight)
        for name, weight in weights.items()
    ]
    _, slices = slices_of(tmp_path / "out", [300, 600, 900], sources, tokenizer, sequence_length=256)
    for tensors in slices:
        tokens = dict.fromkeys(weights, 0)
        for ids, starts in zip(tensors["input_ids"], tensors["starts"], strict=True):
            ends = [*np.flatnonzero(starts)[1:], len(ids)]
            for begin, end in zip(np.flatnonzero(starts), ends, strict=True):
                tokens[tokenizer.decode(ids[begin : begin + 1])] += end - begin
        for name, weight in weights.items():
            assert tokens[name] / sum(tokens.values()) == pytest.approx(weight / 8, abs=0.02)


def test_a_source_gives_no_more_than_its_cap_and_the_others_keep_their_proportions(tmp_path, tokenizer):
    sources = [
        TextSource(path=str(lines(tmp_path / f"{name}.jsonl", texts(name, 3000))), weight=weight, **cap)
        for name, weight, cap in (("A", 3, {"max_tokens": "10k"}), ("B", 2, {}), ("C", 1, {}))
    ]
    report, _ = slices_of(tmp_path / "out", [400, 600], sources, tokenizer, packing="cut")
    tokens = [source.tokens for source in report.sources]
    assert 10_000 <= tokens[0] < 10_200
    assert tokens[1] / tokens[2] == pytest.approx(2, abs=0.02)
    with pytest.raises(DataError, match=r"more than the max_tokens of all training\.sources give, 10,"):
        slices_of(tmp_path / "out", [400], sources[:1], tokenizer)


BROKEN = [
    ('{"text": "cut sho\n', "it is not valid JSON"),
    ("[1, 2]\n", "it is list, not an object"),
    ({"text": 7}, "column text holds int, not text"),
    ('{"text": "half \\ud800"}\n', "it holds half a character"),
    ("\x00\x01\n", "it is not valid JSON"),
]


@pytest.mark.parametrize(("row", "says"), BROKEN, ids=[says for _, says in BROKEN])
def test_a_malformed_row_is_counted_shown_and_left_out(tmp_path, tokenizer, caplog, row, says):
    rows = texts("A", 300)
    source = TextSource(path=str(lines(tmp_path / "a.jsonl", [*rows[:100], row, *rows[100:]])))
    found = drawn(source, tokenizer)
    assert sorted(found) == sorted(row["text"] for row in rows)
    (shown,) = [record.message for record in caplog.records if "left out" in record.message]
    assert f"row 101 is left out: {says}" in shown
    report, _ = slices_of(tmp_path / "out", [150], [source], tokenizer)
    assert 1 <= report.sources[0].malformed <= report.sources[0].passes


def test_a_malformed_conversation_is_left_out_too(tmp_path, tokenizer, caplog):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    bad = [
        [{"role": "wizard", "content": "x"}],
        "no list",
        [{"role": "user"}],
        [{"role": "user", "content": 7}],
    ]
    rows = [{"m": value} for value in [*[talk] * 500, *bad]]
    source = TextSource(path=str(lines(tmp_path / "a.jsonl", rows)), format="chat", field="m")
    with open_rows(source) as opened:
        batch = Reader(source=source, rows=opened, tokenizer=tokenizer).read(range(len(opened)))
    assert [bool(problem) for problem in batch.problems] == [False] * 500 + [True] * 4
    assert len(drawn(source, tokenizer)) == 500
    assert len([record for record in caplog.records if "left out" in record.message]) == 3  # the first ones


def test_too_many_malformed_rows_are_one_clear_error_early(tmp_path, tokenizer):
    rows = texts("A", 5000)
    for number in range(0, 5000, 40):  # 2.5 %
        rows[number] = {"text": number}
    source = TextSource(path=str(lines(tmp_path / "a.jsonl", rows)))
    with pytest.raises(DataError) as caught:
        drawn(source, tokenizer)
    said = str(caught.value)
    count, read = [int(word) for word in said.replace(":", "").split() if word.isdecimal()][:2]
    assert read < 4000  # not at the end
    assert f"{count} of {read} rows are malformed, and max_malformed=0.01" in said
    assert "column text holds int, not text" in said
    assert "\n" not in said
    assert len(drawn(TextSource(path=source.path, max_malformed=0.025), tokenizer)) == 4875
    with pytest.raises(DataError, match=r"1 of .* rows are malformed, and max_malformed=0 "):
        drawn(TextSource(path=source.path, max_malformed=0), tokenizer)


def test_a_list_is_read_an_element_at_a_time(tmp_path):
    rng = random.Random(1)
    values = [{"text": "x" * rng.choice([1, 90, 3_000_000 if n == 7 else 5]), "n": n} for n in range(40)]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(values, indent=indent))
        with (tmp_path / "a.json").open() as file:
            assert list(elements(file)) == values
    for damage in ('[{"a": 1}, {"a": ', "[1, 2", "[nonsense]"):
        (tmp_path / "a.json").write_text(damage)
        with (tmp_path / "a.json").open() as file, pytest.raises(ValueError, match="not valid"):
            list(elements(file))


def test_the_digests_are_a_set(monkeypatch):
    monkeypatch.setattr("core.data.drawing._MERGED_DIGESTS", 1000)
    seen, plain, rng = Seen(), set(), random.Random(0)
    for _ in range(5000):
        digest = rng.randrange(2**64) if rng.random() < 0.6 else rng.choice([3, 2**64 - 1, 9])
        assert seen.add(digest) == (digest not in plain)
        plain.add(digest)
    assert seen.digests().tolist() == sorted(plain)
    assert not any(Seen(seen.digests()).add(digest) for digest in list(plain)[:1000])


def mixed_sources(tmp_path):
    rows = texts("A", 200) + texts("A", 50)  # the last ones are repeated
    rows[37] = '{"text": broken\n'
    talks = [{"q": f"B question {n}", "a": "B answer " * (n % 30)} for n in range(300)]
    prose = "\n\n".join("Some words of plain prose. " * (20 + n % 50) for n in range(150))
    (tmp_path / "c.txt").write_text(prose)
    return [
        TextSource(path=str(lines(tmp_path / "a.jsonl", rows))),
        TextSource(
            path=str(lines(tmp_path / "b.jsonl", talks)),
            format="instruction",
            prompt_fields=("q",),
            response_field="a",
        ),
        TextSource(path=str(tmp_path / "c.txt"), weight=0.5),
    ]


@pytest.fixture
def parallel(monkeypatch):
    monkeypatch.setattr(mixture, "_PARALLEL_TOKENS", 1)


@pytest.mark.parametrize("packing", ["whole", "cut"])
def test_the_slices_are_the_same_for_any_number_of_processes(tmp_path, tokenizer, packing, parallel):
    sources, contents = mixed_sources(tmp_path), []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        report, _ = slices_of(folder, [60, 500], sources, tokenizer, packing=packing, processes=processes)
        contents.append([report, *(path.read_bytes() for path in sorted(folder.rglob("*.safetensors")))])
    assert contents[0] == contents[1] == contents[2]
    assert contents[0][0].sources[0].passes > 1  # across the end of a pass
    assert contents[0][0].sources[0].malformed >= 1


def test_an_error_in_a_process_is_the_same_error_here(tmp_path, tokenizer, parallel):
    rows = [{"text": "a"} if n % 9 else {"text": n} for n in range(3000)]
    source, said = TextSource(path=str(lines(tmp_path / "a.jsonl", rows))), []
    for processes in (1, 2):
        with pytest.raises(DataError) as caught:
            slices_of(tmp_path / "out", [40], [source], tokenizer, processes=processes)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_process_that_ends_is_an_error_and_the_others_end_too(tmp_path, tokenizer):
    source = TextSource(path=str(lines(tmp_path / "a.jsonl", texts("A", 300))))
    with (
        open_rows(source) as rows,
        Workers([Reader(source=source, rows=rows, tokenizer=tokenizer)], 2) as workers,
    ):
        first, second = (worker.process for worker in workers._workers)
        assert workers.result(workers.ask(0, range(5))).documents[4] is not None
        os.kill(first.pid, signal.SIGKILL)
        first.join()
        with pytest.raises(DataError, match=r"tokenizes texts has ended.*memory"):
            workers.result(workers.ask(0, range(64)))
    assert not second.is_alive()


def asking(path, definition, pids):
    """Start processes, say which, and wait."""
    from tests.conftest import tokenizer_of

    source = TextSource(path=path)
    with open_rows(source) as rows:
        readers = [Reader(source=source, rows=rows, tokenizer=tokenizer_of(definition))]
        with Workers(readers, 2) as workers:
            pids.send([worker.process.pid for worker in workers._workers])
            time.sleep(600)


def test_the_processes_end_when_their_parent_is_killed(tmp_path, tokenizer_definition):
    path = lines(tmp_path / "a.jsonl", texts("A", 300))
    here, there = multiprocessing.Pipe()
    parent = multiprocessing.get_context("spawn").Process(
        target=asking, args=(str(path), tokenizer_definition, there)
    )
    parent.start()
    pids = here.recv()
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("length", [256, 512, 1024])
@pytest.mark.parametrize("kind", ["one text", "a folder, compressed"])
def test_less_than_two_percent_is_padding_in_plain_texts_too(tmp_path, tokenizer, length, kind):
    rng = random.Random(2)
    paragraphs = ["Plain words of a long text. " * rng.randint(1, 30) for _ in range(2500)]
    place = tmp_path / "a.txt"
    place.write_text("\n\n".join(paragraphs))
    if kind != "one text":
        import gzip

        place = tmp_path / "texts"
        place.mkdir()
        (place / "a.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    sources = [TextSource(path=str(place))]
    report, _ = slices_of(tmp_path / "out", [200], sources, tokenizer, sequence_length=length)
    assert report.padding < 0.02


def test_slices_that_do_not_fit_on_the_disk_are_refused_at_once(tmp_path, tokenizer):
    source = TextSource(path=str(lines(tmp_path / "a.jsonl", texts("A", 30))))
    with pytest.raises(StorageError, match=r"take 6000000\.0 GB, and .* GB left\. Set TMPDIR") as caught:
        slices_of(tmp_path / "out", [10**9], [source], tokenizer, sequence_length=10**6)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_text_without_anything_is_an_error(tmp_path):
    for name in ("a.jsonl", "a.json", "a.txt"):
        (tmp_path / name).write_text("[]" if name == "a.json" else "\n \n" if name == "a.txt" else "")
        with (
            pytest.raises(AdaptPrunerError, match=f"{name} holds no data"),
            open_rows(TextSource(path=str(tmp_path / name))),
        ):
            pass
