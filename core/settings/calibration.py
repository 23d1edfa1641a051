"""Settings of the section ``calibration``: what importance is measured on."""

from dataclasses import dataclass, field
from typing import Literal

from core.errors import refuse
from core.quantities import in_range, parse_bytes
from core.settings.identity import HOW
from core.settings.texts import TextSource

Precision = Literal["auto", "bfloat16", "float32"]
"""Number format of a section's arithmetic; ``auto`` is settled when a run begins."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """What the importance of layers and groups is measured on."""

    source: TextSource | None = None
    """The calibration corpus."""
    sequences: int = 512
    """Sequences a draw; each pruning step draws again and takes no document twice."""
    sequence_length: int = 64
    """Tokens a sequence."""
    packing: bool = False
    """Off (the paper): one window of each document that fills a sequence; shorter ones are left out. On:
    shorter documents are joined to fill a sequence, so that a corpus of short texts serves too; no document
    is in two sequences."""
    micro_batch: int = field(default=0, metadata=HOW)
    """Sequences that pass through a layer at once. It changes no score, except those of
    ``taylor_per_microbatch``, which needs it. 0 takes what fits a quarter of the free memory, as far as more
    is faster."""
    weights: Literal["auto", "memory", "streamed"] = field(default="auto", metadata=HOW)
    """Hold the whole model in memory, or read each layer from disk while it is used: slower, but it scores
    models larger than the memory. ``auto`` streams if the weights would take over half of the free memory."""
    state_memory: str = field(default="auto", metadata=HOW)
    """Host memory (``16GB``) for what the forward pass keeps for the backward pass: the layers' inputs, which
    spill to disk beyond it, and activations that would be computed twice. ``auto`` is half of the free
    memory."""
    pool_documents: int = 20_000
    """Most documents that are tokenized to draw from."""
    precision: Precision = "auto"
    """Number format of weights and activations; gradients are summed in float32 either way. ``auto``: the
    faster one on the machine that begins the run (``core.machine.precision``), kept on any machine that
    resumes it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        problems = [*in_range("sequences", self.sequences, 1, 10**6)]
        problems += in_range("sequence_length", self.sequence_length, 2, 10**6)
        problems += in_range("micro_batch", self.micro_batch, 0, 10**6)
        problems += in_range("pool_documents", self.pool_documents, 1, 10**8)
        if self.pool_documents < self.sequences:
            problems.append(
                f"pool_documents={self.pool_documents} is below sequences={self.sequences}. Raise it."
            )
        try:
            if self.state_memory != "auto":
                parse_bytes(self.state_memory)
        except ValueError:
            problems.append(
                f"state_memory={self.state_memory} is not a valid size. Give one such as 16GB, or auto."
            )
        refuse(problems)
