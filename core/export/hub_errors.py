"""Errors of the Hugging Face hub and its client, in one line that says what to do."""

import contextlib
import re
from collections.abc import Iterator
from textwrap import shorten

from core.errors import AdaptPrunerError, HubError
from core.redaction import without_password

_AGAIN = "Run the same command again: files that have arrived are not sent again."
_NEW_TOKEN = (
    "Take one with write access from https://huggingface.co/settings/tokens as HF_TOKEN, "
    "or run `hf auth login`."
)
_WITHOUT_XET = "A hub without xet storage needs HF_HUB_DISABLE_XET=1."
_XET_STATUS = re.compile(r"HTTP status \w+ error \(\d+")
_NO_ROOM = re.compile("storage|quota|too large|limit reached|payment", re.IGNORECASE)


@contextlib.contextmanager
def hub_errors(repository: str, when: str = "") -> Iterator[None]:
    """Turn whatever the hub's client raises into a ``HubError`` without secrets.

    ``when``, such as `` during the upload``, says what was interrupted.
    """
    try:
        yield
    except AdaptPrunerError:
        raise
    except Exception as error:  # of httpx or httpx2 by the client's version, of xet, or of the client itself
        raise HubError(_sentence(error, repository, when)) from error


def _sentence(error: Exception, repository: str, when: str) -> str:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    cause = _cause(error)
    reason = _reason(cause)
    hub = "the Hugging Face hub"
    if isinstance(cause, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE blocks all requests to {hub}. Unset it to upload."
    if isinstance(cause, GatedRepoError):
        return f"{repository} is gated: {reason}. Ask its owners for access, or name another repository."
    if not isinstance(cause, HfHubHTTPError):
        if _XET_STATUS.search(reason):
            return f"the storage of {hub} refused{when}: {reason}. {_WITHOUT_XET} {_AGAIN}"
        if _is_network(cause):
            advice = f"Check the network, proxies and HF_ENDPOINT. {_AGAIN}"
            return f"{hub} cannot be reached{when}: {reason}. {advice}"
        return f"the upload to {repository} stopped{when}: {reason}. {_AGAIN}"
    status = cause.response.status_code
    if status in (402, 413, 507) or (status in (400, 403) and _NO_ROOM.search(reason)):
        problem, advice = (
            f"{hub} has no room for {repository}{when}",
            f"Free some or raise the limit. {_AGAIN}",
        )
    elif cause is not error and status < 429:
        problem, advice = f"the storage of {hub} refused{when} ({status})", _AGAIN
    elif status == 401:
        problem, advice = f"{hub} does not accept the token", _NEW_TOKEN
    elif status == 403:
        problem = f"the token may not write to {repository}"
        advice = f"{_NEW_TOKEN} Or name another repository."
    elif status == 404:
        problem = f"{hub} does not find {repository}{when}, or hides it from this token"
        advice = "Correct the name or the revision, or take another token."
    elif status in (409, 412):
        problem, advice = f"{repository} changed in the meantime", _AGAIN
    else:
        problem, advice = f"{hub} answers {status}{when}", f"Correct what it names, or wait. {_AGAIN}"
    return f"{problem}: {reason}. {advice}"


def _cause(error: BaseException) -> BaseException:
    """Return the hub's answer or the network error that an error of the client was raised from."""
    from huggingface_hub.errors import HfHubHTTPError

    found: BaseException | None = error
    while found is not None:
        if isinstance(found, HfHubHTTPError) or _is_network(found):
            return found
        found = found.__cause__
    return error


def _is_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("httpx")


def _reason(error: BaseException) -> str:
    """Return the problem without advice and secrets."""
    text = getattr(error, "server_message", None) or str(error)
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")][:2]
    # Addresses of the storage are signed: whoever has one can write there.
    text = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", without_password(" ".join(lines)))
    text = re.sub(r"\bhf_\w+|(?<=Bearer )\S+", "***", text)
    return shorten(text, 300, placeholder=" ...").rstrip(".:;, ") or type(error).__name__
