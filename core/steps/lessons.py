"""What the teacher expects of a phase's slice, stored before it trains: ``training.teacher_logits: stored``.

A part of recover-train and not of prepare-data, whose task has no accelerator; so only the lessons of one
phase are stored at a time. Each part of the rows is a publication: a task that was killed goes on behind the
last one. All go with the phase's training states, as a slice is trained on once.
"""

import functools
import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from core.errors import IntegrityError, StorageError
from core.machine.memory import available_bytes
from core.model.build import dtype_of, load_model, model_shape
from core.model.checkpoint import Checkpoint
from core.model.loss import chunk_positions
from core.model.simulation import simulate_inference
from core.progress import Progress
from core.settings.training import TrainingSettings
from core.steps.footprint import LIBRARIES, MOST_TOKENS, Footprint, check_fit
from core.steps.training_plan import number_of_ranks
from core.storage.interface import join_uri
from core.storage.publication import find_publication, open_publication, publish
from core.storage.store import open_store
from core.training.lessons import bytes_a_position
from core.training.objective import write_lessons
from core.training.parallel.launch import run_ranks
from core.training.resume import remove_states
from core.training.rows import read_rows

log = logging.getLogger(__name__)

PART_BYTES = 2**28
"""Size of a part, about."""
_FILE = "lessons.safetensors"


def lessons_footprint(
    config: PreTrainedConfig, settings: TrainingSettings, micro_batch: int, *, device: str
) -> Footprint:
    """Estimate what it takes to store what a teacher expects.

    Args:
        config: Of the teacher.
        settings: Of the training.
        micro_batch: Sequences that it reads at once.
        device: Type of the device.
    """
    dtype = dtype_of(settings.precision) or torch.float32
    weights, length = model_shape(config).num_params() * dtype.itemsize, settings.sequence_length
    passes = simulate_inference(config, dtype, micro_batch, length)
    positions = min(chunk_positions(config.vocab_size, device), micro_batch * length)
    # Logits, their copy at the temperature, logarithms and probabilities.
    logits = positions * config.vocab_size * (12 + dtype.itemsize)
    return Footprint(
        parts={
            "base model": weights,
            "activations, then logits": max(passes.peak, passes.kept + logits),
            "libraries": LIBRARIES,
        },
        host_bytes=weights,
    )


@dataclass(frozen=True, kw_only=True)
class LessonTask:
    """What the parts are made of, and where they go; it can be pickled.

    Attributes:
        uri: Holds the parts.
        base: Folder of the teacher.
        rows: File of the phase's slice.
        settings: Of the training.
        made_of: Digests and settings. A part of other ones is not used.
        device: Type of the device.
        explaining: Turns running out of memory into one line.
        scratch: Folder for parts on their way.
        micro_batch: Sequences that the teacher reads at once.
    """

    uri: str
    base: Path
    rows: Path
    settings: TrainingSettings
    made_of: dict[str, Any]
    device: str
    explaining: Callable[[], AbstractContextManager[None]]
    scratch: Path
    micro_batch: int = 1

    def place(self, number: int) -> str:
        """Return where a part is published."""
        return join_uri(self.uri, f"{number:06d}")

    def part(self, number: int) -> Path:
        """Return a folder for a part on its way."""
        return self.scratch / f"{number:06d}"


def store_lessons(task: LessonTask) -> tuple[tuple[Path, ...], dict[str, float]]:
    """Have the teacher read those parts of the slice that are not stored yet, and fetch them all.

    Returns:
        The files, in the order of the rows. And figures: bytes a trained token, the mean probability of what
        is kept of it, and the mean divergence of the others being as likely as each other.

    Raises:
        StorageError: If there is too little space for them.
        OutOfMemoryError: If the teacher does not fit into the memory.
    """
    rows, config = read_rows(task.rows), Checkpoint(task.base).config
    a_position = bytes_a_position(config.vocab_size, task.settings.teacher_top_k)
    a_row = a_position * rows.input_ids.shape[1]
    firsts = range(0, len(rows.input_ids), max(1, PART_BYTES // a_row))
    missing = [number for number, _ in enumerate(firsts) if not _is_stored(task, number, firsts)]
    if missing:
        positions = sum(rows.part(firsts[number], firsts.step).trained_tokens for number in missing)
        _check_space(task, positions * a_position, a_position)
        ranks = number_of_ranks(task.settings, task.device)
        planned = replace(task, micro_batch=_micro_batch(task, config, ranks))
        work = functools.partial(_write_parts, planned, firsts, missing, ranks)
        if ranks > 1:
            run_ranks(work, ranks, task.device)
        else:
            work(0)
    parts = [open_publication(task.place(number)) for number, _ in enumerate(firsts)]
    files = tuple(part.fetch(task.part(number)) / _FILE for number, part in enumerate(parts))
    positions, kept, left_out = (
        sum(part.manifest.metadata[name] for part in parts) for name in ("positions", "kept", "left_out")
    )
    figures = {
        "teacher_bytes_a_token": a_position,
        "teacher_kept": kept / max(positions, 1),
        "teacher_left_out": left_out / max(positions, 1),
    }
    log.info(
        "the teacher's %d likeliest tokens are stored, %d bytes a trained token, %.1f GB: they are %.2f %% "
        "of what it expects; that the others count as one leaves out %.3g nats",
        *(min(task.settings.teacher_top_k, config.vocab_size), a_position, a_position * positions / 1e9),
        *(100 * figures["teacher_kept"], figures["teacher_left_out"]),
    )
    return files, figures


def _is_stored(task: LessonTask, number: int, firsts: range) -> bool:
    """Return whether a part is there; one that is damaged or was made of something else is removed."""
    wanted = task.made_of | {"first": firsts[number], "rows": firsts.step}
    try:
        found = find_publication(task.place(number))
        if found is None:
            return False
        if wanted.items() <= found.manifest.metadata.items():
            found.fetch(task.part(number))
            return True
    except IntegrityError as error:
        problem = str(error).partition(". ")[0]  # its advice is carried out here
        log.warning("part %d of what the teacher expects is computed again: %s", number, problem)
    remove_states(task.uri, steps=range(number, number + 1))
    return False


def _micro_batch(task: LessonTask, config: Any, ranks: int) -> int:
    free = available_bytes(task.device)
    if task.device == "cpu":
        free //= ranks  # they share the machine
    most = max(1, MOST_TOKENS.get(task.device, 32768) // task.settings.sequence_length)
    size = 2 ** (most.bit_length() - 1)
    footprint = functools.partial(lessons_footprint, config, task.settings, device=task.device)
    while size > 1 and footprint(size).device_bytes > 0.8 * free:
        size //= 2
    without = [("training.teacher=none", Footprint(parts={}))]
    check_fit("the teacher", footprint(size), free, task.device, (), without)
    return size


def _check_space(task: LessonTask, needed: int, a_position: int) -> None:
    """Refuse to begin what the disk has no room for; how much a server has is not known."""
    folder = open_store(task.uri).local_path("")
    place = task.scratch if folder is None else folder
    place = next(each for each in (place, *place.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StorageError(
            f"what the teacher expects takes {needed / 1e9:.1f} GB ({a_position} bytes a trained token of a "
            f"phase), and {place} has {free / 1e9:.1f} GB left. Make room there, or lower "
            "training.teacher_top_k or set training.teacher_logits=live, which makes it another run."
        )


def _write_parts(task: LessonTask, firsts: range, missing: list[int], ranks: int, rank: int) -> None:
    """Write and publish a rank's share of the missing parts."""
    device = torch.device(task.device, rank) if task.device == "cuda" else torch.device(task.device)
    mine, rows = missing[rank::ranks], read_rows(task.rows)
    with task.explaining():
        model = load_model(task.base, dtype=dtype_of(task.settings.precision), device=device)
        total = sum(len(rows.part(firsts[number], firsts.step).input_ids) for number in mine)
        with Progress("teacher", total, "sequences") as progress:
            for number in mine:
                part = rows.part(firsts[number], firsts.step)
                folder = task.part(number)
                folder.mkdir(parents=True, exist_ok=True)
                coverage = write_lessons(
                    model,
                    part,
                    folder / _FILE,
                    top_k=task.settings.teacher_top_k,
                    temperature=task.settings.temperature,
                    micro_batch=task.micro_batch,
                )
                made = task.made_of | {"first": firsts[number], "rows": firsts.step}
                published = publish(folder, task.place(number), metadata=made | coverage._asdict())
                if published.folder is not None:
                    shutil.rmtree(folder)  # it is read in the store
                progress.add(len(part.input_ids))
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
