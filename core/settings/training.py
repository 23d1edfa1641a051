"""Settings of the section ``training``: recovery training."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from core.errors import refuse
from core.quantities import in_range, parse_count, parse_interval
from core.settings.calibration import Precision
from core.settings.identity import HOW, formerly
from core.settings.texts import TextSource


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Recovery training, distributed over the phases by eq. 11."""

    tokens: str = "0"
    """Training tokens over all phases (``3.87B``); 0 prunes without training."""
    sources: tuple[TextSource, ...] = ()
    """The mixture; ``weight`` sets each source's share of the tokens."""
    sequence_length: int = 1024
    """Tokens a packed sequence."""
    packing: Literal["whole", "cut"] = field(default="whole", metadata=formerly("cut"))
    """``whole``: a sequence holds whole documents and conversations, each of which sees itself alone; only
    what is longer than a sequence is cut. ``cut`` (earlier versions): they are joined and cut anywhere."""
    global_batch: int = 128
    """Sequences an optimizer step."""
    micro_batch: int = field(default=8, metadata=HOW)
    """Sequences a forward pass; divides ``global_batch``. 0 takes as many as help and fit in memory."""
    learning_rate: float = 2e-5
    """Peak of the warmup-stable-decay schedule."""
    min_learning_rate: float = 2e-6
    """Learning rate at the end of the decay."""
    warmup_share: float = 0.05
    """Share of all steps that warm up."""
    decay_share: float = 0.10
    """Share of all steps that decay."""
    optimizer_state: Literal["reset", "carry"] = "reset"
    """AdamW's moments at the start of a phase. ``reset`` (the authors): zero. ``carry``: those of the phase
    before, cut as its weights are; they are stored between the phases (8 bytes a parameter)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, in [0, 1]."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this l2 norm; 0 clips nothing."""
    teacher: Literal["none", "base"] = "none"
    """``base``: the dense base model teaches, in every phase. What is trained is also to expect what that one
    expects: the forward Kullback-Leibler divergence, on the trained tokens. It is in memory beside the model,
    in ``precision``, and runs forward over the same tokens. ``none`` (the paper): the next token is all."""
    distillation_weight: float = 0.5
    """Weight of the divergence under a ``teacher``, in (0, 1]; the next token has the rest."""
    temperature: float = 1.0
    """What both models' logits are divided by for the divergence; its weight grows with the square."""
    lora_rank: int = 0
    """Rank of low-rank adapters (LoRA, by peft), one for each projection of the layers. They are trained in
    place of the weights, which the end of a phase adds them to: a tenth of the memory beside the weights, and
    less is learned. Learning rates are higher: 1e-4 with a rank of 8 is LLM-Pruner's. 0 (the paper): all
    weights are trained."""
    precision: Precision = "auto"
    """Arithmetic of the forward and backward pass (autocast); weights and optimizer state stay float32.
    ``auto``: see ``calibration.precision``."""
    ranks: int = field(default=0, metadata=HOW)
    """Processes that train together, one a GPU; their number divides ``global_batch``. 0 takes as many as the
    task has GPUs, and 1 on a CPU."""
    sharding: Literal["auto", "none", "full"] = field(default="auto", metadata=HOW)
    """What each of several ranks holds. ``none``: all weights, gradients and moments; ``full``: its part of
    them (FSDP2); ``auto``: all of them if they fit. With ``lora_rank`` each holds all."""
    moments: Literal["auto", "device", "host"] = field(default="auto", metadata=HOW)
    """Where a single rank keeps AdamW's moments, 8 bytes a parameter: on the GPU, or in host memory, from
    where they pass through the GPU at each step. ``auto``: on the GPU if they fit."""
    gradient_checkpointing: bool = field(default=False, metadata=HOW)
    """Recompute activations in the backward pass: less memory, about a third slower."""
    save_every: str = field(default="10min", metadata=HOW)
    """How often the state of training (12 bytes a parameter) is stored, for a killed task to resume from:
    ``90s``, ``10min``, ``2h``, ``200 steps``, or 0 for never."""

    held_out_sequences: int = 0
    """Sequences of the mixture that are set aside: their loss is measured while others are trained on, before
    the first and after the last step of each phase too. 0 measures none."""
    eval_every: int = field(default=50, metadata=HOW)
    """Optimizer steps from one such measurement to the next."""
    max_loss_rise: float = field(default=0.0, metadata=HOW)
    """Training stops when for 20 steps in a row the loss has been above this multiple of its median of 100
    steps; no state is saved of such steps. 0 lets it run; 1.5 is a cautious limit."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        try:
            tokens = parse_count(self.tokens)
        except ValueError:
            yield f"tokens={self.tokens} is not a count such as 3.87B. Give the tokens of all phases, or 0."
            tokens = 0
        yield from in_range("sequence_length", self.sequence_length, 2, 10**6)
        yield from in_range("global_batch", self.global_batch, 1, 10**6)
        yield from in_range("micro_batch", self.micro_batch, 0, 10**6)
        yield from in_range("learning_rate", self.learning_rate, 0, 1)
        yield from in_range("min_learning_rate", self.min_learning_rate, 0, max(self.learning_rate, 0))
        yield from in_range("warmup_share", self.warmup_share, 0, 1)
        yield from in_range("decay_share", self.decay_share, 0, 1)
        yield from in_range("weight_decay", self.weight_decay, 0, 1)
        yield from in_range("max_grad_norm", self.max_grad_norm, 0, 10**9)
        yield from in_range("held_out_sequences", self.held_out_sequences, 0, 10**6)
        yield from in_range("eval_every", self.eval_every, 1, 10**9)
        yield from in_range("max_loss_rise", self.max_loss_rise, 0, 10**6)
        if 0 < self.max_loss_rise <= 1:
            yield f"max_loss_rise={self.max_loss_rise:g} must be above 1, such as 1.5, or 0 for no limit."
        yield from in_range("distillation_weight", self.distillation_weight, 0, 1)
        yield from in_range("temperature", self.temperature, 0.01, 100)
        yield from in_range("lora_rank", self.lora_rank, 0, 4096)
        if self.lora_rank and self.optimizer_state == "carry":
            yield (
                f"lora_rank={self.lora_rank} begins each phase with new adapters, and optimizer_state=carry "
                "has no moments for them. Set one of the two to its default."
            )
        if not self.distillation_weight:
            yield "distillation_weight=0 leaves a teacher nothing to teach. Set teacher to none instead."
        if self.teacher == "none":
            for name in ("distillation_weight", "temperature"):
                if (value := getattr(self, name)) != getattr(TrainingSettings, name):
                    yield f"{name}={value:g} needs a teacher. Set teacher to base, or leave {name} out."
        if self.warmup_share + self.decay_share > 1:
            yield "warmup_share + decay_share exceed 1. Lower one of them."
        yield from in_range("ranks", self.ranks, 0, 1024)
        if self.ranks and self.global_batch % self.ranks:
            yield (
                f"ranks={self.ranks} must divide global_batch={self.global_batch}: all train on equal parts. "
                "Change one."
            )
        if self.micro_batch and self.global_batch % self.micro_batch:
            yield (
                f"global_batch={self.global_batch} must be a multiple of micro_batch={self.micro_batch}. "
                "Change one."
            )
        try:
            parse_interval(self.save_every)
        except ValueError:
            yield (
                f"save_every={self.save_every} is not a valid interval. Give one such as 10min, 90s, 2h or "
                "200 steps, or 0 to save nothing."
            )
        if tokens and not self.sources:
            yield f"tokens={self.tokens} needs sources. Name at least one text source, or set tokens to 0."
        if 0 < tokens < self.sequence_length * self.global_batch:
            step = self.sequence_length * self.global_batch
            yield (
                f"tokens={self.tokens} is less than one optimizer step of {step:,} tokens. "
                "Raise it or shrink the batch."
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps over all phases."""
        return parse_count(self.tokens) // (self.sequence_length * self.global_batch)

    @property
    def held_out_tokens(self) -> int:
        """Tokens of the sequences that are set aside."""
        return self.held_out_sequences * self.sequence_length
