"""Cost of the store's promises: publishing and fetching against a plain loop over boto3's file transfers.

Each round uploads and downloads the same files both ways, to the same server, taking turns to go first. The
plain loop hashes nothing, verifies nothing and flushes nothing to the disk. The ratio is its seconds divided
by ours, the median over the rounds: 1 means as fast, 0.5 half as fast. Without --store it starts SeaweedFS on
this machine, which then shares the processor with both.

    python benchmarks/storage.py --gigabytes 2 --rounds 3
"""

import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import boto3
from demo import ROOT, parser_for, table_of
from rich.console import Console

sys.path.insert(0, str(ROOT))  # for the server that the tests use

from core.storage.interface import join_uri
from core.storage.publication import open_publication, publish
from tests.support.servers import BUCKET, s3_server

SHARD_BYTES = 400_000_000
"""About the size of a decoder layer of an 8B model."""


def main() -> None:
    """Measure; print a table, and the ratios as one JSON object on the last line."""
    parser = parser_for(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", default="", help="s3://bucket/prefix on an existing server")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as scratch, _store(arguments.store) as store:
        folder = Path(scratch, "checkpoint")
        paths = _write_shards(folder, round(arguments.gigabytes * 1e9))
        seconds: dict[str, list[float]] = {name: [] for name in ("up", "plain up", "down", "plain down")}
        reads = [
            _round(folder, paths, store, Path(scratch), seconds, ours_first=bool(number % 2))
            for number in range(arguments.rounds)
        ]
    _show(seconds, arguments.gigabytes)
    result = {
        "gigabytes": arguments.gigabytes,
        "rounds": arguments.rounds,
        "up_ratio": _ratio(seconds, "up"),
        "down_ratio": _ratio(seconds, "down"),
        "reads_of_a_publish": round(statistics.median(reads) / (arguments.gigabytes * 1e9), 3),
    }
    print(json.dumps(result))


@contextlib.contextmanager
def _store(uri: str) -> Iterator[str]:
    if uri:
        yield join_uri(uri, f"benchmark-{os.getpid()}")
        return
    with s3_server() as server:
        os.environ.update(server.environment())
        yield f"s3://{BUCKET}/benchmark"


def _write_shards(folder: Path, size: int) -> list[Path]:
    """Write random bytes: some stores compress anything else."""
    folder.mkdir()
    paths = []
    for start in range(0, size, SHARD_BYTES):
        paths.append(folder / f"model-{len(paths) + 1:05d}.safetensors")
        paths[-1].write_bytes(os.urandom(min(SHARD_BYTES, size - start)))
    return paths


def _round(
    folder: Path,
    paths: list[Path],
    store: str,
    scratch: Path,
    seconds: dict[str, list[float]],
    *,
    ours_first: bool,
) -> int:
    """Upload and download the checkpoint both ways; return how many bytes publishing read."""
    ours, plain, reads = join_uri(store, "ours"), join_uri(store, "plain"), 0
    bucket, prefix = urlsplit(plain).netloc, urlsplit(plain).path.strip("/")
    client = boto3.client("s3")

    def publish_it() -> None:
        nonlocal reads
        before = _bytes_read()
        publish(folder, ours)
        reads = _bytes_read() - before

    def upload_plainly() -> None:
        for path in paths:
            client.upload_file(str(path), bucket, f"{prefix}/{path.name}")

    def download_plainly() -> None:
        (scratch / "plain").mkdir()
        for path in paths:
            client.download_file(bucket, f"{prefix}/{path.name}", str(scratch / "plain" / path.name))

    jobs: list[tuple[str, Callable[[], object]]] = [
        ("up", publish_it),
        ("plain up", upload_plainly),
        ("down", lambda: open_publication(ours).fetch(scratch / "ours")),
        ("plain down", download_plainly),
    ]
    for pair in (jobs[:2], jobs[2:]):
        for name, job in pair if ours_first else reversed(pair):
            started = time.monotonic()
            job()
            seconds[name].append(time.monotonic() - started)
    open_publication(ours).delete()
    for path in paths:
        client.delete_object(Bucket=bucket, Key=f"{prefix}/{path.name}")
    for name in ("ours", "plain"):
        shutil.rmtree(scratch / name)
    return reads


def _bytes_read() -> int:
    """Return the bytes this process has read from files so far; Linux only."""
    return int(Path("/proc/self/io").read_text().split()[1])


def _ratio(seconds: dict[str, list[float]], way: str) -> float:
    pairs = zip(seconds[f"plain {way}"], seconds[way], strict=True)
    return round(statistics.median(plain / own for plain, own in pairs), 3)


def _show(seconds: dict[str, list[float]], gigabytes: float) -> None:
    table = table_of("", ["", "seconds of each round"], ["MB/s, median"])
    for name, values in seconds.items():
        rate = gigabytes * 1000 / statistics.median(values)
        table.add_row(name, ", ".join(f"{value:.1f}" for value in values), f"{rate:.0f}")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
