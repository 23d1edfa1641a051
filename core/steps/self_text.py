"""The text that the base model writes for its own calibration: ``prune.generated_tokens``.

It is written once a run, before the first step that takes it: that needs an accelerator, and prepare-data has
none. Later phases find it published.
"""

import dataclasses
import functools
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from core.errors import AdaptPrunerError, IntegrityError
from core.machine.memory import available_bytes, free_unused
from core.machine.precision import warn_if_emulated
from core.model.build import dtype_of, load_model, load_tokenizer, pick_device
from core.model.checkpoint import Checkpoint
from core.pruning.self_calibration import write_text
from core.runs.run import Run
from core.steps.footprint import Footprint, check_fit, explaining_memory
from core.steps.frame import Workspace, compute_once
from core.steps.prune_footprint import most_at_once, writing_footprint, written_sequences
from core.storage.interface import join_uri
from core.storage.layout import GENERATED, RESUME
from core.storage.publication import open_publication, publish
from core.training.resume import published_steps, remove_states, state_name

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_FILE = "generated.safetensors"
_MOST_AT_ONCE = {"cpu": 128, "cuda": 512}
"""Sequences beyond which writing gets no faster."""
_KEPT_EVERY_S = 60.0


def write_own_text(run: Run) -> None:
    """Let the base model write what ``prune.generated_tokens`` asks for, unless that is published."""
    uri = run.uri(GENERATED)
    compute = functools.partial(_compute, run)
    compute_once(run, uri, phase=0, step="generate", compute=compute, whole=False)
    remove_states(join_uri(uri, RESUME))
    free_unused()  # what it took is free memory for what is planned now


def own_text(run: Run, scratch: Path) -> "Tensor":
    """Return (S, T) token ids that the base model has written; none where the recipe asks for none."""
    calibration = run.settings.calibration
    if not run.settings.prune.generates:
        return torch.empty(0, calibration.sequence_length, dtype=torch.long)
    folder = open_publication(run.uri(GENERATED)).fetch(scratch / GENERATED)
    return load_file(folder / _FILE)["input_ids"].long()


def _compute(run: Run, work: Workspace) -> dict[str, Any]:
    settings, device = run.settings, pick_device()
    calibration, sequences = settings.calibration, written_sequences(settings.calibration, settings.prune)
    checkpoint = Checkpoint(open_publication(run.base_uri).fetch(work.scratch / "base"))
    warn_if_emulated("calibration", calibration.precision, device)
    batch = _planned_batch(run, checkpoint, device.type, sequences)
    kept = _KeptText(join_uri(run.uri(GENERATED), RESUME), work.scratch / "kept")
    with explaining_memory("calibration.micro_batch=1"):
        model = load_model(checkpoint, dtype=dtype_of(calibration.precision), device=device)
        tokens = write_text(
            model,
            load_tokenizer(checkpoint.directory),
            sequences=sequences,
            length=calibration.sequence_length,
            batch=batch,
            seed=settings.seed,
            written=kept.newest(),
            keep=kept.keep,
        )
    save_file({"input_ids": tokens.int()}, work.out / _FILE)
    log.info("the base model has written %s tokens", f"{tokens.numel():,}")
    return {"tokens": tokens.numel(), "seconds": kept.earlier_s}


def _planned_batch(run: Run, checkpoint: Checkpoint, device: str, sequences: int) -> int:
    """Return how many sequences are written at once; logs what that will take.

    Raises:
        OutOfMemoryError: If the base model does not fit.
    """
    free, calibration = available_bytes(device), run.settings.calibration
    footprint = functools.partial(writing_footprint, checkpoint.config, calibration, device=device)
    size = most_at_once(calibration, run.settings.prune) or min(sequences, _MOST_AT_ONCE.get(device, 128))
    while not calibration.micro_batch and size > 1 and footprint(size).device_bytes > 0.8 * free:
        size = -(-size // 2)
    least = most_at_once(dataclasses.replace(calibration, micro_batch=1), run.settings.prune)
    smaller = [("calibration.micro_batch=1", footprint(least))] if size > least else []
    without = [("prune.generated_tokens=0", Footprint(parts={}))]
    check_fit("the base model's own text", footprint(size), free, device, smaller, without)
    return size


class _KeptText:
    """What is written so far, in the store: a publication named by its number of sequences.

    Attributes:
        earlier_s: Seconds that earlier attempts have given to what was found.
    """

    def __init__(self, uri: str, folder: Path) -> None:
        self._uri, self._folder, self.earlier_s = uri, folder, 0.0
        self._began = self._last = time.monotonic()

    def newest(self) -> "Tensor | None":
        """Return the (S, T) tokens of earlier attempts; None if there are none that are whole."""
        for sequences in reversed(published_steps(self._uri)):
            try:
                part = open_publication(join_uri(self._uri, state_name(sequences)))
                tokens = load_file(part.fetch(self._folder / "fetched") / _FILE)["input_ids"].long()
            except IntegrityError as error:
                log.warning("%d sequences of an earlier attempt are not used: %s", sequences, error)
                remove_states(self._uri, steps=range(sequences, sequences + 1))
                shutil.rmtree(self._folder, ignore_errors=True)
            else:
                log.info("goes on after %d sequences that are written", len(tokens))
                self.earlier_s = part.manifest.metadata["seconds"]
                return tokens
        return None

    def keep(self, tokens: "Tensor") -> None:
        """Publish the (S, T) tokens so far, if it is time; a failure is logged."""
        now = time.monotonic()
        if now - self._last < _KEPT_EVERY_S:
            return
        folder = self._folder / "new"
        try:
            folder.mkdir(parents=True)
            save_file({"input_ids": tokens.int()}, folder / _FILE)
            seconds = self.earlier_s + now - self._began
            publish(folder, join_uri(self._uri, state_name(len(tokens))), metadata={"seconds": seconds})
        except Exception as error:  # nothing depends on it
            unexpected = not isinstance(error, AdaptPrunerError)
            log.warning("%d sequences are written, but not kept: %s", len(tokens), error, exc_info=unexpected)
        else:
            remove_states(self._uri, steps=range(len(tokens)))
        shutil.rmtree(folder, ignore_errors=True)
        self._last = time.monotonic()
