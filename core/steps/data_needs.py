"""The disk that prepare-data will take, estimated before a run is submitted."""

import functools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from core.data.locations import data_files, is_hub_id, locate
from core.data.mixture import bytes_that_do
from core.data.sampling import MOST_BYTES
from core.errors import DataError
from core.quantities import parse_bytes

if TYPE_CHECKING:
    from core.settings.schema import Settings
    from core.settings.texts import TextSource

log = logging.getLogger(__name__)

ROW_BYTES = 6
"""A token of the mixture's rows, with what is trained and where documents begin."""
_AS_LINES = 8
"""So many times the size of its compressed files a data set has as lines of JSON, at most."""
_OF_PLAIN = 3
"""The same of texts and tables that are not compressed."""
_PLAIN = {".txt", ".json", ".csv", ".arrow"}
_TIMEOUT_S = 5.0


def data_disk_bytes(settings: "Settings") -> int:
    """Estimate the scratch space of prepare-data: rows that are written there, and the slices.

    The hub is asked how large its data sets are. One that it does not tell of counts with as much of it as is
    kept at most.

    Args:
        settings: Of the run.

    Returns:
        Bytes; 0 if a source is neither here nor known to the hub, and may be of any size.
    """
    training = settings.training
    if not training.total_steps:
        return 0
    tokens = training.total_steps * training.global_batch * training.sequence_length
    tokens += training.held_out_tokens
    weights, needed = sum(source.weight for source in training.sources), ROW_BYTES * tokens
    hub = []
    for source in training.sources:
        try:
            location = locate(source.path)
            here = 0 if location is None else _written_bytes(source, location)
        except DataError:  # a package that is not installed here: the step that reads it says so
            return 0
        if location is None and not is_hub_id(source.path):
            return 0
        needed += here
        hub += [source] if location is None else []
    sizes = _sizes(tuple((source.path, source.revision) for source in hub))
    for source, size in zip(hub, sizes, strict=True):
        if "[" not in source.split:
            most = MOST_BYTES * bytes_that_do(tokens * source.weight / weights)
            needed += most if size is None else min(most, _AS_LINES * size)
        elif size is None:
            return 0
        else:
            needed += (1 + _AS_LINES) * size  # all of its files, and the table that is made of them
    return needed


def data_shortage(settings: "Settings") -> Iterator[str]:
    """Yield that prepare-data's pod has less scratch space than it may take, if it has a volume."""
    given = settings.cluster.of("prepare-data").scratch
    if given and (needed := data_disk_bytes(settings)) > parse_bytes(given):
        yield (
            f"prepare-data takes up to {needed / 1e9:.1f} GB of scratch, and its pods get {given}. Set "
            f"cluster.components.prepare-data.scratch={math.ceil(1.2 * needed / 2**30)}Gi or more."
        )


def _written_bytes(source: "TextSource", location: Path) -> int:
    """Return the bytes of what is written of files that lie here; lines of JSON are read in place."""
    size = 0
    for file in data_files(source, location)[1]:
        if file.suffix.lower() != ".jsonl":
            size += (_OF_PLAIN if file.suffix.lower() in _PLAIN else 1 + _AS_LINES) * file.stat().st_size
    return size


@functools.cache
def _sizes(named: tuple[tuple[str, str], ...]) -> list[int | None]:
    """Return the bytes of data sets at revisions; None where the hub does not tell, or is out of reach."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    sizes: list[int | None] = []
    for path, revision in named:
        try:
            found = HfApi().dataset_info(
                path, revision=revision or None, files_metadata=True, timeout=_TIMEOUT_S
            )
        except HfHubHTTPError as error:
            log.debug("the hub does not tell the size of %s: %s", path, error)
            sizes.append(None)
            continue
        except Exception as error:  # whatever the hub's client raises: this is a service beside
            log.debug("the size of %s cannot be asked for here: %s", path, error)
            break
        sizes.append(sum(file.size or 0 for file in found.siblings or ()) or None)
    return sizes + [None] * (len(named) - len(sizes))
