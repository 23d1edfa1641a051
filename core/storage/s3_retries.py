"""When a request to S3 is made again.

botocore's ``standard`` mode shares some retries among all requests of a client: in an outage, a dozen
transfers at the same time use them up within a second, and fail. Its ``legacy`` mode draws pauses from 0 to
1, 2, 4, 8 ... seconds: as many attempts as outlast a restart of the server report a dead one after half a
minute to a minute. Here every request has its own attempts, whose pauses together take 13 s at most.
"""

import logging
import random
from collections.abc import Callable
from typing import Any

from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.exceptions import HTTPClientError

_PASSING = frozenset({429, 500, 502, 503, 504})
_PASSING_CODES = frozenset({"RequestTimeout", "SlowDown", "ThrottlingException", "Throttling"})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 8.0

log = logging.getLogger(__name__)


def retry(client: Any, *, attempts: int) -> None:
    """Let ``client``, which makes no retries of its own, try each request up to ``attempts`` times.

    The pauses double, up to 8 s; each is cut at random by up to a half, so that many clients come apart.

    Args:
        client: A boto3 client of S3.
        attempts: How often a request is made at most, from 1.
    """
    client.meta.events.register_first("needs-retry.s3", _policy(attempts))


def _policy(most: int) -> Callable[..., float | None]:
    def pause_before_the_next(
        *, attempts: int, response: Any, caught_exception: Exception | None, operation: Any, **_: Any
    ) -> float | None:
        """Return how long to wait before the next attempt, in seconds; None for no other attempt."""
        if response is None:
            passes = isinstance(caught_exception, BotoConnectionError | HTTPClientError)
            problem = type(caught_exception).__name__
        else:
            status = response[1].get("ResponseMetadata", {}).get("HTTPStatusCode", response[0].status_code)
            problem = response[1].get("Error", {}).get("Code", str(status))
            passes = status in _PASSING or problem in _PASSING_CODES
        if not passes or attempts >= most:
            return None
        pause_s = min(_FIRST_PAUSE_S * 2 ** (attempts - 1), _LONGEST_PAUSE_S) * random.uniform(0.5, 1)
        log.debug("%s failed (%s), attempt %d of %d", operation.name, problem, attempts, most)
        return pause_s

    return pause_before_the_next
