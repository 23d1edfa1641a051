"""The sizes of a model's layers, and the parameters that each group takes."""

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of one decoder layer.

    Attributes:
        query_heads: H.
        kv_heads: K, a divisor of H.
        mlp_width: F.
    """

    query_heads: int
    kv_heads: int
    mlp_width: int

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head (n_rep)."""
        return self.query_heads // self.kv_heads

    def to_dict(self) -> dict[str, int]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model and the parameters of each part.

    Attributes:
        layers: Sizes of each decoder layer.
        outside_params: Parameters outside the decoder layers (embeddings, final norm, an untied output head).
        layer_params: Parameters of a decoder layer outside all groups (norms, output biases).
        query_head_params: Parameters of one query head (its rows of q_proj, its columns of o_proj).
        kv_head_params: Parameters of one KV head (its rows of k_proj and v_proj).
        mlp_channel_params: Parameters of one MLP channel (3*D, and its biases).
    """

    layers: tuple[LayerShape, ...]
    outside_params: int
    layer_params: int
    query_head_params: int
    kv_head_params: int
    mlp_channel_params: int

    def layer_num_params(self, layer: LayerShape) -> int:
        """Return the parameters of a decoder layer of the given sizes."""
        return self.layer_params + self.prunable_params(layer)

    def attention_params(self, layer: LayerShape) -> int:
        """Return the parameters of the attention groups of a decoder layer of the given sizes."""
        return layer.query_heads * self.query_head_params + layer.kv_heads * self.kv_head_params

    def prunable_params(self, layer: LayerShape) -> int:
        """Return the parameters of all groups of a decoder layer of the given sizes."""
        return self.attention_params(layer) + layer.mlp_width * self.mlp_channel_params

    def num_params(self) -> int:
        """Return the parameters of the model; tied weights count once."""
        return self.outside_params + sum(map(self.layer_num_params, self.layers))

    def with_layers(self, layers: tuple[LayerShape, ...]) -> "ModelShape":
        """Return the same model with other layer sizes."""
        return replace(self, layers=layers)
