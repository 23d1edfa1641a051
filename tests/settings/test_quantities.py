import pytest

from core.quantities import (
    Interval,
    bytes_text,
    count_text,
    is_share,
    parse_bytes,
    parse_count,
    parse_interval,
    seconds_text,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("108M", 108_000_000),
        ("3.87B", 3_870_000_000),
        ("50k", 50_000),
        ("134,515,008", 134_515_008),
        ("1_000", 1000),
        ("1e9", 10**9),
        (" 2 b ", 2 * 10**9),
        (376.1e6, 376_100_000),
        (0, 0),
    ],
)
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GB", 16 * 10**9),
        ("500MB", 500 * 10**6),
        ("16GiB", 16 * 2**30),
        ("32Gi", 32 * 2**30),
        ("1.5 TiB", 3 * 2**39),
        ("64k", 64_000),
        ("0.5gb", 500 * 10**6),
        ("1_024 B", 1024),
        ("123,456", 123_456),
        (4096, 4096),
        (16e9, 16 * 10**9),
    ],
)
def test_sizes_in_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "share"), [("80%", True), (" 12.5 % ", True), ("80", False), ("%", False)])
def test_shares(text, share):
    assert is_share(text) is share


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("10min", Interval(seconds=600)),
        ("90s", Interval(seconds=90)),
        ("2h", Interval(seconds=7200)),
        (" 1.5 H ", Interval(seconds=5400)),
        ("200 steps", Interval(steps=200)),
        ("1 step", Interval(steps=1)),
        ("1_000steps", Interval(steps=1000)),
        ("0", Interval()),
        (0, Interval()),
        (0.0, Interval()),
        ("0 steps", Interval()),
        ("0min", Interval()),
    ],
)
def test_intervals(text, interval):
    assert parse_interval(text) == interval


@pytest.mark.parametrize(
    ("parse", "texts", "problem"),
    [
        (parse_count, ["", "M", "-5", "1.2.3", "5T", "80%", True, "1e-3"], "is not a count"),
        (
            parse_bytes,
            ["", "GB", "-1GB", "16 gigabytes", "16iB", "1.2.3GB", "50%", False],
            "is not a size such as 16GB",
        ),
        (
            parse_interval,
            ["", "min", "10", "-1s", "10m", "1 day", "1.5 steps", "1h30min", "often", "80%", "nan s", False],
            "is not an interval such as 10min, 90s, 2h or 200 steps",
        ),
        (parse_count, ["1e19"], "is beyond any"),
        (parse_bytes, ["1e10 GB"], "is beyond any"),
        (parse_interval, ["1e400h", "1e19 s", "1e300 steps"], "is beyond any training"),
    ],
)
def test_malformed_and_excessive_quantities_are_refused(parse, texts, problem):
    for text in texts:
        with pytest.raises(ValueError, match=problem):
            parse(text)


@pytest.mark.parametrize(
    ("interval", "steps", "seconds", "over"),
    [
        (Interval(), 10**9, 1e9, False),
        (Interval(steps=3), 2, 1e9, False),
        (Interval(steps=3), 3, 0.0, True),
        (Interval(seconds=5), 10**9, 4.9, False),
        (Interval(seconds=5), 0, 5.0, True),
    ],
)
def test_when_an_interval_is_over(interval, steps, seconds, over):
    assert interval.is_over(steps, seconds) is over


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0k"),
        (49_152, "49.2k"),
        (999_949, "999.9k"),
        (999_950, "1.0M"),
        (134_515_008, "134.5M"),
        (999_949_999, "999.9M"),
        (999_950_000, "1.00B"),
        (8_030_261_248, "8.03B"),
        (9_996_000_000, "10.0B"),
    ],
)
def test_counts_have_sensible_units(count, text):
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_have_sensible_units(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (49_152, "49.2 kB"), (999_960, "1.0 MB"), (2 * 10**12, "2.0 TB")],
)
def test_sizes_have_sensible_units(size, text):
    assert bytes_text(size) == text
