"""The disk that prepare-data will take, estimated before a run is submitted."""

import functools
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from core.data.locations import is_hub_id, locate
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
_TIMEOUT_S = 5.0


def data_disk_bytes(settings: "Settings") -> int:
    """Estimate the scratch space of prepare-data: the rows of hub data sets, and the slices.

    The hub is asked how large its data sets are. One that it does not tell of counts with as much of it as is
    kept at most.

    Args:
        settings: Of the run.
    """
    training = settings.training
    if not training.total_steps:
        return 0
    tokens = training.total_steps * training.global_batch * training.sequence_length
    tokens += training.held_out_tokens
    sources = [source for source in training.sources if _on_the_hub(source)]
    weights, rows = sum(source.weight for source in training.sources), 0
    sizes = _sizes(tuple((source.path, source.revision) for source in sources))
    for source, size in zip(sources, sizes, strict=True):
        most = MOST_BYTES * bytes_that_do(tokens * source.weight / weights)
        rows += most if size is None else min(most, _AS_LINES * size)
    return rows + ROW_BYTES * tokens


def data_shortage(settings: "Settings") -> Iterator[str]:
    """Yield that prepare-data's pod has less scratch space than it may take, if it has a volume."""
    given = settings.cluster.of("prepare-data").scratch
    if given and (needed := data_disk_bytes(settings)) > parse_bytes(given):
        yield (
            f"prepare-data takes up to {needed / 1e9:.1f} GB of scratch, and its pods get {given}. Set "
            f"cluster.components.prepare-data.scratch={math.ceil(1.2 * needed / 2**30)}Gi or more."
        )


def _on_the_hub(source: "TextSource") -> bool:
    try:
        return locate(source.path) is None and is_hub_id(source.path)
    except DataError:  # a package that is not installed here: the step that reads it says so
        return False


@functools.cache
def _sizes(named: tuple[tuple[str, str], ...]) -> list[int | None]:
    """Return the bytes of data sets at revisions; None from the first on that the hub does not tell of."""
    from huggingface_hub import HfApi

    sizes: list[int | None] = []
    for path, revision in named:
        try:
            found = HfApi().dataset_info(
                path, revision=revision or None, files_metadata=True, timeout=_TIMEOUT_S
            )
        except Exception as error:  # whatever the hub's client raises: this is a service beside
            log.debug("the size of %s cannot be asked for here: %s", path, error)
            break
        sizes.append(sum(file.size or 0 for file in found.siblings or ()) or None)
    return sizes + [None] * (len(named) - len(sizes))
