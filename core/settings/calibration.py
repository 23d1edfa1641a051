"""Settings of the section ``calibration``: what importance is measured on."""

from dataclasses import dataclass, field
from typing import Literal

from core.errors import refuse
from core.quantities import in_range, parse_bytes
from core.settings.identity import HOW
from core.settings.texts import TextSource


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """What the importance of layers and groups is measured on."""

    source: TextSource | None = None
    """The calibration corpus."""
    sequences: int = 512
    """Sequences a draw; each pruning step draws anew and takes no document twice."""
    sequence_length: int = 64
    """Tokens a sequence."""
    packing: bool = False
    """Off (the paper): one window of each document that fills a sequence; shorter ones are left out. On:
    shorter documents are joined to fill a sequence, so that a corpus of short texts serves too; no document
    is in two sequences."""
    micro_batch: int = field(default=0, metadata=HOW)
    """Sequences that pass through a layer at once; the loss is a sum of their means. 0 takes as many as the
    free memory suggests."""
    weights: Literal["auto", "memory", "streamed"] = field(default="auto", metadata=HOW)
    """Whether the whole model is in memory, or each layer is read from disk while it is used: slower, but a
    model larger than the memory is scored too. ``auto`` streams where the weights would take over half of
    what is free."""
    state_memory: str = field(default="auto", metadata=HOW)
    """Host memory for what the forward pass keeps for the backward pass (``16GB``): layers' inputs, of which
    what goes beyond lies on disk, and what would be computed twice. ``auto`` is half of what is free."""
    pool_documents: int = 20_000
    """Documents that are tokenized at most to draw from."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of weights and activations; gradients are summed in float32 either way. ``auto``: what
    the machine that begins the run computes faster in (``core.machine.precision``), whatever machine
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
                f"state_memory={self.state_memory} is no size. Give one such as 16GB or 500MB, or auto."
            )
        refuse(problems)
