"""Settings of the section ``training``: recovery training."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from core.errors import refuse
from core.quantities import in_range, parse_count, parse_interval
from core.settings.calibration import Precision
from core.settings.identity import HOW, formerly
from core.settings.texts import TextSource

_OF_A_TEACHER = ("distillation_weight", "temperature", "hidden_weight", "teacher_logits", "teacher_tokens")
"""Settings that have no effect without one."""


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
    teacher: Literal["none", "base"] = field(default="base", metadata=formerly("none"))
    """``base``: the dense base model teaches, in every phase. What is trained is also to expect what that one
    expects: the forward Kullback-Leibler divergence, on the trained tokens. It is in memory beside the model,
    in ``precision``, and runs forward over the same tokens, which takes half as long again. ``none`` (the
    paper): the next token is all."""
    teacher_tokens: str = "0"
    """How many tokens of the mixture, its first, the teacher is trained on before it teaches (``100M``):
    Minitron's teacher correction, for a base model that has seen other texts. Once a run, on the next token,
    with the schedule and the batches of this section. What is pruned is the base as it is; with 0 that
    teaches."""
    distillation_weight: float = 0.5
    """Weight of the divergence under a ``teacher``, in (0, 1]; the next token has the rest."""
    temperature: float = 1.0
    """What both models' logits are divided by for the divergence; its weight grows with the square."""
    hidden_weight: float = 0.0
    """Weight, beside the rest of the loss, of how far hidden states are from the teacher's: what each layer
    returns for a trained token, the squared error over the teacher's mean square. It keeps 4 bytes a layer,
    trained token of a micro-batch and hidden size. 0 leaves them alone; 1 is a start."""
    hidden_layers: tuple[int, ...] = ()
    """Which layers ``hidden_weight`` compares, from 0; none named: all."""
    teacher_logits: Literal["live", "stored"] = "live"
    """``live``: the teacher runs beside the model. ``stored``: before a phase trains, the teacher reads its
    slice, and what it expects of each trained token is stored until the phase is published:
    ``teacher_top_k`` tokens, and all others as one. Training then has no teacher in memory."""
    teacher_top_k: int = 64
    """Likeliest tokens that are stored, 4 bytes each (6 with a vocabulary above 65,536)."""
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
    task has GPUs, and 1 on a CPU. Of several ``nodes`` each has so many."""
    nodes: int = field(default=1, metadata=HOW)
    """Nodes of a cluster that train together, by a TrainJob of Kubeflow Trainer; each has the GPUs and the
    memory that ``cluster`` gives recover-train. Their number, times ``ranks``, divides ``global_batch``."""
    sharding: Literal["auto", "none", "full"] = field(default="auto", metadata=HOW)
    """What each of several ranks holds. ``none``: all weights, gradients and moments; ``full``: its part of
    them (FSDP2); ``auto``: all of them if they fit. With ``lora_rank`` each holds all."""
    moments: Literal["auto", "device", "host"] = field(default="auto", metadata=HOW)
    """Where a single rank keeps AdamW's moments, 8 bytes a parameter: on the GPU, or in host memory, from
    where they pass through the GPU at each step. ``auto``: on the GPU if they fit."""
    gradient_checkpointing: bool = field(default=False, metadata=HOW)
    """Recompute activations in the backward pass: less memory, about a third slower."""
    layer_inputs: Literal["auto", "device", "host"] = field(default="auto", metadata=HOW)
    """Where ``gradient_checkpointing`` keeps the input of each layer until the backward pass: on the GPU, or
    in host memory. ``auto``: on the GPU if they fit."""
    attention: Literal["auto", "torch", "flash"] = field(default="auto", metadata=HOW)
    """What computes the attention on a GPU. ``flash``: the package flash-attn, which needs no mask for the
    documents of a row, in bfloat16. ``torch``: torch itself. ``auto``: flash-attn if it is installed. Losses
    differ by rounding. With flash-attn it has not run on a GPU yet."""
    compile: bool = field(default=False, metadata=HOW)
    """Let torch.compile fuse the operations of the layers, which share its graphs though they differ in size.
    The first step waits for that; it needs a C++ compiler. Losses differ by rounding. Not with ``lora_rank``.
    """
    save_every: str = field(default="auto", metadata=HOW)
    """How often the state of training (12 bytes a parameter) is stored, for a killed task to resume from.
    ``auto``: by what it costs, which is measured: at most 2 % of the time goes to it, and within that at most
    10 minutes of work are lost; after a kill it is stored more often at first. Otherwise ``90s``, ``10min``,
    ``2h``, ``200 steps``, or 0 for never."""

    held_out_sequences: int = 0
    """Sequences of the mixture that are set aside: their loss is measured while others are trained on, before
    the first and after the last step of each phase too. 0 measures none."""
    eval_every: int = field(default=50, metadata=HOW)
    """Optimizer steps from one such measurement to the next."""
    max_loss_rise: float = field(default=2.0, metadata=HOW)
    """Training stops when for 20 steps in a row the loss has been above this multiple of its median of 100
    steps (in the first 20 steps of a phase, of its first loss); no state is saved of such steps. 0 lets it
    run; 1.5 is a cautious limit."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        try:
            tokens = parse_count(self.tokens)
        except ValueError:
            yield f"tokens={self.tokens} is not a count such as 3.87B. Give the tokens of all phases, or 0."
            tokens = 0
        yield from self._teacher_problems(tokens)
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
        if self.attention == "flash" and self.precision == "float32":
            yield (
                "attention=flash computes in bfloat16, and precision is float32, or comes to that here. Set "
                "attention to auto, or precision to bfloat16."
            )
        if self.lora_rank and self.compile:
            yield f"compile=true is not for adapters (lora_rank={self.lora_rank}). Set one to its default."
        if not self.distillation_weight:
            yield "distillation_weight=0 leaves a teacher nothing to teach. Set teacher to none instead."
        yield from in_range("teacher_top_k", self.teacher_top_k, 1, 10**6)
        if self.teacher == "none":
            for name in _OF_A_TEACHER:
                if (value := getattr(self, name)) != getattr(TrainingSettings, name):
                    yield f"{name}={value} needs a teacher. Set teacher to base, or leave {name} out."
        yield from in_range("hidden_weight", self.hidden_weight, 0, 10**6)
        if self.hidden_weight and self.teacher_logits == "stored":
            yield (
                f"hidden_weight={self.hidden_weight:g} compares hidden states, of which none are stored. Set "
                "teacher_logits to live, or leave hidden_weight out."
            )
        if self.hidden_layers and not self.hidden_weight:
            yield "hidden_layers has no effect without hidden_weight. Set that, or leave hidden_layers out."
        if len(set(self.hidden_layers)) < len(self.hidden_layers) or min(self.hidden_layers, default=0) < 0:
            named = ", ".join(map(str, self.hidden_layers))
            yield f"hidden_layers={named} must be different numbers from 0. Name each layer once."
        if self.teacher_logits == "stored" and self.nodes > 1:
            yield "teacher_logits=stored is of one node. Set nodes to 1, or teacher_logits to live."
        if self.teacher_logits == "live" and self.teacher_top_k != TrainingSettings.teacher_top_k:
            yield (
                f"teacher_top_k={self.teacher_top_k} is of what is stored. Set teacher_logits to stored, or "
                "leave teacher_top_k out."
            )
        if self.warmup_share + self.decay_share > 1:
            yield "warmup_share + decay_share exceed 1. Lower one of them."
        yield from in_range("ranks", self.ranks, 0, 1024)
        yield from in_range("nodes", self.nodes, 1, 1024)
        together = max(self.ranks, 1) * max(self.nodes, 1)
        if self.global_batch % together:
            named = f"ranks={self.ranks}" if self.nodes == 1 else f"nodes={self.nodes}"
            if self.ranks > 1 and self.nodes > 1:
                named = f"nodes={self.nodes} times ranks={self.ranks}"
            yield (
                f"{named} must divide global_batch={self.global_batch}: all train on equal parts. Change one."
            )
        if self.micro_batch and self.global_batch % self.micro_batch:
            yield (
                f"global_batch={self.global_batch} must be a multiple of micro_batch={self.micro_batch}. "
                "Change one."
            )
        try:
            if self.save_every != "auto":
                parse_interval(self.save_every)
        except ValueError:
            yield (
                f"save_every={self.save_every} is not a valid interval. Give one such as 10min, 90s, 2h or "
                "200 steps, or 0 to save nothing, or auto."
            )
        if self.layer_inputs == "host" and not self.gradient_checkpointing:
            yield (
                "layer_inputs=host moves what gradient checkpointing keeps. Set gradient_checkpointing to "
                "true, or leave layer_inputs out."
            )
        if tokens and not self.sources:
            yield f"tokens={self.tokens} needs sources. Name at least one text source, or set tokens to 0."
        if 0 < tokens < self.sequence_length * self.global_batch:
            step = self.sequence_length * self.global_batch
            yield (
                f"tokens={self.tokens} is less than one optimizer step of {step:,} tokens. "
                "Raise it or shrink the batch."
            )

        given = [source.most_tokens for source in self.sources]
        most = sum(count for count in given if count is not None)
        if given and None not in given and most < tokens + self.held_out_tokens:
            held_out = f" and held_out_sequences={self.held_out_sequences}" if self.held_out_sequences else ""
            yield (
                f"tokens={self.tokens}{held_out} is more than the max_tokens of all sources allow, {most:,}. "
                "Lower it, or raise one of them."
            )

    def _teacher_problems(self, tokens: int) -> Iterator[str]:
        try:
            taught = parse_count(self.teacher_tokens)
        except ValueError:
            yield f"teacher_tokens={self.teacher_tokens} is not a count such as 100M. Give one, or 0."
            return
        step = self.sequence_length * self.global_batch
        if 0 < taught < step:
            yield (
                f"teacher_tokens={self.teacher_tokens} is less than one optimizer step of {step:,} tokens. "
                "Raise it, or leave it out."
            )
        if taught > tokens:
            yield (
                f"teacher_tokens={self.teacher_tokens} is more than the mixture has: tokens={self.tokens}. "
                "Lower it, or raise tokens."
            )
        if taught and self.nodes > 1:
            yield f"teacher_tokens={self.teacher_tokens} is of one node. Set nodes to 1, or leave it out."

    @property
    def of_teacher(self) -> "TrainingSettings | None":
        """The settings by which the teacher itself is trained; None if it is the base model as it is."""
        if not parse_count(self.teacher_tokens):
            return None
        reset = ("hidden_layers", "teacher_top_k", "optimizer_state", *_OF_A_TEACHER)
        defaults = {name: getattr(TrainingSettings, name) for name in reset}
        return replace(self, tokens=self.teacher_tokens, teacher="none", **defaults)

    @property
    def total_steps(self) -> int:
        """Optimizer steps over all phases."""
        return parse_count(self.tokens) // (self.sequence_length * self.global_batch)

    @property
    def held_out_tokens(self) -> int:
        """Tokens of the sequences that are set aside."""
        return self.held_out_sequences * self.sequence_length
