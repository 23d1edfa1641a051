"""Where a base model comes from: a folder, a GGUF file, a store, an installed package or the hub.

A registry's alias and a HEAD file are followed first (``core.bases.resolution``).

Whatever it is, it becomes a publication in the run's store, so that all later steps read it verified and the
network is needed no more.
"""

import contextlib
import fnmatch
import functools
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from core.bases.licence import card_facts, gguf_facts
from core.bases.resolution import current_base
from core.data.locations import locate
from core.errors import CheckpointError
from core.model.build import build_model, check_fit, check_tied
from core.model.checkpoint import INDEX, LEGAL, PROVENANCE, Checkpoint, save_model, weight_files
from core.model.gguf_header import GgufHeader, read_gguf_header
from core.runs.record import public_path
from core.scratch import scratch_folder
from core.settings.addresses import hub_address
from core.settings.model import ModelSettings
from core.storage.hashing import file_sha256
from core.storage.interface import join_uri
from core.storage.layout import CARD
from core.storage.manifest import FileEntry, Manifest
from core.storage.publication import MANIFEST, find_publication, publish, published_in
from core.storage.transfer import verify_in_place
from core.untrusted import MAX_TOKENIZER_BYTES, files_of, foreign_errors, parse_object, read_limited

log = logging.getLogger(__name__)

_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", *LEGAL)
_HUB_TIMEOUT_S = 10


def import_base(settings: ModelSettings, store: str, *, tracking_uri: str = "") -> tuple[str, str]:
    """Make sure that the base model is published, and name its revision.

    Args:
        settings: Which model.
        store: Store that takes it up, under ``bases/<revision>``.
        tracking_uri: MLflow's address, for a model of its registry; empty takes ``MLFLOW_TRACKING_URI``.

    Returns:
        URI of the publication, and the revision: a hub commit, or a digest of the content.

    Raises:
        CheckpointError: If there is no such model.
        StorageError: If the store cannot be written.
        TrackingError: If MLflow is asked and cannot be reached.
    """
    current = current_base(settings, tracking_uri)
    try:
        return _import(current, store)
    except CheckpointError as error:
        if current.base == settings.base or hub_address(settings.base):
            raise
        raise CheckpointError(f"model.base={settings.base} stands for {current.base} now. {error}") from error


def _import(settings: ModelSettings, store: str) -> tuple[str, str]:
    hub = hub_address(settings.base)
    if hub is not None:
        return _import_from_hub(hub[0], settings.revision, store)
    if "://" in settings.base:
        published = find_publication(settings.base)
        if published is None:
            raise CheckpointError(
                f"model.base={settings.base} is not a published checkpoint (it has no manifest)."
            )
        return settings.base, published.manifest.digest[:16]
    location = locate(settings.base)
    if location is None:
        return _import_from_hub(settings.base, settings.revision, store)
    if location.suffix == ".gguf":
        revision = file_sha256(location)[:16]
        return _publish_once(store, revision, settings.base, lambda: _dequantized(location)), revision
    if not (location / "config.json").is_file():
        raise CheckpointError(
            f"model.base={settings.base} is neither a .gguf file nor a folder with a config.json. "
            "Correct the path."
        )
    files = tuple(FileEntry.of(location, path.name) for path in _belonging(location))
    _compare_with_manifest(location, files)
    revision = Manifest(files=files).digest[:16]
    return _publish_once(store, revision, settings.base, lambda: _checked(location, settings.base)), revision


def _compare_with_manifest(folder: Path, files: Iterable[FileEntry]) -> None:
    """Refuse a base model that was published and is damaged."""
    published, found = published_in(folder), {entry.path: entry for entry in files}
    weights = _weights_of(folder)
    for entry in published.manifest.files if published else ():
        if _is_wanted(entry.path, weights) and found.get(entry.path) != entry:
            verify_in_place(folder, str(folder.resolve()), [entry])


def _publish_once(
    store: str, revision: str, base: str, directory: Callable[[], contextlib.AbstractContextManager[Path]]
) -> str:
    uri = join_uri(store, "bases", revision)
    if find_publication(uri) is None:
        log.info("importing %s into the store", base)
        with directory() as path:
            publish(path, uri, metadata={"base": base, "revision": revision})
    return uri


def _belonging(folder: Path) -> list[Path]:
    """Return the files of a checkpoint, without whatever else lies beside them.

    Raises:
        CheckpointError: If one is not a regular file, or leads out of the folder.
    """
    files_of(folder, lambda name: name == INDEX)  # checked before it is read
    weights = _weights_of(folder)
    found = files_of(folder, lambda name: _is_wanted(name, weights))
    for path in found:
        if path.suffix != ".safetensors" and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(
                f"{path} is larger than {MAX_TOKENIZER_BYTES / 1e6:.0f} MB, which no file beside the weights "
                "is. Fetch it again, or remove it."
            )
    return found


def _weights_of(folder: Path) -> set[str]:
    """Return the names of the weights that are read: none of a damaged index, of which reading it tells."""
    try:
        return weight_files(folder)
    except CheckpointError:
        return set()


def _is_wanted(name: str, weights: Collection[str]) -> bool:
    if name in weights:
        return True
    return name != MANIFEST and any(fnmatch.fnmatchcase(name, pattern) for pattern in _BESIDE_WEIGHTS)


@contextlib.contextmanager
def _checked(location: Path, base: str) -> Iterator[Path]:
    """Check a checkpoint, gather its files, and write down what it says of its licence."""
    _read_whole(location)
    with scratch_folder() as scratch:
        for path in _belonging(location):
            (scratch / path.name).symlink_to(path.resolve())
        _write_facts(scratch, card_facts(location / CARD), base)
        yield scratch


def _write_facts(folder: Path, facts: Mapping[str, Any], base: str) -> None:
    """Add what the base's card states of its licence to what is known of the checkpoint's making."""
    if not facts:
        return
    own, before = folder / PROVENANCE, {"base": public_path(base)}
    if own.exists():  # the base is a result of this package
        with contextlib.suppress(ValueError):
            before = parse_object(read_limited(own))
        own.unlink()  # a link to the file of the base, which stays as it is
    own.write_text(json.dumps({**before, **facts}, indent=1))


def _read_whole(folder: Path) -> None:
    """Let what would make every later step fail come to light before it is in the store.

    Raises:
        CheckpointError: If there are no weights, one cannot be read, or they contradict the config.
        UnsupportedModelError: If the family is not supported.
    """
    checkpoint = Checkpoint(folder)
    with checkpoint.weights() as reader:
        for name in reader.names():
            reader.tensor(name)
    check_fit(checkpoint)
    check_tied(checkpoint)


def _refuse_scaled_frequencies(location: Path, header: GgufHeader) -> None:
    """Refuse rotary frequencies that transformers does not read from GGUF files: it would be another model.

    Raises:
        CheckpointError: If the file has any.
    """
    values = {key.partition(".")[2]: value for key, value in header.values.items()}
    found = [name for name in header.tensors if re.fullmatch(r"rope_(freqs|factors_\w+)\.weight", name)]
    if values.get("rope.scaling.type", "none") != "none":
        found.append(f"rope.scaling.type={values['rope.scaling.type']}")
    found += [
        name for name in ("rope.scaling.factor", "rope.scale_linear") if values.get(name, 1) not in (0, 1)
    ]
    if found:
        raise CheckpointError(
            f"{location} scales its rotary frequencies ({', '.join(found)}), which cannot be read from GGUF "
            "files yet. Name the model's safetensors instead."
        )


@contextlib.contextmanager
def _dequantized(location: Path) -> Iterator[Path]:
    """Write the float32 checkpoint that a GGUF file holds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.initialization import no_init_weights

    _refuse_scaled_frequencies(location, read_gguf_header(location))

    def unreadable(said: str) -> CheckpointError:
        return CheckpointError(f"{location} cannot be read as GGUF: {said}. Fetch it again.")

    log.info("dequantizing %s (once; some seconds)", location.name)
    # Alone in a folder: the library would also read what lies beside the file, adapters and code among it.
    with (
        foreign_errors(unreadable),
        scratch_folder() as alone,
        _one_gguf_reader(),
    ):
        file = alone / "model.gguf"
        file.symlink_to(location.resolve())
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": str(alone),
            "gguf_file": file.name,
            "trust_remote_code": False,
        }
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # The loaded model calls itself quantized and refuses to be saved: move its weights into a clean one.
        data = quantized.config.to_dict()
        data.pop("quantization_config", None)
        config = type(quantized.config).from_dict(data | {"dtype": "float32"})
        with no_init_weights():
            model = build_model(config)
        model.load_state_dict(quantized.state_dict(), assign=True)
        model.tie_weights()
        facts = gguf_facts(file)
    with scratch_folder() as scratch:
        tokenizer.save_pretrained(scratch)
        model.generation_config.save_pretrained(scratch)
        provenance = {"base": location.name, **facts}
        save_model(model, scratch, companions=None, provenance=provenance)
        yield scratch


@contextlib.contextmanager
def _one_gguf_reader() -> Iterator[None]:
    """Let all who read a GGUF file share one reader: it takes seconds to list a vocabulary."""
    import gguf

    library: Any = gguf
    original = library.GGUFReader
    opened = functools.cache(original)
    library.GGUFReader = lambda path: opened(str(path))
    try:
        yield
    finally:
        library.GGUFReader = original


def _import_from_hub(name: str, revision: str, store: str) -> tuple[str, str]:
    from huggingface_hub import HfApi

    with _hub_errors(name):
        commit = HfApi().model_info(name, revision=revision or None, timeout=_HUB_TIMEOUT_S).sha
    assert commit is not None, "the hub names a commit for every revision"
    return _publish_once(store, commit, name, lambda: _downloaded(name, commit)), commit


@contextlib.contextmanager
def _downloaded(name: str, commit: str) -> Iterator[Path]:
    from huggingface_hub import snapshot_download

    log.info("downloading %s at %s", name, commit)

    def fetch(*patterns: str) -> Path:
        with _hub_errors(name):
            return Path(snapshot_download(name, revision=commit, allow_patterns=list(patterns)))

    # First what shows whether the rest is usable, and which weights are read.
    folder = fetch("config.json", INDEX)
    Checkpoint(folder)
    folder = fetch(*sorted(_weights_of(folder)), *_BESIDE_WEIGHTS, CARD)
    # The client's folder also holds what others have downloaded of this commit.
    with _checked(folder, name) as checked:
        yield checked


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into one line."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError:
        raise CheckpointError(
            f"model.base={name} is neither a folder nor a file nor a Hugging Face id. Correct it."
        ) from None
    except Exception as error:  # network errors are those of httpx or httpx2, by the client's version
        # The problem stands first; the hub's client adds advice of its own.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
        message = shorten(" ".join(lines), 300, placeholder=" ...").rstrip(".") or type(error).__name__
        raise CheckpointError(
            f"model.base={name} is not a local folder or file, and the Hugging Face hub does not give it: "
            f"{message}. Check the name, model.revision, the network and, for a private or gated model, "
            "HF_TOKEN."
        ) from error
