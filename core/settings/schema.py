"""The settings of a run as frozen dataclasses: the only place where defaults stand. Imports no torch.

A recipe is one YAML file with the sections below; ``core.settings.recipe`` reads it.
"""

import dataclasses
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from core.errors import refuse
from core.quantities import in_range, is_share, parse_bytes, parse_count, parse_interval
from core.redaction import passwords_in
from core.settings.addresses import base_problems
from core.settings.cluster import ClusterSettings
from core.settings.identity import HOW, MEASURED, PLACE, digest_of_kind
from core.settings.storage import StorageSettings, TrackingSettings

WIDTH_MULTIPLE = 32
"""What MLP widths are multiples of by default: llama.cpp quantizes weights in blocks of 32."""

PORTABLE_WIDTH = 256
"""MLP widths of the portable profile are multiples of this: the DeciLM format knows no others."""

_LARGEST_WEIGHT = 10**9

AttentionUnit = Literal["auto", "kv_group", "query_head", "none"]
CriterionName = Literal[
    "taylor_l1",
    "taylor_signed",
    "taylor_per_microbatch",
    "magnitude_l1",
    "magnitude_l2",
    "wanda_sp",
    "fluctuation",
    "activation_l2",
    "random",
]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model is pruned."""

    base: str = field(default="", metadata=PLACE)
    """A local directory, a ``.gguf`` file, ``s3://bucket/prefix``, ``package:NAME/path`` (a file or folder
    inside an installed Python package) or a Hugging Face repository id (also ``hf://owner/name@revision``).
    Looked up anew by every run: ``models:/name@alias`` or ``models:/name/3`` in MLflow's registry, and a file
    named HEAD (``s3://bucket/prefix/HEAD``, ``folder/HEAD``) whose one line names the current checkpoint."""
    revision: str = field(default="", metadata=PLACE)
    """Branch, tag or commit of a Hugging Face repository; empty for its default branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the checkpoints that the run writes; ``auto`` keeps the base model's."""


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """How much is removed, in which steps, and how it is shared between the layers."""

    target: str = "50%"
    """Parameters that stay: a count (``108M``) or a share of the base model's (``80%``). Reached to within
    half of ``width_multiple`` MLP channels."""
    method: Literal["adapt-pruner"] = "adapt-pruner"
    """The pruning method."""
    phases: int = 20
    """N_P, the number of prune-and-train phases; fixed when the pipeline is compiled."""
    phase_sizes: Literal["geometric", "linear"] = "geometric"
    """Sizes between the base and the target: equal ratios (the paper) or equal differences."""
    steps_per_phase: int = 0
    """Pruning steps in a phase; importance is measured anew before each. 0 takes as many as keep a step from
    removing more than 5 % of the parameters."""
    amplitude: float = 0.02
    """A of eq. 6: how far the sparsity of layers spreads. 0 prunes all layers alike."""
    amplitude_per: Literal["share", "step"] = "share"
    """What A is for. ``share``: a step of 2 %, and in proportion for others, so that the number of steps does
    not matter. ``step`` (the paper): each step, whatever its size."""
    similarity: Literal["cosine", "euclidean", "manhattan"] = "cosine"
    """How the input and the output of a layer are compared (eq. 3)."""
    criterion: CriterionName = "taylor_l1"
    """What a group is worth. ``taylor_l1`` is the paper's; ``taylor_per_microbatch`` approximates it."""
    attention_unit: AttentionUnit = "auto"
    """What attention loses. ``auto``: a KV head with its query heads, where that is worth less a parameter
    than the MLP channels that would go instead (Taylor criteria; else as ``kv_group``). ``kv_group`` (the
    paper): the same, at the MLP's sparsity. ``query_head``: one query head of every KV head, at the MLP's
    sparsity. ``none``: nothing."""
    width_multiple: int = WIDTH_MULTIPLE
    """MLP widths are multiples of this, and the target is met to within half of it in channels. 32 lets
    llama.cpp quantize every layer; 1 comes closest to the target."""
    profile: Literal["free", "portable"] = "free"
    """``free``: layers of any size. ``portable``: layers that the DeciLM format holds, which vLLM, SGLang,
    TensorRT-LLM and MLX read without code of ours: attention stays whole, MLP widths are multiples of 256 (or
    of a ``width_multiple`` that is one); the base model must be a Llama without biases."""

    def __post_init__(self) -> None:
        """Check ranges."""
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        try:
            share = float(self.target.strip(" %")) / 100 if is_share(self.target) else None
            if share is not None and not 0 < share < 1:
                yield (
                    f"target={self.target} must lie between 0% and 100%. "
                    "Ask for the share of parameters that stays."
                )
            if share is None and parse_count(self.target) <= 0:
                yield f"target={self.target} must be positive. Ask for the number of parameters that stay."
        except ValueError:
            yield f"target={self.target} is neither a count (108M, 1.2B) nor a share (80%). Give one of them."
        yield from in_range("phases", self.phases, 1, 1000)
        yield from in_range("steps_per_phase", self.steps_per_phase, 0, 1000)
        yield from in_range("amplitude", self.amplitude, 0, 1)
        yield from in_range("width_multiple", self.width_multiple, 1, 4096)
        if self.profile == "portable":
            yield from self._contradictions()

    def _contradictions(self) -> Iterator[str]:
        if self.attention_unit not in ("auto", "none"):
            yield (
                f"attention_unit={self.attention_unit} removes heads, but profile=portable leaves attention "
                "whole. Leave attention_unit out, or set profile to free."
            )
        if self.width_multiple != WIDTH_MULTIPLE and self.width_multiple % PORTABLE_WIDTH:
            yield (
                f"width_multiple={self.width_multiple} must be a multiple of {PORTABLE_WIDTH} under "
                "profile=portable. Leave it out, or set profile to free."
            )

    def target_params(self, base_params: int) -> int:
        """Return the target as a parameter count for a base model of ``base_params`` parameters."""
        if is_share(self.target):
            return round(base_params * float(self.target.strip(" %")) / 100)
        return parse_count(self.target)


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A set of documents or conversations."""

    path: str = ""
    """A file or folder (``.txt``, ``.jsonl``, ``.json``, ``.parquet``, ``.arrow``), ``package:NAME/path``
    or a Hugging Face data set id."""
    subset: str = ""
    """Configuration name of a Hugging Face data set."""
    split: str = "train"
    """Split of a Hugging Face data set (files: always one split). A slice such as ``train[:90%]`` works for
    files and for data sets that are not streamed."""
    format: Literal["text", "chat", "instruction"] = "text"
    """``text``: one document in ``field``. ``chat``: a list of messages (role/content or from/value) in
    ``field``. ``instruction``: ``prompt_fields`` joined by blank lines, answered by ``response_field``."""
    field: str = "text"
    """Column of the document or of the messages."""
    prompt_fields: tuple[str, ...] = ()
    """Columns that make the prompt (format ``instruction``); empty ones are left out."""
    response_field: str = ""
    """Column of the answer (format ``instruction``)."""
    weight: float = 1.0
    """Share of the training tokens relative to the other sources."""

    def __post_init__(self) -> None:
        """Check combinations."""
        problems = []
        if not self.path:
            problems.append("path is empty. Name a file, a package: path or a Hugging Face data set.")
        if not self.weight > 0:
            problems.append(f"weight={self.weight} must be positive. Leave the source out instead.")
        elif self.weight > _LARGEST_WEIGHT:
            problems.append(f"weight={self.weight} must be at most {_LARGEST_WEIGHT:,}. Lower all weights.")
        if self.format == "instruction" and not (self.prompt_fields and self.response_field):
            problems.append("format=instruction needs prompt_fields and response_field. Name the columns.")
        refuse(problems)


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


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Recovery training, shared out over the phases by eq. 11."""

    tokens: str = "0"
    """Training tokens over all phases (``3.87B``); 0 prunes without training."""
    sources: tuple[TextSource, ...] = ()
    """The mixture; ``weight`` shares out the tokens."""
    sequence_length: int = 1024
    """Tokens a packed sequence."""
    global_batch: int = 128
    """Sequences an optimizer step."""
    micro_batch: int = field(default=8, metadata=HOW)
    """Sequences a forward pass; divides ``global_batch``."""
    learning_rate: float = 2e-5
    """Peak of the warmup-stable-decay schedule."""
    min_learning_rate: float = 2e-6
    """Where the decay ends."""
    warmup_share: float = 0.05
    """Share of all steps that warm up."""
    decay_share: float = 0.10
    """Share of all steps that decay."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, in [0, 1]."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this l2 norm; 0 clips nothing."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of the forward and backward pass (autocast); weights and optimizer state stay float32.
    ``auto``: see ``calibration.precision``."""
    gradient_checkpointing: bool = field(default=False, metadata=HOW)
    """Recompute activations in the backward pass: less memory, about a third more time."""
    save_every: str = field(default="10min", metadata=HOW)
    """How often the state of training (12 bytes a parameter) goes to the store, so that a task that is killed
    goes on from there: ``90s``, ``10min``, ``2h``, ``200 steps``, or 0 for never."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        try:
            tokens = parse_count(self.tokens)
        except ValueError:
            yield (
                f"tokens={self.tokens} is not a count such as 3.87B. "
                "Give the training tokens of all phases, or 0."
            )
            tokens = 0
        yield from in_range("sequence_length", self.sequence_length, 2, 10**6)
        yield from in_range("global_batch", self.global_batch, 1, 10**6)
        yield from in_range("micro_batch", self.micro_batch, 1, 10**6)
        yield from in_range("learning_rate", self.learning_rate, 0, 1)
        yield from in_range("min_learning_rate", self.min_learning_rate, 0, max(self.learning_rate, 0))
        yield from in_range("warmup_share", self.warmup_share, 0, 1)
        yield from in_range("decay_share", self.decay_share, 0, 1)
        yield from in_range("weight_decay", self.weight_decay, 0, 1)
        yield from in_range("max_grad_norm", self.max_grad_norm, 0, 10**9)
        if self.warmup_share + self.decay_share > 1:
            yield "warmup_share + decay_share exceed 1. Lower one of them."
        if self.micro_batch and self.global_batch % self.micro_batch:
            yield (
                f"global_batch={self.global_batch} must be a multiple of micro_batch={self.micro_batch}. "
                "Change one."
            )
        try:
            parse_interval(self.save_every)
        except ValueError:
            yield (
                f"save_every={self.save_every} is no interval. Give one such as 10min, 90s, 2h or 200 steps, "
                "or 0 to save nothing."
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


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What the dense model and each phase's result are measured with."""

    tasks: tuple[str, ...] = ()
    """lm-eval task names, evaluated zero-shot unless the task says otherwise."""
    task_data: dict[str, str] = field(default_factory=dict)
    """Task name to a local folder or ``package:NAME/path`` with one sub-folder a split (arrow, parquet or
    jsonl); tasks without an entry come from the Hugging Face hub."""
    limit: int = 0
    """Items a task, taken from the front; 0 takes all."""
    batch_size: int = field(default=8, metadata=HOW)
    """Sequences a forward pass."""
    perplexity: TextSource | None = None
    """Text for perplexity; must not be trained or calibrated on."""
    perplexity_windows: int = 64
    """Windows of text."""
    perplexity_length: int = 512
    """Tokens a window."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the weights and activations. ``auto``: see ``calibration.precision``."""
    speed: bool = False
    """Whether publish measures how fast the result is beside the base model, in PyTorch and, where the
    package xllamacpp is installed, in llama.cpp. Takes memory for both models."""

    def __post_init__(self) -> None:
        """Check ranges."""
        problems = [
            *in_range("limit", self.limit, 0, 10**9),
            *in_range("batch_size", self.batch_size, 1, 10**6),
        ]
        problems += in_range("perplexity_windows", self.perplexity_windows, 1, 10**6)
        problems += in_range("perplexity_length", self.perplexity_length, 2, 10**6)
        problems += [
            f"task_data.{task} names no task of evaluation.tasks. Add it there or leave it out."
            for task in self.task_data
            if task not in self.tasks
        ]
        refuse(problems)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run."""

    name: str = field(default="adapt-pruner", metadata=PLACE)
    """What the run is called in tables and in MLflow."""
    seed: int = 0
    """Seed of calibration draws, of the shuffle and of training."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """Which model is pruned."""
    prune: PruneSettings = field(default_factory=PruneSettings)
    """How much is removed, in which steps."""
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    """What importance is measured on."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """Recovery training."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings, metadata=MEASURED)
    """What is measured."""
    storage: StorageSettings = field(default_factory=StorageSettings, metadata=PLACE)
    """Where checkpoints go."""
    tracking: TrackingSettings = field(default_factory=TrackingSettings, metadata=PLACE)
    """Where numbers go."""
    cluster: ClusterSettings = field(default_factory=ClusterSettings, metadata=PLACE)
    """How tasks run in pods."""

    def __post_init__(self) -> None:
        """Check what must be set in every run."""
        problems = [*in_range("seed", self.seed, 0, 2**31 - 1), *passwords_in(dataclasses.asdict(self))]
        if not self.model.base:
            problems.append("model.base is empty. Name the model to prune.")
        problems += [f"model.{problem}" for problem in base_problems(self.model.base, self.model.revision)]
        if self.calibration.source is None:
            problems.append("calibration.source is missing. Name the calibration corpus.")
        if self.training.total_steps and self.training.total_steps < self.prune.phases:
            problems.append(
                f"training.tokens={self.training.tokens} gives {self.training.total_steps} optimizer "
                f"steps for prune.phases={self.prune.phases}. Raise the tokens, or lower the phases or the "
                "batch."
            )
        if self.prune.criterion == "taylor_per_microbatch" and not self.calibration.micro_batch:
            problems.append(
                "prune.criterion=taylor_per_microbatch needs calibration.micro_batch: with 0 the free memory "
                "would change the scores. Set it, or take taylor_l1."
            )
        refuse(problems)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and scalars, as a recipe holds them."""
        return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(self))))

    def digest(self) -> str:
        """Return a hash of the settings that change the result; see ``core.settings.identity``.

        How the base model is named does not count: its revision does.
        """
        if self.prune.criterion == "taylor_per_microbatch":  # absolute values are taken in each of them
            return digest_of_kind(self, "result", micro_batch=self.calibration.micro_batch)
        return digest_of_kind(self, "result")

    def measured_digest(self) -> str:
        """Return a short hash of what is measured, which names what a run publishes of that."""
        return digest_of_kind(self, "measured")[:8]
