"""Settings of the section ``prune``: how much is removed, in which steps, and from which layers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from core.errors import refuse
from core.quantities import in_range, is_share, parse_count
from core.settings.identity import formerly
from core.settings.methods import (
    FIXED,
    LAYERED,
    NARROWING,
    OF_THE_MODEL,
    PREFERRED,
    WHOLE_LAYERS,
    MethodName,
)

WIDTH_MULTIPLE = 32
"""MLP widths are multiples of this by default: llama.cpp quantizes weights in blocks of 32."""

PORTABLE_WIDTH = 256
"""MLP widths of the portable profile are multiples of this: the DeciLM format allows no others."""

_RIDGE = 0.1
_WHOLE = "100%"

AttentionUnit = Literal["auto", "kv_group", "query_head", "none"]
CriterionName = Literal[
    "taylor_l1",
    "taylor_signed",
    "taylor_per_microbatch",
    "magnitude_l1",
    "magnitude_l2",
    "wanda_sp",
    "fluctuation",
    "standardised_fluctuation",
    "activation_l2",
    "leverage",
    "obs",
    "fisher",
    "fisher_per_token",
    "random",
]
WidthRule = Literal["similarity", "ranks", "clipped", "softmax", "search"]
RepairName = Literal["none", "ridge", "ridge_to_zero", "bias"]

_STORED: Mapping[str, Any] = {"criterion": "taylor_l1"}
"""Defaults of older versions, which have stored them beside methods that decide otherwise."""


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """How much is removed, in which steps, and from which layers."""

    target: str = "50%"
    """Parameters that stay: a count (``108M``) or a share of the base model's (``80%``). Reached to within
    half of ``width_multiple`` MLP channels."""
    method: MethodName = "adapt-pruner"
    """The pruning method. ``adapt-pruner`` follows all settings. The others are systems that it is compared
    with, at the same size and on the same texts: ``llm-pruner`` (its LoRA is ``training.lora_rank``),
    ``flap``, ``minitron`` (width), ``minitron-depth`` and ``shortgpt`` (whole layers), ``magnitude``,
    ``random``, ``modegpt`` (MLPs), ``grail``, ``slicegpt`` (eight columns of the hidden size at a time, in
    one phase), ``sheared-llama`` (masks that are learnt beside the weights). They take one step a phase, and
    decide ``criterion``, ``widths``, ``amplitude`` and ``repair`` themselves."""
    phases: int = 20
    """N_P, the number of prune-and-train phases; fixed when the pipeline is compiled."""
    phase_sizes: Literal["geometric", "linear"] = "geometric"
    """Sizes between the base and the target: equal ratios (the paper) or equal differences."""
    steps_per_phase: int = 0
    """Pruning steps in a phase; importance is measured again before each. 0 takes as many as make 5 % of the
    parameters each on average; one may remove more, where units of attention fall due together."""
    amplitude: float = 0.02
    """A of eq. 6: how much the sparsity of layers varies. 0 prunes all layers alike."""
    amplitude_per: Literal["share", "step"] = "share"
    """``share``: A applies to a step of 2 %, and to others in proportion, so that the number of steps does
    not matter. ``step`` (the paper): A applies to each step, whatever its size."""
    widths: WidthRule = "similarity"
    """How the sparsity of a step is spread over the layers. ``similarity`` (the paper): by eq. 6, from layer
    importance that the largest deviation scales to 1. ``ranks``: likewise, from the ranks of the layers;
    ``clipped``: from deviations of at most twice their median; so no outlier sets the scale. ``softmax``:
    MoDeGPT's shares; ``amplitude`` does not count. ``search``: the paper's widths, and from there those that
    keep the model closest to the phase's checkpoint (Kullback-Leibler divergence on 4,096 calibration
    tokens); all weights are in memory for it, and ``steps_per_phase`` must be 1."""
    similarity: Literal["cosine", "euclidean", "manhattan"] = "cosine"
    """How a layer's input and output are compared (eq. 3)."""
    criterion: CriterionName = field(default="fisher_per_token", metadata=formerly("taylor_l1"))
    """How a group is scored. ``taylor_l1`` is the paper's; ``taylor_per_microbatch`` approximates it.
    ``fisher_per_token`` takes as long and [keeps more of the model](results.md#criteria)."""
    repair: RepairName = field(default="ridge", metadata=formerly("none"))
    """What is done to the weights that stay after a cut. ``ridge``: those of o_proj and down_proj take over
    what those that went contributed, in closed form, layer after layer; ``ridge_to_zero``: with a ridge that
    pulls to zero instead of to the weights as they were (GRAIL, MoDeGPT). ``bias``: o_proj and down_proj get
    biases that make up for the mean of what went (FLAP). ``none`` (the paper): nothing."""
    repair_ridge: float = 0.0
    """Strength of the ridge of a repair, as a share of the mean square of the activation that a repaired
    weight reads (under ``ridge_to_zero``: of all of them). 0 takes the method's own: 0.001 for ``grail``,
    0.0001 for ``modegpt``, else 0.1."""
    repair_tokens: str = "128k"
    """Tokens of the calibration corpus that a repair (or the bases of ``slicegpt``, or the ranking of
    embedding channels) is computed from, in sequences of ``calibration.sequence_length``; at most what the
    corpus holds."""
    generated_tokens: str = "0"
    """Tokens that the base model writes itself, beside ``repair_tokens`` of the corpus
    ([self-calibration](https://arxiv.org/abs/2410.17170)): once a run, in sequences of
    ``calibration.sequence_length``. A distillation takes them when the corpus is used up. Such text is
    closer to what the model was trained on than most corpora."""
    distill_steps: int = 0
    """Updates right after a cut and its repair that teach what is left to expect what the dense base model
    expects (Kullback-Leibler divergence). 0 (the paper): none."""
    distill_rate: float = 1e-4
    """Largest learning rate of these updates, and that of the weights beside the masks of
    ``sheared-llama``."""
    distill_batch_tokens: str = "1k"
    """Tokens of the calibration corpus that each update (or each of ``mask_steps``) takes, in sequences of
    ``calibration.sequence_length``; none twice before the corpus and ``generated_tokens`` are used up."""
    mask_steps: int = 100
    """Updates in which ``sheared-llama`` learns masks and weights before it cuts."""
    mask_rate: float = 1.0
    """Learning rate of these masks, and of the multipliers that pull them to the size."""
    hidden_size: str = _WHOLE
    """Embedding channels that stay under ``minitron`` and ``sheared-llama``: a count or a share of the base
    model's, to the nearest common multiple of 8 and the query heads of a layer. Heads and MLP channels take
    up the rest of the size. Fewer than all take one phase."""
    layers: str = "auto"
    """Decoder layers that stay under ``sheared-llama``, ``shortgpt`` and ``minitron-depth``: a count or a
    share of the base model's. The widths take up the rest of the size; it takes one phase. ``auto``: all
    under ``sheared-llama``, as few as leave enough parameters under the other two."""
    attention_unit: AttentionUnit = "auto"
    """What attention loses. ``auto``: a KV head with its query heads, if it scores lower per parameter than
    the MLP channels it would replace (under the Taylor criteria and ``fisher_per_token``; else as
    ``kv_group``; ``query_head`` for ``minitron``, ``none`` for ``minitron-depth``, ``modegpt``, ``shortgpt``
    and ``slicegpt``, ``kv_group`` for the other compared methods). ``kv_group`` (the paper): KV heads with
    their query heads, at the MLP's sparsity. ``query_head``: one query head of every KV head, at the MLP's
    sparsity. ``none``: nothing."""
    width_multiple: int = WIDTH_MULTIPLE
    """MLP widths are multiples of this, so the target is met to within half of it in channels. 32 lets
    llama.cpp quantize every layer; 1 gets closest to the target."""
    profile: Literal["free", "portable"] = "free"
    """``free``: layers of any size. ``portable``: layers that fit the DeciLM format, which vLLM, SGLang,
    TensorRT-LLM and MLX read without our code: attention stays whole, MLP widths are multiples of 256 (or of
    a ``width_multiple`` that is one); the base model must be a Llama without biases."""

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
        yield from self._contradictions()
        yield from in_range("phases", self.phases, 1, 1000)
        # Each step has a draw of its own; those from 997 on are the repair's, the search's and the masks'.
        yield from in_range("steps_per_phase", self.steps_per_phase, 0, 990)
        yield from in_range("amplitude", self.amplitude, 0, 1)
        yield from in_range("width_multiple", self.width_multiple, 1, 4096)
        if self.repair_ridge:
            yield from in_range("repair_ridge", self.repair_ridge, 1e-4, 1e4)
        yield from in_range("distill_steps", self.distill_steps, 0, 10**6)
        yield from in_range("distill_rate", self.distill_rate, 1e-9, 1)
        yield from in_range("mask_steps", self.mask_steps, 1, 10**6)
        yield from in_range("mask_rate", self.mask_rate, 1e-6, 10)
        for name, instead in (
            ("repair_tokens", "repair to none"),
            ("distill_batch_tokens", "distill_steps to 0"),
        ):
            value = getattr(self, name)
            try:
                if parse_count(value) <= 0:
                    yield f"{name}={value} must be positive. Or set {instead}."
            except ValueError:
                yield f"{name}={value} is not a count. Give one such as {getattr(PruneSettings, name)}."
        try:
            if self.generates and not self.takes_repair_tokens and not self.distill_steps:
                which = "distill_steps" if "repair" in FIXED[self.method] else "repair to ridge"
                yield (
                    f"generated_tokens={self.generated_tokens} is for a repair or a distillation, and this "
                    f"recipe has none. Set {which}, or generated_tokens to 0."
                )
        except ValueError:
            yield f"generated_tokens={self.generated_tokens} is not a count. Give one such as 128k, or 0."
        if self.narrows:
            yield from self._smaller_problems(
                "hidden_size", "embedding channels", method=NARROWING, phases=(1,), profile=("free",)
            )
        if self.layers != "auto":
            yield from self._smaller_problems("layers", "decoder layers", method=LAYERED, phases=(1,))
        if self.profile != "portable":
            return
        if FIXED[self.method].get("repair", self.repair) == "bias":
            yield (
                "repair=bias gives projections biases, which profile=portable does not hold. Choose another "
                "repair or method, or set profile to free."
            )
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

    def _contradictions(self) -> Iterator[str]:
        if self.widths == "search" and self.method == "adapt-pruner" and self.steps_per_phase != 1:
            yield (
                f"steps_per_phase={self.steps_per_phase}, but widths=search decides all widths of a phase in "
                "one step. Set steps_per_phase to 1, or choose another rule for the widths."
            )
        if self.method == "slicegpt" and self.phases != 1:
            yield (
                f"phases={self.phases}: method=slicegpt cannot prune what it has sliced, so it takes one. "
                "Set phases to 1."
            )
        fixed = FIXED[self.method]
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            if name in fixed and value not in (setting.default, _STORED.get(name), fixed[name]):
                yield (
                    f"{name}={value} contradicts method={self.method}, which decides it: {fixed[name]}. "
                    f"Leave {name} out, or set method to adapt-pruner."
                )

    def _smaller_problems(self, name: str, what: str, **only: tuple[Any, ...]) -> Iterator[str]:
        """Yield what is wrong with the number of ``what`` that stay; it goes with ``only`` these settings."""
        value = getattr(self, name)
        try:
            if is_share(value) and not 0 < float(value.strip(" %")) < 100:
                yield f"{name}={value} must lie between 0% and {_WHOLE}. Leave it out, and all stay."
            if not is_share(value) and parse_count(value) <= 0:
                yield f"{name}={value} must be positive. Ask for the {what} that stay."
        except ValueError:
            yield f"{name}={value} is neither a count (24) nor a share (75%). Give one of them."
        for other, allowed in only.items():
            if (found := getattr(self, other)) not in allowed:
                yield (
                    f"{name}={value} does not go with {other}={found}. Set {other} to "
                    f"{' or '.join(map(str, allowed))}, or leave {name} out."
                )

    def applied(self) -> "PruneSettings":
        """Return the settings as their method applies them."""
        defaults: dict[str, Any] = {field.name: field.default for field in fields(self)}
        preferred = {
            name: value
            for name, value in PREFERRED.get(self.method, {}).items()
            if getattr(self, name) == defaults[name]
        }
        return replace(self, **FIXED[self.method], **preferred)

    @property
    def ridge(self) -> float:
        """The strength of the ridge of a repair as it applies."""
        return self.applied().repair_ridge or _RIDGE

    @property
    def generates(self) -> bool:
        """Whether the base model writes text for its own calibration."""
        return parse_count(self.generated_tokens) > 0

    @property
    def takes_repair_tokens(self) -> bool:
        """Whether something is computed from ``repair_tokens``."""
        repair = FIXED[self.method].get("repair", self.repair)
        return repair != "none" or slices_or_ranks(self)

    @property
    def narrows(self) -> bool:
        """Whether embedding channels go."""
        return self.hidden_size != _WHOLE

    @property
    def removes_layers(self) -> bool:
        """Whether layers go as a whole."""
        return self.method in WHOLE_LAYERS or self.layers != "auto"

    def target_params(self, base_params: int) -> int:
        """Return the target as a parameter count for a base model of ``base_params`` parameters."""
        if is_share(self.target):
            return round(base_params * float(self.target.strip(" %")) / 100)
        return parse_count(self.target)


def slices_or_ranks(settings: PruneSettings) -> bool:
    """Return whether score-layers computes bases, or a ranking of channels, from ``repair_tokens``."""
    return settings.method == "slicegpt" or (settings.narrows and settings.method == "minitron")


def makes_model(settings: PruneSettings) -> bool:
    """Return whether score-layers publishes a model that the method has made, for prune-step to cut."""
    return settings.method in ("slicegpt", "sheared-llama") or settings.narrows


def decides_on_model(settings: PruneSettings) -> bool:
    """Return whether score-layers opens the model, since statistics alone do not decide a step."""
    return settings.method in OF_THE_MODEL or settings.widths == "search" or settings.narrows
