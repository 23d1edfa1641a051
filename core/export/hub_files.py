"""Which files of a checkpoint are uploaded, and which files on the hub are left of another checkpoint."""

import fnmatch
from pathlib import Path
from typing import Any

from core.errors import CheckpointError
from core.model.checkpoint import PICKLES, PROVENANCE, CheckpointReader, is_companion, weight_files
from core.storage.interface import is_temporary
from core.storage.layout import CARD, HTML, RECORD, REPORT
from core.storage.publication import OWN, published_in, verify_folder
from core.untrusted import check_file, parse_object, read_limited

_STAYS_HERE = (*OWN, REPORT, RECORD, HTML)
"""Files of the run; the report and the record name where it is stored and tracked."""
_OF_A_CHECKPOINT = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "modeling_*.py",
    "configuration_*.py",
    PROVENANCE,
)


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Check a checkpoint and return name in the repository to file: small files, then weights in order.

    A publication is verified by its manifest, except for the model card, which may have been edited.

    Raises:
        CheckpointError: If it is not a complete checkpoint, or holds pickles.
        IntegrityError: If it is a publication, and a file is not what its manifest says.
    """
    published = published_in(folder)
    if published is not None:
        names = published.manifest.paths
        folder = verify_folder(folder, may_differ=(CARD,))
    else:
        paths = [path for path in folder.rglob("*") if not path.is_dir() and not is_temporary(path.name)]
        names = [path.relative_to(folder).as_posix() for path in paths]
    names = [name for name in names if name not in _STAYS_HERE and not _is_hidden(name)]
    for name in names:
        check_file(folder / name, folder)
    pickles = sorted(name for name in names if Path(name).suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickles, which can run code where they are loaded: {', '.join(pickles[:5])}. "
            "Remove them."
        )
    _check_config(folder)
    if CARD in names:
        _check_card(folder / CARD)
    _check_weights(folder, [name for name in names if name.endswith(".safetensors")])
    return {name: folder / name for name in sorted(names, key=lambda n: (n.endswith(".safetensors"), n))}


def is_stale(name: str) -> bool:
    """Return whether a file of a repository is part of a checkpoint, and is removed when another comes.

    Loaders would mix them up: they prefer a ``model.safetensors`` to all shards. Everything else stays: the
    card, the licence, pictures, GGUF files, folders.
    """
    if "/" in name or name.upper().startswith(("LICENSE", "NOTICE")):
        return False
    return is_companion(name) or any(fnmatch.fnmatch(name, pattern) for pattern in _OF_A_CHECKPOINT)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in name.split("/"))


def _check_config(folder: Path) -> None:
    """Check that there is a config, and the code that it names."""
    path = folder / "config.json"
    try:
        config: Any = parse_object(read_limited(path)) if path.exists() else None
        if config is None:
            raise FileNotFoundError
        code = {str(target).split(".")[0] for target in config.get("auto_map", {}).values()}
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no config.json. Give the folder of a Hugging Face checkpoint."
        ) from None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a model's config. Write the checkpoint again.") from error
    lacking = sorted(f"{module}.py" for module in code if not (folder / f"{module}.py").is_file())
    if lacking:
        raise CheckpointError(
            f"{path} names code that is missing: {', '.join(lacking)}. Write the checkpoint again."
        )


def _check_card(path: Path) -> None:
    """Check the card's front matter, which the hub would check only after all else was sent."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(path.read_text())
    except Exception as error:  # of its YAML parser, or of its own
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CheckpointError(f"{path} has no valid front matter: {reason}. Correct it.") from error


def _check_weights(folder: Path, shards: list[str]) -> None:
    """Read every tensor that the index names, and refuse weights that it does not name."""
    with CheckpointReader(folder) as reader:
        for name in reader.names():
            reader.tensor(name)
    if others := sorted(set(shards) - weight_files(folder)):
        raise CheckpointError(
            f"{folder} holds weights that its index does not name: {', '.join(others[:5])}. Remove them."
        )
