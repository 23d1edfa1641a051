"""How much each group matters to the loss: weights and their gradients, one score a group (eq. 7-10)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.errors import PlanError
from core.model.families import Family, Kind
from core.model.shape import LayerShape


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """What the groups of one decoder layer are worth.

    Attributes:
        query_heads: (H,) float32, loss units: l1 norm of w * dL/dw over each query head's weights.
        kv_heads: (K,) float32, the same over each KV head's own weights, without its query heads.
        mlp_channels: (F,) float32, the same over each MLP channel's weights.
    """

    query_heads: Tensor
    kv_heads: Tensor
    mlp_channels: Tensor

    def kv_groups(self) -> Tensor:
        """Return (K,) scores of attention groups: group j holds query heads j*n_rep to (j+1)*n_rep - 1."""
        return self.kv_heads + self.query_heads.view(len(self.kv_heads), -1).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What one calibration has measured on one checkpoint.

    Attributes:
        similarities: (L,) float64, mean over tokens of how alike a layer's input and output are; larger is
            more alike.
        scores: Group scores of each layer.
        loss: Causal-LM loss, nats a token, averaged over the micro-batches.
        tokens: Tokens that were measured on.
    """

    similarities: Tensor
    scores: tuple[LayerScores, ...]
    loss: float
    tokens: int

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {"similarities": self.similarities}
        for index, scores in enumerate(self.scores):
            for name in ("query_heads", "kv_heads", "mlp_channels"):
                tensors[f"layers.{index}.{name}"] = getattr(scores, name).contiguous()
        save_file(tensors, path, metadata={"loss": repr(self.loss), "tokens": str(self.tokens)})

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what ``save`` wrote.

        Raises:
            PlanError: If the file is not one of ours.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                similarities = file.get_tensor("similarities")
                scores = tuple(
                    LayerScores(
                        **{
                            name: file.get_tensor(f"layers.{index}.{name}")
                            for name in ("query_heads", "kv_heads", "mlp_channels")
                        }
                    )
                    for index in range(len(similarities))
                )
                return cls(
                    similarities=similarities,
                    scores=scores,
                    loss=float(metadata["loss"]),
                    tokens=int(metadata["tokens"]),
                )
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise PlanError(f"{path} is not a statistics file ({error}). Run calibrate again.") from error


def group_scores(
    family: Family, layer: LayerShape, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> LayerScores:
    """Score every group of a decoder layer by sum |w * dL/dw| over its weights (eq. 10).

    Args:
        family: Says which weights belong to groups, and how groups lie in them.
        layer: Sizes of the layer.
        weights: Name within the layer to weight or bias, any dtype.
        gradients: The same names to the gradient of the calibration loss, summed over all micro-batches.

    Returns:
        Scores in float32, in which products and sums are taken too (float64 for float64 weights).
    """
    totals: dict[Kind, Tensor] = {}
    for name, slicing in family.slicings.items():
        if name not in weights:
            continue
        wide = torch.promote_types(weights[name].dtype, torch.float32)
        product = (weights[name].to(wide) * gradients[name].to(wide)).abs_().movedim(slicing.axis, 0)
        per_row = product.flatten(1).sum(dim=1) if product.dim() > 1 else product
        for kind, rows in slicing.unit_rows(layer, len(per_row)):
            score = per_row[rows.to(per_row.device)].sum(dim=1)
            totals[kind] = totals[kind] + score if kind in totals else score
    return LayerScores(query_heads=totals["query"], kv_heads=totals["kv"], mlp_channels=totals["mlp"])
