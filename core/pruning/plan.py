"""A plan: the groups of each layer that stay. Made from statistics, applied by surgery, stored as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from core.errors import PlanError
from core.model.shape import LayerShape
from core.pruning.scoring.statistics import LayerScores
from core.untrusted import decode

FORMAT = 1
"""Of ``plan.json``."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What one layer keeps, as ascending indices into its present groups; a layer that keeps none goes whole.

    Attributes:
        query_heads: Kept query heads; the same number for each kept KV head.
        kv_heads: Kept KV heads.
        mlp_channels: Kept MLP channels.
    """

    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    mlp_channels: tuple[int, ...]

    @property
    def stays(self) -> bool:
        """Whether the layer is still there."""
        return bool(self.mlp_channels)

    def shape(self) -> LayerShape:
        """Return the sizes of the layer that stays."""
        return LayerShape(
            query_heads=len(self.query_heads), kv_heads=len(self.kv_heads), mlp_width=len(self.mlp_channels)
        )

    def then(self, later: "LayerPlan") -> "LayerPlan":
        """Compose with a plan made for what this one leaves."""
        return LayerPlan(
            query_heads=tuple(self.query_heads[i] for i in later.query_heads),
            kv_heads=tuple(self.kv_heads[i] for i in later.kv_heads),
            mlp_channels=tuple(self.mlp_channels[i] for i in later.mlp_channels),
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A pruning step for a whole model.

    Attributes:
        layers: What each layer keeps.
        before: Sizes of each layer of the checkpoint that the plan was made for.
        checkpoint: Digest of that checkpoint; the plan is only valid for it.
        statistics: Digest of the statistics it was made from.
        importance: Normalised importance of each layer at the last step.
        sparsity: Cumulative sparsity of each layer, a share of its width at the start of the run.
        params_before: Parameters before.
        params_after: Parameters after.
        target_params: Requested parameters.
    """

    layers: tuple[LayerPlan, ...]
    before: tuple[LayerShape, ...]
    checkpoint: str
    statistics: str
    importance: tuple[float, ...]
    sparsity: tuple[float, ...]
    params_before: int
    params_after: int
    target_params: int

    @property
    def after(self) -> tuple[LayerShape, ...]:
        """Sizes of each layer that the plan leaves."""
        return tuple(layer.shape() for layer in self.layers if layer.stays)

    def then(self, later: "Plan") -> "Plan":
        """Compose with a plan made for what this one leaves; the result fits this one's checkpoint."""
        following = iter(later.layers)
        return replace(
            later,
            layers=tuple(layer.then(next(following)) if layer.stays else layer for layer in self.layers),
            before=self.before,
            checkpoint=self.checkpoint,
            statistics=self.statistics,
            params_before=self.params_before,
        )

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}))

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read what ``save`` wrote.

        Raises:
            FormatError: If a newer version has written it.
            PlanError: If the file is not a plan.
        """
        again = "Run score-layers again."
        try:
            content = path.read_bytes()
        except OSError as error:
            raise PlanError(f"{path} cannot be read ({error}). {again}") from error
        plan = decode(cls, content, str(path), again, newest=FORMAT, error=PlanError)
        if len(plan.layers) != len(plan.before):
            raise PlanError(f"{path} plans {len(plan.layers)} of {len(plan.before)} layers. {again}")
        if any(size < 1 for shape in plan.before for size in astuple(shape)):
            raise PlanError(f"{path} is damaged: a layer has no groups. {again}")
        return plan

    def check(self, checkpoint: str, layers: Sequence[LayerShape]) -> None:
        """Refuse a checkpoint that the plan was not made for.

        Raises:
            PlanError: If the digests or the layer sizes differ, or the plan keeps groups that are not there.
        """
        if checkpoint != self.checkpoint:
            raise PlanError(
                f"the plan was made for checkpoint {self.checkpoint[:12]}, not for {checkpoint[:12]}. "
                "Apply it to the checkpoint that it was made for, or calibrate this one."
            )
        if tuple(layers) != self.before:
            raise PlanError("the plan's layer sizes are not the checkpoint's. Calibrate and score it again.")
        for index, (plan, shape) in enumerate(zip(self.layers, self.before, strict=True)):
            if not _fits(plan, shape):
                raise PlanError(f"the plan keeps groups that layer {index} does not have. Score it again.")
        if not self.after:
            raise PlanError("the plan keeps no layer. Score the checkpoint again.")


def _fits(plan: LayerPlan, shape: LayerShape) -> bool:
    if not (plan.query_heads or plan.kv_heads or plan.mlp_channels):
        return True
    kept = [
        (plan.query_heads, shape.query_heads),
        (plan.kv_heads, shape.kv_heads),
        (plan.mlp_channels, shape.mlp_width),
    ]
    whole = all(indices and list(indices) == sorted(set(indices)) for indices, _ in kept)
    if not whole or any(indices[0] < 0 or indices[-1] >= size for indices, size in kept):
        return False
    # Kept heads must still read their own KV head.
    per_group, position = (
        len(plan.query_heads) / len(plan.kv_heads),
        {h: i for i, h in enumerate(plan.kv_heads)},
    )
    groups = [position.get(head // shape.heads_per_group) for head in plan.query_heads]
    return groups == [i // per_group for i in range(len(groups))]


def select_groups(scores: LayerScores, now: LayerShape, after: LayerShape) -> LayerPlan:
    """Choose what a layer keeps: within each kind, the lowest-scoring groups go first (section 3.1).

    Args:
        scores: Scores of the layer's groups.
        now: Sizes of the layer.
        after: Sizes to reach: fewer KV heads with as many query heads each, or fewer query heads each.
    """
    per_group = now.heads_per_group
    if after.heads_per_group < per_group:
        by_group = scores.query_heads.view(now.kv_heads, per_group)
        heads = [
            group * per_group + head
            for group, row in enumerate(by_group)
            for head in _highest(row, after.heads_per_group)
        ]
        kv_heads = tuple(range(now.kv_heads))
    else:
        kv_heads = _highest(scores.kv_groups, after.kv_heads)
        heads = [group * per_group + head for group in kv_heads for head in range(per_group)]
    return LayerPlan(
        query_heads=tuple(heads),
        kv_heads=kv_heads,
        mlp_channels=_highest(scores.mlp_channels, after.mlp_width),
    )


def _highest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the indices of the ``count`` highest scores, ascending; the first of equals stay."""
    order = torch.argsort(scores, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))
