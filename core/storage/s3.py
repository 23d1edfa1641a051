"""The S3 store: boto3 with its transfer manager, parallel and multipart, with retries and backoff."""

import contextlib
import dataclasses
import functools
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError, S3ValidationError
from urllib3.exceptions import HTTPError

from core.errors import StorageError
from core.storage.hashing import HashedStream
from core.storage.interface import StoredFile, check_key, join_uri, local_errors
from core.storage.s3_errors import BROKEN_OFF, answer_text, code_of, failure_text, status_of
from core.storage.s3_retries import retry

_CONNECTIONS = 16
# Eight attempts outlast a restart of some seconds; an endpoint that swallows packets fails in 40 s at most.
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S, _ATTEMPTS = 4, 60, 8
_UNTOLD = (BotoCoreError, ClientError, S3DownloadFailedError, S3ValidationError, HTTPError)
# Pauses between attempts while another writer is at the same key (status 409).
_PAUSES_S = (0.1, 0.2, 0.4, 0.8, None)
_CONDITIONAL = set[tuple[str, str]]()
"""Endpoints and buckets that were seen to keep what is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Connection:
    """What one environment of AWS variables leads to."""

    client: Any
    transfers: Any
    """A transfer manager."""
    transfers_if_absent: Any
    """A transfer manager that replaces no object."""
    downloads: Any
    """A transfer manager that asks for ranges alone."""
    attempts: int
    """How often a request is made at most."""


class S3Store:
    """A store under a prefix of a bucket; see ``core.storage.store.Store`` for the methods."""

    def __init__(self, bucket: str, prefix: str) -> None:
        """Use the keys of ``bucket`` below ``prefix``; nothing is contacted yet.

        Raises:
            StorageError: If boto3's environment (endpoint, profile, credentials) is invalid.
        """
        self.uri = join_uri(f"s3://{bucket}", prefix)
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        try:
            self._connection = _connect(
                frozenset(pair for pair in os.environ.items() if pair[0].startswith("AWS_"))
            )
        except (BotoCoreError, ValueError) as error:
            # An endpoint without a scheme may hold a password all the same.
            problem = re.sub(r"\S+@", "***@", " ".join(str(error).split())).rstrip(".")
            raise StorageError(
                f"{self.uri} cannot be opened: {problem}. Correct the AWS_ variables."
            ) from error
        self._client = self._connection.client

    def read_bytes(self, key: str) -> bytes:
        """See ``Store``."""
        with self._errors(key, "read"):
            problem: Exception = AssertionError("there is at least one attempt")
            for _ in range(self._connection.attempts):
                try:
                    body = self._client.get_object(Bucket=self._bucket, Key=self._key(key))["Body"]
                except HTTPError as error:  # the text of an error breaks off: botocore does not expect that
                    problem = error
                    continue
                try:
                    return bytes(body.read())
                except BROKEN_OFF as error:
                    problem = error
            raise RetriesExceededError(problem)

    def write_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """See ``Store``."""
        with self._errors(key, "written"):
            if if_absent:
                return self._head(key) is None and self._put_if_absent(key, data)
            self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data)
            return True

    def exists(self, key: str) -> bool:
        """See ``Store``."""
        with self._errors(key, "read"):
            return self._head(key) is not None

    def list(self, prefix: str = "") -> Iterator[str]:
        """See ``Store``."""
        return (file.key for file in self.stored(prefix))

    def stored(self, prefix: str = "") -> Iterator[StoredFile]:
        """See ``Store``."""
        with self._errors(prefix, "listed"):
            for entry in self._entries("list_objects_v2", "Contents", prefix):
                yield StoredFile(
                    key=entry["Key"].removeprefix(self._prefix),
                    size=entry["Size"],
                    modified_s=entry["LastModified"].timestamp(),
                )

    def unfinished(self, prefix: str = "") -> Iterator[StoredFile]:
        """See ``Store``; the key is that of the file that was to be."""
        with self._errors(prefix, "listed"):
            for entry in self._entries("list_multipart_uploads", "Uploads", prefix):
                key = entry["Key"].removeprefix(self._prefix)
                upload = {"Bucket": self._bucket, "Key": entry["Key"], "UploadId": entry["UploadId"]}
                pages = self._client.get_paginator("list_parts").paginate(**upload)
                try:
                    size = sum(part["Size"] for page in pages for part in page.get("Parts", ()))
                except ClientError as error:
                    if status_of(error) != 404:
                        raise
                    continue  # completed meanwhile
                yield StoredFile(
                    key=key,
                    size=size,
                    modified_s=entry["Initiated"].timestamp(),
                    upload=entry["UploadId"],
                )

    def discard(self, unfinished: StoredFile) -> None:
        """See ``Store``."""
        key = unfinished.key
        with contextlib.suppress(FileNotFoundError), self._errors(key, "deleted"):
            self._client.abort_multipart_upload(
                Bucket=self._bucket, Key=self._key(key), UploadId=unfinished.upload
            )

    def delete(self, key: str) -> None:
        """See ``Store``."""
        with self._errors(key, "deleted"):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(key))

    def upload(self, path: Path, key: str, *, if_absent: bool = False) -> str | None:
        """See ``Store``."""
        connection = self._connection
        transfers = connection.transfers_if_absent if if_absent else connection.transfers
        # What boto3 raises when a server keeps silent is an OSError, too, which is not about the file.
        with local_errors(path), self._errors(key, "written"):
            for pause_s in _PAUSES_S:
                try:
                    with path.open("rb") as file:
                        stream = HashedStream(file)
                        size = _Size(os.fstat(file.fileno()).st_size)
                        transfers.upload(stream, self._bucket, self._key(key), subscribers=[size]).result()
                    return stream.sha256
                except ClientError as error:
                    status = status_of(error)
                    was_lost = code_of(error) == "NoSuchUpload" or (status == 412 and _was_retried(error))
                    if was_lost and self.sha256(key) == stream.sha256:
                        return stream.sha256  # it was completed, and the reply was lost
                    if if_absent and status == 412:
                        return None
                    if status != 409 or pause_s is None:
                        raise
                    time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def download(self, key: str, path: Path) -> str:
        """See ``Store``."""
        with local_errors(path), path.open("wb") as file, self._errors(key, "read"):
            stream = HashedStream(file)
            self._connection.downloads.download(self._bucket, self._key(key), stream).result()
        return stream.sha256

    def sha256(self, key: str) -> str | None:
        """See ``Store``."""
        try:
            return self.download(key, Path(os.devnull))
        except FileNotFoundError:
            return None

    def local_path(self, key: str) -> Path | None:
        """See ``Store``."""
        return None

    def _entries(self, operation: str, name: str, prefix: str) -> Iterator[dict[str, Any]]:
        """Yield what all pages of a listing below ``prefix`` hold under ``name``."""
        pages = self._client.get_paginator(operation).paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        for page in pages:
            yield from page.get(name, ())

    def _key(self, key: str) -> str:
        check_key(key)
        return self._prefix + key

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            head: dict[str, Any] = self._client.head_object(Bucket=self._bucket, Key=self._key(key))
            return head
        except ClientError as error:
            if status_of(error) != 404:
                raise
            self._client.head_bucket(Bucket=self._bucket)  # a HEAD does not say which of the two is missing
            return None

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        at = {"Bucket": self._bucket, "Key": self._key(key), "Body": data, "IfNoneMatch": "*"}
        for pause_s in _PAUSES_S:
            try:
                self._client.put_object(**at)
                break
            except ClientError as error:
                status = status_of(error)
                if status == 412:
                    # If the reply to a first attempt was lost, its retry meets what that attempt has written.
                    return _was_retried(error) and self.read_bytes(key) == data
                if status == 501:
                    raise self._unconditional(key) from error
                if status != 409 or pause_s is None:  # 409: another writer is at it just now
                    raise
                time.sleep(pause_s)
        place = (self._client.meta.endpoint_url, self._bucket)
        if place not in _CONDITIONAL:
            try:
                self._client.put_object(**at)
            except ClientError as error:
                if status_of(error) not in (409, 412):
                    raise
            else:  # ignored: what is there was replaced
                self._client.delete_object(Bucket=self._bucket, Key=self._key(key))
                raise self._unconditional(key)
            _CONDITIONAL.add(place)
        return True

    def _unconditional(self, key: str) -> StorageError:
        return StorageError(
            f"{join_uri(self.uri, key)} cannot be written: its server does not support conditional writes "
            "(If-None-Match: *), by which one of several writers wins. Use one that does, such as AWS S3 or "
            "SeaweedFS."
        )

    @contextlib.contextmanager
    def _errors(self, key: str, action: str) -> Iterator[None]:
        try:
            yield
        except RetriesExceededError as error:
            raise self._explained(error.last_exception, key, action) from error
        except _UNTOLD as error:
            raise self._explained(error, key, action) from error

    def _explained(self, error: Exception, key: str, action: str) -> OSError | StorageError:
        """Return a missing key as FileNotFoundError, and all else as one line without boto's own words."""
        where = join_uri(self.uri, key)
        parts = urlsplit(self._client.meta.endpoint_url)
        endpoint = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        if isinstance(error, ClientError):
            error = self._in_words(error, key)
            status, code = status_of(error), code_of(error)
            is_missing = status == 404 and code != "NoSuchBucket" and self._has_bucket()
            if is_missing and action != "written":
                return FileNotFoundError(where)
            if status == 404 and not is_missing:
                problem = f"there is no bucket {self._bucket} at {endpoint}. Create it, or correct the URI"
            else:
                problem = answer_text(endpoint, status, code)
        else:
            problem = failure_text(endpoint, self._bucket, error)
        return StorageError(f"{where} cannot be {action}: {problem}.")

    def _in_words(self, error: ClientError, key: str) -> ClientError:
        """Return the same error with its code: a reply to HEAD has none, so the server is asked by GET."""
        if key and code_of(error) == str(status_of(error)) and status_of(error) in (400, 403):
            try:
                reply = self._client.get_object(Bucket=self._bucket, Key=self._key(key), Range="bytes=0-0")
                reply["Body"].close()
            except ClientError as told:
                return told if status_of(told) == status_of(error) else error
            except BotoCoreError:
                return error
        return error

    def _has_bucket(self) -> bool:
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except (BotoCoreError, ClientError) as error:
            return not (isinstance(error, ClientError) and status_of(error) == 404)
        return True


class _Size:
    """A subscriber that tells a transfer the size of its stream, by which it chooses the size of parts."""

    def __init__(self, size: int) -> None:
        self._size = size

    def on_queued(self, future: Any, **_: Any) -> None:
        future.meta.provide_transfer_size(self._size)


@functools.lru_cache(maxsize=4)
def _connect(environment: frozenset[tuple[str, str]]) -> _Connection:
    """Return clients and transfer managers for these variables; cached, as making them takes 0.2 s."""
    variables = dict(environment)
    own_endpoint = variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL")
    attempts = int(variables.get("AWS_MAX_ATTEMPTS", _ATTEMPTS))
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        max_pool_connections=2 * _CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": 1},  # we make our own
        s3={"addressing_style": "path" if own_endpoint else "auto"},
    )
    session = boto3.Session()
    client, careful = session.client("s3", config=config), session.client("s3", config=config)
    for one in (client, careful):
        retry(one, attempts=attempts)
    for operation in ("PutObject", "CompleteMultipartUpload"):
        careful.meta.events.register(f"provide-client-params.s3.{operation}", _if_absent)
    # On some machines boto3 would prefer the CRT, if that is installed: it knows no conditions, no endpoints
    # without TLS, and errors of its own.
    choose = functools.partial(
        TransferConfig,
        max_concurrency=_CONNECTIONS,
        num_download_attempts=attempts,
        preferred_transfer_client="classic",
    )
    # Where a reply breaks off, a download that is not made of ranges would write its beginning once more.
    ranges = choose(multipart_threshold=1)
    return _Connection(
        client=client,
        transfers=create_transfer_manager(client, choose()),
        transfers_if_absent=create_transfer_manager(careful, choose()),
        downloads=create_transfer_manager(client, ranges),
        attempts=attempts,
    )


def _was_retried(error: ClientError) -> bool:
    return error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0


def _if_absent(params: dict[str, Any], **_: Any) -> None:
    params["IfNoneMatch"] = "*"
