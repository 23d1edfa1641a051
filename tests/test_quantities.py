import pytest

from core.quantities import is_share, parse_bytes, parse_count


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


@pytest.mark.parametrize("text", ["", "M", "-5", "1.2.3", "5T", "80%", True, "1e-3"])
def test_what_is_no_count(text):
    with pytest.raises(ValueError, match="is not a count"):
        parse_count(text)


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


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "16 gigabytes", "16iB", "1.2.3GB", "50%", False])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size such as 16GB"):
        parse_bytes(text)


@pytest.mark.parametrize(("parse", "text"), [(parse_count, "1e19"), (parse_bytes, "1e10 GB")])
def test_what_is_beyond_all_measure(parse, text):
    with pytest.raises(ValueError, match="is beyond any"):
        parse(text)


@pytest.mark.parametrize(("text", "share"), [("80%", True), (" 12.5 % ", True), ("80", False), ("%", False)])
def test_shares(text, share):
    assert is_share(text) is share
