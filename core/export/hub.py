"""Uploads of checkpoints to the Hugging Face hub, in one commit, and without sending a file twice.

The client's ``create_commit`` carries retries and resumes: it sends large files that the hub lacks before the
commit that names them. Its ``upload_folder`` with ``delete_patterns`` does not serve: it splits large folders
into several commits, between which readers find half a checkpoint, and cannot say beforehand what it changes.
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
from core.quantities import bytes_text
from core.storage.hashing import file_sha256

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PushPlan:
    """What an upload changes in a repository."""

    files: dict[str, Path]
    """Name in the repository to file, of those that are new there or differ."""
    unchanged: tuple[str, ...] = ()
    """Names of those that are there already."""
    stale: tuple[str, ...] = ()
    """Names of files of another checkpoint, which are removed."""
    head: str = ""
    """Commit that the upload builds on; "" if there is none yet."""
    is_new: bool = False
    """Whether the repository does not exist yet."""

    @property
    def changes(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self.files or self.stale)

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that differ; of these, large ones that the hub has already are not sent."""
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

    Readers see the previous commit or all of the new one. An interrupted call can be repeated: files that
    have arrived are not sent again. If nothing differs there is no commit.

    Args:
        checkpoint: The folder; all of it is checked before anything is sent.
        repository: ``user/name`` or ``organization/name``.
        private: Whether a new repository is private; an existing one must be.
        revision: A branch, which is created if missing.
        message: Of the commit.

    Returns:
        URL of the commit; of the existing one if nothing has changed.

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
        _refuse_public(found, private)
        if _head(api, repository, revision) is None and revision != "main":
            api.create_branch(repository, branch=revision, exist_ok=True)
        plan = _compare(api, repository, revision, files)
    if not plan.changes:
        log.info("%s holds this checkpoint already: nothing to commit", repository)
        return f"{api.endpoint}/{repository}/commit/{plan.head}"
    return _send(api, repository, plan, revision=revision, message=message)


def plan_push(
    checkpoint: Path, repository: str, *, private: bool = False, revision: str = "main"
) -> PushPlan:
    """Return what ``push_checkpoint`` would change, with the same errors; nothing is created or sent."""
    files = checkpoint_files(checkpoint)
    api = _open_hub(repository, revision)
    with hub_errors(repository):
        if (found := _find(api, repository)) is None:
            return PushPlan(files=files, is_new=True)
        _refuse_public(found, private)
        return _compare(api, repository, revision, files)


def _open_hub(repository: str, revision: str) -> "HfApi":
    """Check the arguments and the token, and return the hub's client."""
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
            f"REPOSITORY={repository} is not a valid id of a model repository. Give it as user/name or "
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
    """Return the hub's description of a repository; None if it does not exist for this token."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return api.model_info(repository)
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError) or error.response.status_code != 404:
            raise
    return None


def _refuse_public(found: "ModelInfo | None", private: bool) -> None:
    if found is not None and private and not found.private:
        raise HubError(
            f"{found.id} is public, and --private does not change that. Make it private in its settings on "
            "the hub, or leave --private out."
        )


def _head(api: "HfApi", repository: str, revision: str) -> str | None:
    """Return the commit that a branch ends at; None if there is no such branch."""
    refs = api.list_repo_refs(repository)
    if revision in {tag.name for tag in refs.tags}:
        raise HubError(f"revision={revision} is a tag of {repository}, and tags do not move. Name a branch.")
    return next((branch.target_commit for branch in refs.branches if branch.name == revision), None)


def _compare(api: "HfApi", repository: str, revision: str, files: dict[str, Path]) -> PushPlan:
    from huggingface_hub.hf_api import RepoFile

    # A branch that is still to be made starts where main is.
    head = _head(api, repository, revision) or _head(api, repository, "main") or ""
    tree = api.list_repo_tree(repository, recursive=True, revision=head) if head else ()
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    if ".gitignore" in there:
        raise HubError(
            f"{repository} has a .gitignore, which may keep files of the checkpoint out. Remove it."
        )
    same = [name for name, path in files.items() if name in there and _is_same(path, there[name])]
    return PushPlan(
        files={name: path for name, path in files.items() if name not in same},
        unchanged=tuple(same),
        stale=tuple(sorted(name for name in there if name not in files and is_stale(name))),
        head=head,
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

    log.info("%s: %d files, %s", repository, len(plan.files), bytes_text(plan.size_bytes))
    for name in plan.stale:
        log.info("removing %s, which is not part of this checkpoint", name)
    start = time.monotonic()
    added = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=path) for n, path in plan.files.items()]
    removed = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in plan.stale]
    with hub_errors(repository, " during the upload"):
        commit = api.create_commit(
            repository,
            operations=[*removed, *added],
            commit_message=message,
            revision=revision,
            num_threads=1,  # after an interruption at most one file is sent again
            # What is removed was decided on this commit: a newer one by somebody else is not undone.
            parent_commit=plan.head or None,
        )
    log.info("committed after %.1f s", time.monotonic() - start)
    return str(commit.commit_url)
