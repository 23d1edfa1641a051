"""The step that tokenizes and packs all texts of a run: prepare-data."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.errors import CheckpointError
from core.machine.cores import usable_cores
from core.runs.run import Run
from core.steps.frame import Workspace, compute_once
from core.steps.parts import SavedParts
from core.storage.interface import join_uri
from core.storage.layout import CALIBRATION_POOL, HELD_OUT, RESUME
from core.storage.publication import open_publication
from core.training.resume import remove_states

log = logging.getLogger(__name__)


def run_prepare_data(*, run: Mapping[str, Any], base_uri: str) -> str:
    """Tokenize and pack the training mixture in slices, the calibration pool and the text for perplexity.

    A task that was killed and is started again goes on after the last rows that are in the store.

    Returns:
        URI of the data.
    """
    from core.data.mixture import slice_name, write_slices
    from core.data.packing import end_id
    from core.data.samples import write_calibration_pool, write_perplexity_windows
    from core.model.build import load_tokenizer
    from core.model.checkpoint import Checkpoint, is_companion
    from core.pruning.phases import phase_steps

    this = Run.load(run)
    settings, uri = this.settings, this.uri("data")
    parts_uri = join_uri(uri, RESUME)
    calibration, training, evaluation = settings.calibration, settings.training, settings.evaluation
    named = settings.model.base

    def base_in(folder: Path) -> Checkpoint:
        base = open_publication(base_uri)
        wanted = ["config.json", *filter(is_companion, base.manifest.paths)]
        return Checkpoint(base.fetch(folder, only=wanted))

    def compute(work: Workspace) -> dict[str, Any]:
        base = base_in(work.scratch)
        tokenizer, rows = load_tokenizer(base), base.config.vocab_size
        assert calibration.source is not None, "settings are checked"
        report: dict[str, Any] = {
            "calibration_sequences": write_calibration_pool(
                calibration.source,
                tokenizer,
                sequence_length=calibration.sequence_length,
                packing=calibration.packing,
                documents=calibration.pool_documents,
                at_least=calibration.sequences,
                seed=settings.seed,
                path=work.out / CALIBRATION_POOL,
            )
        }
        _check_id(_highest_id(work.out / CALIBRATION_POOL), named, rows, calibration.source.path)
        if training.total_steps:
            texts = ", ".join(source.path for source in training.sources)
            if any(source.format == "text" for source in training.sources):
                _check_id(end_id(tokenizer), named, rows, texts)  # each ends so: before hours of tokenizing
            steps = phase_steps(training.total_steps, settings.prune.phases)
            sequences = [count * training.global_batch for count in steps]
            if training.held_out_sequences:
                sequences.append(training.held_out_sequences)
            mixture = write_slices(
                training.sources,
                tokenizer,
                sequence_length=training.sequence_length,
                sequences=sequences,
                packing=training.packing,
                seed=settings.seed,
                directory=work.out,
                processes=usable_cores(),
                parts=SavedParts(parts_uri, work.scratch / "parts"),
            )
            for number in range(1, len(sequences) + 1):
                _check_id(_highest_id(work.out / slice_name(number)), named, rows, texts)
            if training.held_out_sequences and any(source.passes > 1 for source in mixture.sources):
                log.warning(
                    "a source is read more than once: what is held out of it may be trained on. Name more "
                    "text, or lower training.tokens"
                )
            report["training_tokens"] = mixture.tokens - training.held_out_tokens
            report["padding"] = mixture.padding
            report["malformed"] = sum(source.malformed for source in mixture.sources)
            report["sources"] = [asdict(source) for source in mixture.sources]
        return report

    def hold_out(work: Workspace) -> dict[str, Any]:
        assert evaluation.perplexity is not None, "asked below"
        base = base_in(work.scratch)
        windows = write_perplexity_windows(
            evaluation.perplexity,
            load_tokenizer(base),
            windows=evaluation.perplexity_windows,
            length=evaluation.perplexity_length,
            stride=evaluation.perplexity_stride,
            path=work.out / HELD_OUT,
        )
        highest = _highest_id(work.out / HELD_OUT)
        _check_id(highest, named, base.config.vocab_size, evaluation.perplexity.path)
        return {"perplexity_windows": windows}

    if evaluation.perplexity is not None:
        # Apart from what is trained on: another text to measure on makes nothing else again. First, as it is
        # quick: what is wrong with it shows before hours of tokenizing.
        compute_once(this, this.held_out_uri(), phase=0, step="hold-out", compute=hold_out, whole=False)
    compute_once(this, uri, phase=0, step="prepare-data", compute=compute)
    remove_states(parts_uri)
    return uri


def _highest_id(file: Path) -> int:
    """Return the highest token id in a file of packed sequences."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:  # mapped, not read into memory
        return int(opened.get_tensor("input_ids").max())


def _check_id(highest: int, base: str, rows: int, texts: str) -> None:
    """Refuse texts with a token that the base model does not know. Its tokenizer may, if no text has it.

    Args:
        highest: The highest token id of the texts.
        base: Name of the base model.
        rows: Of its embedding.
        texts: What was tokenized.

    Raises:
        CheckpointError: If the embedding has no such row.
    """
    if highest >= rows:
        raise CheckpointError(
            f"the tokenizer of {base} makes token {highest} of {texts}, but the model's embedding has only "
            f"{rows} rows (vocab_size in its config.json), of tokens 0 to {rows - 1}. Give it the tokenizer "
            "that it was trained with, or resize its embedding to the tokenizer and train it."
        )
