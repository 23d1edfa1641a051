"""How each model family lays out the groups that pruning removes; drives scores, sizes and surgery."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from core.errors import UnsupportedModelError
from core.model.shape import LayerShape

Kind = Literal["query", "kv", "mlp"]
"""The kind of group that a slice of a weight belongs to."""


@dataclass(frozen=True)
class Slicing:
    """How the groups of a layer lie in one of its weights.

    Attributes:
        axis: The dimension along which groups lie (0 for a projection that makes them, 1 for one that reads
            them).
        kinds: Kinds of the blocks along the axis; more than one where projections are fused.
    """

    axis: int
    kinds: tuple[Kind, ...]

    def unit_rows(self, layer: LayerShape, length: int) -> list[tuple[Kind, Tensor]]:
        """Return the rows along ``axis`` of each unit.

        Args:
            layer: Sizes of the layer.
            length: Size of the weight along ``axis``: A rows per head, one row per channel.

        Returns:
            For each block, its kind and a (units, rows per unit) int64 tensor of row numbers.
        """
        units = {"query": layer.query_heads, "kv": layer.kv_heads, "mlp": layer.mlp_width}
        rows = length // sum(units[kind] for kind in self.kinds)
        blocks = torch.arange(length).split([units[kind] * rows for kind in self.kinds])
        return [(kind, block.view(-1, rows)) for kind, block in zip(self.kinds, blocks, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Family:
    """The layout of one model family.

    Attributes:
        model_type: ``model_type`` of its config.
        layers: Name of the list of decoder layers in the state dict.
        slicings: Weight or bias name within a layer to how groups lie in it; all other parameters stay whole.
        prunes_heads: Whether a head can be removed without changing the others.
        ends_in_sum: Whether ``last_projection``'s output only goes into the residual sum, at most scaled.
        slices_width: Whether a layer is two blocks, each behind a norm and added as it is to the sum.
        last_projection: The linear map that ends a layer.
    """

    model_type: str
    layers: str
    slicings: dict[str, Slicing]
    prunes_heads: bool = True
    ends_in_sum: bool = True
    slices_width: bool = True
    last_projection: str = "mlp.down_proj"


def _projections(**kinds: tuple[int, *tuple[Kind, ...]]) -> dict[str, Slicing]:
    """Expand ``block__projection=(axis, kind, ...)`` to its weight and, if outputs are cut, its bias."""
    slicings = {}
    for name, (axis, *blocks) in kinds.items():
        path = name.replace("__", ".")
        slicings[f"{path}.weight"] = Slicing(axis, tuple(blocks))
        if axis == 0:
            slicings[f"{path}.bias"] = Slicing(axis, tuple(blocks))
    return slicings


# A norm over the hidden size, or over one head (Qwen3, Gemma 3), belongs to no group and is in no table.
_LLAMA = _projections(
    self_attn__q_proj=(0, "query"),
    self_attn__k_proj=(0, "kv"),
    self_attn__v_proj=(0, "kv"),
    self_attn__o_proj=(1, "query"),
    mlp__gate_proj=(0, "mlp"),
    mlp__up_proj=(0, "mlp"),
    mlp__down_proj=(1, "mlp"),
)
_FUSED = _projections(
    self_attn__qkv_proj=(0, "query", "kv", "kv"),
    self_attn__o_proj=(1, "query"),
    mlp__gate_up_proj=(0, "mlp", "mlp"),
    mlp__down_proj=(1, "mlp"),
)
_NORMS_OVER_HEADS = {
    "self_attn.q_norm.weight": Slicing(0, ("query",)),
    "self_attn.k_norm.weight": Slicing(0, ("kv",)),
}

FAMILIES = {
    model_type: Family(
        model_type=model_type,
        layers="model.layers",
        slicings=slicings,
        prunes_heads=prunes_heads,
        ends_in_sum=model_type not in ("gemma2", "gemma3_text", "olmo2"),  # a norm follows
        slices_width=model_type not in ("gemma2", "gemma3_text", "olmo2", "granite"),
    )
    for model_type, slicings, prunes_heads in (
        ("gemma2", _LLAMA, True),
        ("gemma3_text", _LLAMA, True),
        ("granite", _LLAMA, True),
        ("llama", _LLAMA, True),
        ("mistral", _LLAMA, True),
        # Queries and keys are normalised over all heads at once: removing one changes the others.
        ("olmo2", _LLAMA | _NORMS_OVER_HEADS, False),
        ("phi3", _FUSED, True),
        ("qwen2", _LLAMA, True),
        ("qwen3", _LLAMA, True),
        ("smollm3", _LLAMA, True),
    )
}

_OBSTACLES = {
    "num_local_experts": "is a mixture of experts",
    "num_experts": "is a mixture of experts",
    "n_routed_experts": "is a mixture of experts",
    "kv_lora_rank": "has latent attention",
    "state_size": "is a state-space model",
    "ssm_state_size": "is a state-space model",
    "mamba_d_state": "is a state-space model",
    "text_config": "is multimodal: only a checkpoint of the language model alone could be read",
    "vision_config": "is multimodal: only a checkpoint of the language model alone could be read",
    "is_encoder_decoder": "is an encoder-decoder",
    "use_bidirectional_attention": "attends in both directions",
}
"""Config entries of architectures that no family in the table has."""


def family_of(config: Any) -> Family:
    """Return the family of a transformers config.

    Raises:
        UnsupportedModelError: If the family, or a feature of the config (such as experts), is not supported.
    """
    model_type = getattr(config, "model_type", "unknown")
    obstacle = next((name for name in _OBSTACLES if getattr(config, name, None)), None)
    if model_type in FAMILIES and obstacle is None:
        return FAMILIES[model_type]
    what = f"{_OBSTACLES[obstacle]} ({obstacle})" if obstacle else "is not supported"
    raise UnsupportedModelError(
        f"model family {model_type!r} {what}; supported: {', '.join(sorted(FAMILIES))}. "
        "Choose a base model of one of these."
    )


def under_its_family(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json's content under its actual family.

    MobileLLM is Llama with its own model type, and ``share_embedding`` for tied embeddings.

    Raises:
        UnsupportedModelError: If a MobileLLM shares layers, which Llama does not.
    """
    if data.get("model_type") != "mobilellm":
        return dict(data)
    if data.get("layer_sharing"):
        raise UnsupportedModelError(
            "model family 'mobilellm' is read as llama, but layer_sharing=true runs each layer twice, which "
            "llama does not. Choose a MobileLLM without layer sharing."
        )
    kept = {key: data[key] for key in data.keys() - {"auto_map", "layer_sharing", "share_embedding"}}
    return kept | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": bool(data.get("share_embedding") or data.get("tie_word_embeddings")),
    }
