"""Sheared-LLaMA (Xia et al., arXiv 2310.06694): masks of groups are learnt beside the weights, to a shape.

Every KV head with its query heads, and every MLP channel, has a hard-concrete mask z (Louizos et al.):

    z = clamp(s (HIGH - LOW) + LOW, 0, 1),   s = sigmoid((log u - log(1 - u) + a) / BETA),   u uniform

with a learnt logit a. A Lagrangian, its multipliers by gradient ascent, pulls the expected share of masks
that are not 0 to that of the target shape, in each layer and for each kind. In the end the highest logits of
each layer stay, exactly as many as the shape has, and what is left of their masks goes into the weights.

Left out: masks of layers and of the hidden size. Our choice: the logits start at ``START``.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from core.errors import TrainingError
from core.model.config import layer_shapes
from core.model.families import family_of
from core.model.shape import LayerShape
from core.pruning.plan import LayerPlan, select_groups
from core.pruning.scoring.statistics import LayerScores
from core.pruning.surgery import prune_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
START = 2.5
"""All masks are open at first: 98 % are not 0."""
RAMP = 0.2
"""Share of the steps in which the target goes from the dense shape to the one that is asked for."""

Masks = Mapping[tuple[int, str], Tensor]
"""A value for each group, by the number of the layer and the projection that reads its outputs."""


def sampled(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw masks."""
    u = torch.rand(logits.shape, dtype=logits.dtype, generator=generator).to(logits.device)
    u = u.clamp(1e-6, 1 - 1e-6)
    return _stretched(torch.sigmoid((u.log() - (-u).log1p() + logits) / BETA))


def kept_share(logits: Tensor) -> Tensor:
    """Return the expected share of masks that are not 0."""
    return torch.sigmoid(logits - BETA * math.log(-LOW / HIGH)).mean()


def _stretched(share: Tensor) -> Tensor:
    return (share * (HIGH - LOW) + LOW).clamp(0, 1)


def domain_weights(weights: Tensor, losses: Tensor, references: Tensor) -> Tensor:
    """Return the shares of domains in the next batches: more of those whose loss is above its reference."""
    raised = weights * (losses - references).clamp(min=0).exp()
    return raised / raised.sum()


def sheared_model(
    model: "PreTrainedModel",
    tokens: Tensor,
    shape: Sequence[LayerShape],
    *,
    steps: int,
    batch: int,
    rate: float = 1e-4,
    mask_rate: float = 1.0,
    seed: int = 0,
) -> tuple["PreTrainedModel", tuple[LayerPlan, ...]]:
    """Return what stays of a model, and which groups these are.

    Args:
        model: Its weights are trained.
        tokens: (S, T) token ids, taken in turn.
        shape: Sizes of each layer to reach: fewer KV heads with as many query heads each, narrower MLPs.
        steps: Updates.
        batch: Sequences an update.
        rate: Learning rate of the weights.
        mask_rate: Learning rate of the logits, and of the multipliers.
        seed: Of the masks that are drawn.

    Raises:
        TrainingError: If the loss is not finite.
    """
    logits = learn_masks(
        model, tokens, shape, steps=steps, batch=batch, rate=rate, mask_rate=mask_rate, seed=seed
    )
    plans = tuple(
        select_groups(_scores(index, now, logits), now, after)
        for index, (now, after) in enumerate(zip(layer_shapes(model.config), shape, strict=True))
    )
    masks = final_masks(logits, plans)
    with torch.no_grad():
        for (index, path), columns in _columns(model, masks).items():
            _projection(model, index, path).weight.mul_(columns)
    return prune_model(model, plans), plans


def learn_masks(
    model: "PreTrainedModel",
    tokens: Tensor,
    shape: Sequence[LayerShape],
    *,
    steps: int,
    batch: int,
    rate: float,
    mask_rate: float,
    seed: int,
) -> Masks:
    """Train weights and masks; returns the logits. Arguments are those of ``sheared_model``."""
    generator = torch.Generator().manual_seed(seed)
    logits: dict[tuple[int, str], Tensor] = {}
    targets: dict[tuple[int, str], float] = {}
    for index, (now, after) in enumerate(zip(layer_shapes(model.config), shape, strict=True)):
        for path, count, kept in (
            ("self_attn.o_proj", now.kv_heads, after.kv_heads),
            ("mlp.down_proj", now.mlp_width, after.mlp_width),
        ):
            if kept < count:
                logits[index, path] = torch.full(
                    (count,), START, dtype=model.dtype, device=model.device, requires_grad=True
                )
                targets[index, path] = kept / count
    # A multiplier of the gap and one of its square for each layer and kind.
    multipliers = torch.zeros(2, len(logits), dtype=model.dtype, device=model.device, requires_grad=True)
    model.requires_grad_(True).train()
    learner = torch.optim.AdamW(
        [
            {"params": list(model.parameters()), "lr": rate},
            {"params": list(logits.values()), "lr": mask_rate, "weight_decay": 0.0},
        ]
    )
    opponent = torch.optim.AdamW([multipliers], lr=mask_rate, weight_decay=0.0, maximize=True)
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(tokens)
        ids = tokens[rows].to(model.device)
        ramp = min(1.0, (step + 1) / max(1, round(RAMP * steps)))
        gaps = torch.stack([kept_share(a) - (1 - ramp * (1 - targets[key])) for key, a in logits.items()])
        masks = {key: sampled(a, generator) for key, a in logits.items()}
        with masked(model, masks):
            loss = model(ids, labels=ids, use_cache=False).loss
        if not bool(loss.isfinite()):
            raise TrainingError(f"the loss is not finite in step {step + 1}. Lower the learning rate.")
        (loss + (multipliers[0] * gaps + multipliers[1] * gaps.square()).sum()).backward()
        for optimizer in (learner, opponent):
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    return {key: a.detach() for key, a in logits.items()}


def final_masks(logits: Masks, plans: Sequence[LayerPlan]) -> Masks:
    """Return the masks in the end: 0 for groups that go, and without chance for those that stay."""
    masks = {}
    for (index, path), a in logits.items():
        kept = plans[index].kv_heads if path == "self_attn.o_proj" else plans[index].mlp_channels
        mask = torch.zeros_like(a)
        mask[list(kept)] = _stretched(torch.sigmoid(a))[list(kept)]
        masks[index, path] = mask
    return masks


@contextlib.contextmanager
def masked(model: "PreTrainedModel", masks: Masks) -> Iterator[None]:
    """Multiply the outputs of groups by their masks within the block."""

    def multiply(columns: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda _, given: (given[0] * columns,)

    hooks = [
        _projection(model, index, path).register_forward_pre_hook(multiply(columns))
        for (index, path), columns in _columns(model, masks).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _columns(model: "PreTrainedModel", masks: Masks) -> dict[tuple[int, str], Tensor]:
    """Return the mask of each input of the projections."""
    return {
        key: mask.repeat_interleave(_projection(model, *key).in_features // len(mask))
        for key, mask in masks.items()
    }


def _projection(model: "PreTrainedModel", index: int, path: str) -> nn.Linear:
    linear = model.get_submodule(f"{family_of(model.config).layers}.{index}.{path}")
    assert isinstance(linear, nn.Linear), "what reads groups is a linear map"
    return linear


def _scores(index: int, now: LayerShape, logits: Masks) -> LayerScores:
    groups = logits.get((index, "self_attn.o_proj"), torch.zeros(now.kv_heads)).cpu()
    channels = logits.get((index, "mlp.down_proj"), torch.zeros(now.mlp_width)).cpu()
    heads = groups.repeat_interleave(now.heads_per_group)
    return LayerScores(query_heads=heads, kv_groups=groups, mlp_channels=channels)
