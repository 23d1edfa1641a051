"""Checkpoints go up to the Hugging Face hub: in one commit, and without sending again what has arrived.

The client's ``create_commit`` sends large files before the commit that names them, less those that the hub
holds already; until then no reader sees them. Its ``upload_folder`` would not do: it splits large folders
into several commits, between which readers find half a checkpoint.
"""

import hashlib
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import HubError
from core.export.hub_errors import hub_errors
from core.export.hub_files import checkpoint_files, is_stale
from core.storage.hashing import file_sha256

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PushPlan:
    """What an upload changes in a repository.

    Attributes:
        files: Name in the repository to file, of those that are new there or differ.
        unchanged: Names of those that are there already.
        stale: Names in the repository that belonged to another checkpoint and go.
        head: Commit that the upload builds on; "" if there is none yet.
        is_new: Whether the repository does not exist yet.
    """

    files: dict[str, Path]
    unchanged: tuple[str, ...]
    stale: tuple[str, ...]
    head: str
    is_new: bool

    @property
    def changes(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self.files or self.stale)

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that differ; large ones that the hub holds already are not sent all the same."""
        return sum(path.stat().st_size for path in self.files.values())


def push_checkpoint(
    checkpoint: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str = "main",
    message: str = "Upload the checkpoint",
) -> str:
    """Upload a checkpoint to a model repository on the Hugging Face hub, which is created if missing.

    Readers see the commit before or all of the new one. A call that was cut off can be made again: what has
    arrived is not sent again. If nothing differs there is no commit.

    Args:
        checkpoint: The folder; all of it is checked before anything is sent.
        repository: ``user/name`` or ``organization/name``.
        private: Whether a new repository is private; one that is there must be.
        revision: A branch, which is created if missing.
        message: Of the commit.

    Returns:
        URL of the commit; of the one that is there if nothing has changed.

    Raises:
        CheckpointError: If the folder holds no complete checkpoint, or pickles.
        IntegrityError: If it is a publication, and a file is not what its manifest says.
        HubError: If there is no token, or the hub refuses something or cannot be reached.
    """
    files = checkpoint_files(checkpoint)
    api = _open_hub(repository, revision)
    with hub_errors(repository):
        found = _find(api, repository)
        if found is None:
            api.create_repo(repository, private=private or None, exist_ok=True)
        elif private and not found.private:
            raise HubError(
                f"{repository} is public, and --private does not change that. Make it private in its "
                "settings on the hub, or leave --private out."
            )
        if _head(api, repository, revision) is None and revision != "main":
            api.create_branch(repository, branch=revision, exist_ok=True)
        plan = _compare(api, repository, revision, files)
    if not plan.changes:
        log.info("%s holds this checkpoint already: nothing to commit", repository)
        return f"{api.endpoint}/{repository}/commit/{plan.head}"
    return _send(api, repository, plan, revision=revision, message=message)


def plan_push(checkpoint: Path, repository: str, *, revision: str = "main") -> PushPlan:
    """Return what ``push_checkpoint`` would change; nothing is created or sent.

    Raises:
        CheckpointError: As ``push_checkpoint``.
        IntegrityError: As ``push_checkpoint``.
        HubError: As ``push_checkpoint``.
    """
    files = checkpoint_files(checkpoint)
    api = _open_hub(repository, revision)
    with hub_errors(repository):
        if _find(api, repository) is None:
            return PushPlan(files=files, unchanged=(), stale=(), head="", is_new=True)
        return _compare(api, repository, revision, files)


def _open_hub(repository: str, revision: str) -> "HfApi":
    """Check what can be checked without the hub, and return its client."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise HubError(
            f"REPOSITORY={repository} is no id of a model repository. Give it as user/name or "
            "organization/name: letters, digits, '-', '_' and '.', without an address before it."
        )
    if re.fullmatch("[0-9a-f]{40}", revision) or not re.fullmatch(r"[\w.][\w./-]*", revision):
        raise HubError(f"revision={revision} is not the name of a branch. Name one, such as main.")
    token = get_token()
    if not token:
        raise HubError(
            "there is no token for the Hugging Face hub. Make one with write access at "
            "https://huggingface.co/settings/tokens and give it as HF_TOKEN, or run `hf auth login`."
        )
    return HfApi(token=token, library_name="adapt-pruner")


def _find(api: "HfApi", repository: str) -> "ModelInfo | None":
    """Return what the hub says of a repository; None if it is not there, or hidden from this token."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return api.model_info(repository)
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError) or error.response.status_code != 404:
            raise
    return None


def _head(api: "HfApi", repository: str, revision: str) -> str | None:
    """Return the commit that a branch ends at; None if there is no such branch."""
    refs = api.list_repo_refs(repository)
    if revision in {tag.name for tag in refs.tags}:
        raise HubError(f"revision={revision} is a tag of {repository}, which stays. Name a branch.")
    return next((branch.target_commit for branch in refs.branches if branch.name == revision), None)


def _compare(api: "HfApi", repository: str, revision: str, files: dict[str, Path]) -> PushPlan:
    from huggingface_hub.hf_api import RepoFile

    # A branch that is still to be made starts where main is.
    head = _head(api, repository, revision) or _head(api, repository, "main") or ""
    tree = api.list_repo_tree(repository, recursive=True, revision=head) if head else ()
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    if ".gitignore" in there:
        raise HubError(
            f"{repository} has a .gitignore, by which the hub may leave files of the checkpoint out. "
            "Remove it."
        )
    same = [name for name, path in files.items() if name in there and _is_same(path, there[name])]
    return PushPlan(
        files={name: path for name, path in files.items() if name not in same},
        unchanged=tuple(same),
        stale=tuple(sorted(name for name in there if name not in files and is_stale(name))),
        head=head,
        is_new=False,
    )


def _is_same(path: Path, there: "RepoFile") -> bool:
    if path.stat().st_size != there.size:
        return False
    if there.lfs is not None:
        return file_sha256(path) == there.lfs.sha256
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return blob.hexdigest() == there.blob_id


def _send(api: "HfApi", repository: str, plan: PushPlan, *, revision: str, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    log.info("%s: %d files, %s", repository, len(plan.files), _size(plan.size_bytes))
    for name in plan.stale:
        log.info("removing %s, which is not part of this checkpoint", name)
    start = time.monotonic()
    with hub_errors(repository, " during the upload"):
        commit = api.create_commit(
            repository,
            operations=[
                *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in plan.stale),
                *(
                    CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
                    for name, path in plan.files.items()
                ),
            ],
            commit_message=message,
            revision=revision,
            num_threads=1,  # of what is cut off, one file at most is sent again
            # What is removed was decided on this commit: one that somebody has made since is not undone.
            parent_commit=plan.head or None,
        )
    log.info("committed after %.1f s", time.monotonic() - start)
    return str(commit.commit_url)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 1e5 else f"{size_bytes:,} bytes"
