"""One GGUF file of a checkpoint whose layers may differ in size, for stock llama.cpp."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.utility import size_label

from core.bases.licence import card_facts, known_facts
from core.errors import ExportError
from core.export.exported import Exported, put_when_complete
from core.export.generation import end_ids
from core.export.gguf_layout import Part, architecture_of, parts_of
from core.export.gguf_quantization import (
    FILE_TYPES,
    GgufDtype,
    encoded,
    format_of,
    ggml_type,
    quantization_notes,
    stored_bytes,
)
from core.export.gguf_rope import FACTORS, add_rope, frequency_factors
from core.export.gguf_tokenizer import add_tokenizer
from core.model.build import load_tokenizer
from core.model.checkpoint import Checkpoint, CheckpointReader
from core.model.config import head_dim
from core.model.shape import LayerShape
from core.storage.layout import CARD

log = logging.getLogger(__name__)

_LARGE = 2**24
_ANY = np.dtype(np.float32)
"""The writer requires a numpy dtype, but uses only the raw one."""


def export_gguf(checkpoint: Path, output: Path, *, dtype: GgufDtype = "f16") -> Exported:
    """Write a checkpoint as one GGUF file for llama.cpp, with its tokenizer and chat template.

    Tensors are read, converted and written one after the other; at most two are in memory. ``dtype`` is the
    number format of the matrices; vectors stay in float32, and under ``q8_0`` matrices whose rows are not a
    multiple of 32 in float16.
    """
    if dtype not in FILE_TYPES:
        raise ExportError(f"dtype={dtype!r} is none of {', '.join(FILE_TYPES)}. Choose one of these.")
    opened = Checkpoint(checkpoint)
    config, layers = opened.config, opened.layers
    architecture = architecture_of(config, layers)
    with opened.weights() as reader, put_when_complete(output) as partial:
        parts = parts_of(config, layers, architecture, reader.names())
        params = sum(part.params for part in parts)
        writer = gguf.GGUFWriter(partial, architecture)
        try:
            _add_description(writer, opened, params, dtype)
            _add_sizes(writer, config, layers)
            notes = add_tokenizer(
                writer,
                load_tokenizer(opened),
                vocab_size=config.vocab_size,
                end_ids=end_ids(opened.generation_config, config),
            )
            factors = frequency_factors(config, architecture)
            _write(writer, reader, parts, factors, dtype)
        finally:
            writer.close()
    log.info("wrote %s: %s, %d parameters", output, architecture, params)
    return Exported(
        path=output,
        params=params,
        notes=(
            *_kept_notes(parts, dtype),
            *quantization_notes(layers, hidden_size=config.hidden_size, head_dim=head_dim(config)),
            *notes,
        ),
    )


def _write(
    writer: gguf.GGUFWriter,
    reader: CheckpointReader,
    parts: Sequence[Part],
    factors: torch.Tensor | None,
    dtype: GgufDtype,
) -> None:
    """Write head, metadata and tensors: each is converted while the one before is written."""
    if factors is not None:
        writer.add_tensor_info(FACTORS, factors.shape, _ANY, factors.numel() * 4, raw_dtype=ggml_type("f32"))
    for part in parts:
        kind = format_of(part.shape, dtype)
        writer.add_tensor_info(
            part.name, part.shape, _ANY, stored_bytes(part.params, kind), raw_dtype=ggml_type(kind)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    with ThreadPoolExecutor(max_workers=1) as disk:
        written: Future[None] | None = None
        for part in parts:
            data = _data(reader, part, dtype)
            if written is not None:
                written.result()
            written = disk.submit(_store, writer, data)
        if written is not None:
            written.result()


def _store(writer: gguf.GGUFWriter, data: np.ndarray) -> None:
    """Write a tensor, and sync a large one to the disk now rather than at the end."""
    writer.write_tensor_data(data)
    if data.nbytes >= _LARGE:
        file = (writer.fout or [])[0]
        file.flush()
        os.fsync(file.fileno())


def _data(reader: CheckpointReader, part: Part, dtype: GgufDtype) -> np.ndarray:
    try:
        return encoded(part.read(reader), format_of(part.shape, dtype))
    except OverflowError as error:
        raise ExportError(
            f"{part.sources[0][0]} holds values beyond {error}. Export as bf16 or f32."
        ) from error


def _add_description(writer: gguf.GGUFWriter, checkpoint: Checkpoint, params: int, dtype: GgufDtype) -> None:
    """Write the model's name, licence and base model."""
    provenance, directory = checkpoint.provenance, checkpoint.directory
    base = str(provenance.get("base", ""))
    base_name = Path(base).name.removesuffix(".gguf")
    label = size_label(params, params, 0, 0)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(
        f"{base_name} pruned to {label}" if provenance.get("phase") else base_name or directory.name
    )
    writer.add_size_label(label)
    facts = known_facts(provenance) | card_facts(directory / CARD)
    writer.add_license(facts.get("license", ""))
    if facts.get("language"):
        writer.add_languages(facts["language"])
    if provenance.get("phase") and base_name:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_name)
        writer.add_base_model_version(0, str(provenance.get("revision", "")))
    writer.add_file_type(FILE_TYPES[dtype])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_sizes(writer: gguf.GGUFWriter, config: Any, layers: Sequence[LayerShape]) -> None:
    """Write the model's sizes: one number if all layers are alike, else a list by layer."""
    width = head_dim(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    for write, sizes in (
        (writer.add_feed_forward_length, [layer.mlp_width for layer in layers]),
        (writer.add_head_count, [layer.query_heads for layer in layers]),
        (writer.add_head_count_kv, [layer.kv_heads for layer in layers]),
    ):
        write(sizes if len(set(layers)) > 1 else sizes[0])
    # llama.cpp would divide the hidden size by the heads of the first layer.
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_rope(writer, config)


def _kept_notes(parts: Sequence[Part], dtype: GgufDtype) -> tuple[str, ...]:
    kept = [part for part in parts if len(part.shape) > 1 and format_of(part.shape, dtype) != dtype]
    if not kept:
        return ()
    share = sum(part.params for part in kept) / sum(part.params for part in parts)
    return (
        f"{len(kept)} of {len(parts)} tensors ({share:.0%} of the weights) stay in float16: Q8_0 needs rows "
        "of a multiple of 32.",
    )
