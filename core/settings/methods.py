"""The pruning methods: which settings each of them decides itself.

The compared systems are what this package computes anyway under other settings, and a rule of their own for
what stays in ``core.pruning.methods`` where that is not enough. All of them get the same texts, meet the same
size, and take one step a phase.
"""

from collections.abc import Mapping
from typing import Any, Literal

MethodName = Literal[
    "adapt-pruner",
    "llm-pruner",
    "flap",
    "minitron",
    "minitron-depth",
    "magnitude",
    "random",
    "shortgpt",
    "modegpt",
    "grail",
    "slicegpt",
    "sheared-llama",
]

_ONE_STEP = {"steps_per_phase": 1, "widths": "similarity"}
_UNIFORM = _ONE_STEP | {"amplitude": 0.0}

FIXED: Mapping[MethodName, Mapping[str, Any]] = {
    "adapt-pruner": {},
    # arXiv 2305.11627: the same share of the groups of every layer but the first and last. Its LoRA is
    # training.lora_rank.
    "llm-pruner": _UNIFORM | {"criterion": "taylor_l1", "repair": "none"},
    # arXiv 2312.11983: one ranking of all groups of the model, and biases for what is lost on average.
    "flap": _ONE_STEP | {"criterion": "standardised_fluctuation", "amplitude": 0.0, "repair": "bias"},
    # arXiv 2407.14679, widths: the number of layers stays, the hidden size as prune.hidden_size says.
    "minitron": _UNIFORM | {"criterion": "activation_l2", "repair": "none"},
    # The same paper's depth: a block of layers by the loss without it, and channels for the exact size.
    "minitron-depth": _UNIFORM | {"criterion": "activation_l2", "repair": "none", "attention_unit": "none"},
    "magnitude": _UNIFORM | {"criterion": "magnitude_l2", "repair": "none"},
    "random": _UNIFORM | {"criterion": "random", "repair": "none"},
    # arXiv 2403.03853: whole layers, and channels for the exact size.
    "shortgpt": _UNIFORM
    | {
        "criterion": "magnitude_l2",
        "similarity": "cosine",
        "repair": "none",
        "attention_unit": "none",
    },
    # arXiv 2408.09632, the part of it that compresses MLPs. Its attention stays whole: the decompositions of
    # query and key (CR) and of value and output (SVD) are not built. The repair is its Nystroem form.
    "modegpt": _ONE_STEP
    | {
        "criterion": "leverage",
        "amplitude": 0.0,
        "widths": "softmax",
        "similarity": "cosine",
        "repair": "ridge_to_zero",
        "attention_unit": "none",
    },
    # arXiv 2602.23795, on what Wanda-sp selects.
    "grail": _UNIFORM | {"criterion": "wanda_sp", "repair": "ridge_to_zero"},
    # arXiv 2401.15024: no groups go, but columns of the hidden size, in a basis of their own for each block.
    "slicegpt": _UNIFORM
    | {"criterion": "magnitude_l2", "repair": "none", "attention_unit": "none", "profile": "free"},
    # arXiv 2310.06694: masks that are learnt beside the weights, to a uniform shape. No score is read.
    "sheared-llama": _UNIFORM | {"criterion": "magnitude_l2", "repair": "none"},
}
"""Settings of the section ``prune`` that a method decides; another value is refused."""

PREFERRED: Mapping[MethodName, Mapping[str, Any]] = {
    "modegpt": {"repair_ridge": 1e-4},  # its Nystroem form has none: as little as rounding asks for
    "grail": {"repair_ridge": 1e-3},  # that of its published code
}
"""Defaults of the section ``prune`` that differ under a method."""

WHOLE_LAYERS: frozenset[MethodName] = frozenset({"shortgpt", "minitron-depth"})
"""Methods under which as many layers go as a whole as the size allows."""

LAYERED: tuple[MethodName, ...] = ("sheared-llama", "shortgpt", "minitron-depth")
"""Methods under which a number of layers can be asked for."""

OF_THE_MODEL: frozenset[MethodName] = frozenset({"minitron-depth", "slicegpt", "sheared-llama"})
"""Methods for which score-layers opens the model: statistics alone do not decide."""

NARROWING: tuple[MethodName, ...] = ("minitron", "sheared-llama")
"""Methods under which embedding channels can go."""

ATTENTION: Mapping[MethodName, Literal["query_head"]] = {"minitron": "query_head"}
"""What ``attention_unit: auto`` means under a method; ``kv_group`` under all others but adapt-pruner."""
