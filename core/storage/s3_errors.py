"""What the errors of S3 mean, and what to do: in our words, as boto3's are long and may name credentials."""

from botocore.exceptions import (
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from s3transfer.exceptions import S3DownloadFailedError, S3ValidationError
from urllib3.exceptions import HTTPError

BROKEN_OFF = (HTTPClientError, IncompleteReadError, HTTPError, OSError)
"""What is raised when a reply does not come, or not to its end."""

_EXPIRED = ("ExpiredToken", "TokenRefreshRequired")
_DENIED = ("InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_FULL = ("InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded")
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def status_of(error: ClientError) -> int:
    """Return the HTTP status that a server has answered with, 0 for none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    """Return what S3 calls the error; the status where the answer has no name for it."""
    return str(error.response.get("Error", {}).get("Code") or status_of(error))


def answer_text(endpoint: str, status: int, code: str) -> str:
    """Say what an error that a server answers with means, and what to do."""
    if code == "RequestTimeTooSkewed":
        return f"the clocks of this machine and of {endpoint} differ too much. Set the clock"
    if code in _EXPIRED:
        return f"the credentials for {endpoint} have expired ({code}). Get new ones, then rerun to resume"
    if status == 507 or code in _FULL:
        return f"{endpoint} has no space left ({code}). Free space there, then rerun to resume"
    if status in (401, 403) or code in _DENIED:
        return f"{endpoint} denies access ({code}). Check {_CREDENTIALS} and their permissions"
    answer = " ".join(dict.fromkeys([str(status), code]))
    return f"{endpoint} answers {answer}. Check the server, then rerun to resume"


def failure_text(endpoint: str, bucket: str, error: Exception) -> str:
    """Say what it means that no server has answered, or not in full, and what to do."""
    kind = type(error).__name__
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return f"there are no credentials for {endpoint}. Set {_CREDENTIALS}, or AWS_PROFILE"
    if isinstance(error, ParamValidationError):
        return f"{bucket} is not a valid bucket name. Correct the URI"
    if isinstance(error, S3DownloadFailedError):
        return "it was replaced while it was read. Rerun to resume"
    if isinstance(error, S3ValidationError | FlexibleChecksumError):
        return f"{endpoint} sends other bytes than it says ({kind}). Check the server, then rerun to resume"
    if isinstance(error, BotoConnectionError):
        return f"{endpoint} cannot be reached ({kind}). Check AWS_ENDPOINT_URL_S3 and the network"
    if isinstance(error, BROKEN_OFF):
        return f"the connection to {endpoint} breaks off ({kind}). Check the network, then rerun to resume"
    return f"{endpoint} cannot be used ({kind}). Check the AWS_ variables"
