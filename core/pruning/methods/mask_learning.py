"""Masks that are learnt beside a model's weights until a given shape is what is left open of them.

Every mask is hard-concrete (Louizos et al., arXiv 1712.01312):

    z = clamp(s (HIGH - LOW) + LOW, 0, 1),   s = sigmoid((log u - log(1 - u) + a) / BETA),   u uniform

with a learnt logit a. A Lagrangian, its multipliers by gradient ascent, pulls the expected share of masks
that are not 0 to that of the target shape, in each layer and for each kind.

Unlike Sheared-LLaMA's (arXiv 2310.06694), the target is no equality that the Lagrangian alone keeps. In a few
hundred updates its multipliers wind up while there are too many masks, and go on to close those of groups
that are to stay; once closed, a mask has no gradient left that would open it. So the multiplier of the gap
never goes below 0: it pushes down only. And after each update the highest logits, as many as stay at the
target of that update, are raised to ``FLOOR`` where they are lower, which is the projection onto what has
that many open masks.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from core.errors import TrainingError
from core.model.config import layer_shapes
from core.model.decoder import final_states
from core.model.loss import loss_gradient
from core.model.shape import LayerShape
from core.progress import Progress
from core.pruning.methods.masks import HIDDEN, LAYERS, Masks, masked
from core.pruning.methods.opened import KeptTraining

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
START = 2.5
"""All masks are open at first: 98 % are not 0."""
FLOOR = BETA * math.log(-LOW / HIGH)
"""The least logit of a group that stays: it is open in half of the draws, and its mask in the end is 0.1."""
RAMP = 0.2
"""Share of the steps in which the target goes from the dense shape to the one that is asked for."""
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class MaskTraining:
    """How masks and weights are learnt.

    Attributes:
        steps: Updates.
        batch: Sequences an update.
        micro_batch: Sequences that pass through the model at once.
        rate: Learning rate of the weights.
        mask_rate: Learning rate of the logits, and of the multipliers.
        autocast: Whether products are bfloat16.
        seed: Of the masks that are drawn.
    """

    steps: int
    batch: int
    micro_batch: int
    rate: float
    mask_rate: float
    autocast: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class LearntMasks:
    """What was learnt.

    Attributes:
        logits: Of the masks.
        losses: Of each step under the masks that were drawn for it, in nats a token.
        seconds: Time of all steps.
        earlier_s: What of it earlier attempts have spent.
    """

    logits: Masks
    losses: list[float]
    seconds: float
    earlier_s: float


class _Learner(nn.Module):
    """All that is learnt, as the parameters of one module: weights, logits, multipliers."""

    def __init__(self, model: "PreTrainedModel", logits: Masks) -> None:
        super().__init__()
        self.model, self.logits = model.requires_grad_(True).train(), nn.ParameterList(logits.values())
        # One of the gap and one of its square for each layer and kind.
        multipliers = torch.zeros(2, len(logits), dtype=model.dtype, device=model.device)
        self.multipliers = nn.Parameter(multipliers)

    def optimizer(self, training: MaskTraining) -> torch.optim.Optimizer:
        """Return what descends by weights and logits, and ascends by multipliers."""
        groups: list[dict[str, object]] = [
            {"params": list(self.model.parameters()), "lr": training.rate},
            {"params": list(self.logits), "lr": training.mask_rate},
            {"params": [self.multipliers], "lr": training.mask_rate, "maximize": True},
        ]
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def sampled(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw masks."""
    u = torch.rand(logits.shape, dtype=logits.dtype, generator=generator).to(logits.device)
    u = u.clamp(1e-6, 1 - 1e-6)
    return _stretched(torch.sigmoid((u.log() - (-u).log1p() + logits) / BETA))


def kept_share(logits: Tensor) -> Tensor:
    """Return the expected share of masks that are not 0."""
    return torch.sigmoid(logits - FLOOR).mean()


def certain(logits: Tensor) -> Tensor:
    """Return masks without chance."""
    return _stretched(torch.sigmoid(logits))


def _stretched(share: Tensor) -> Tensor:
    return (share * (HIGH - LOW) + LOW).clamp(0, 1)


def learn_masks(
    model: "PreTrainedModel",
    tokens: Tensor,
    shape: Sequence[LayerShape],
    training: MaskTraining,
    *,
    hidden_size: int,
    depth: int,
    kept: KeptTraining | None = None,
) -> LearntMasks:
    """Train the weights of a model, in place, and masks of its groups.

    AdamW without weight decay, at constant rates; the norm of the weights' gradient is at most 1. What bounds
    multipliers and logits after each update, and why, is at the top of this module.

    Args:
        model: Float32 weights.
        tokens: (S, T) token ids, taken in turn.
        shape: Sizes of each layer to reach: fewer KV heads with as many query heads each, or fewer query
            heads each, and narrower MLPs.
        training: How.
        hidden_size: Embedding channels to reach.
        depth: Layers to reach.
        kept: Keeps what is learnt, for a next attempt.

    Raises:
        TrainingError: If a loss or the gradient norm is not finite.
    """
    generator = torch.Generator().manual_seed(training.seed)
    logits, targets, rows_of = _open_masks(model, shape, hidden_size, depth)
    learner = _Learner(model, logits)
    logits = dict(zip(logits, learner.logits, strict=True))
    optimizer, multipliers, weights = learner.optimizer(training), learner.multipliers, [*model.parameters()]
    losses, spent = kept.restore(learner, optimizer) if kept else ([], 0.0)
    if losses:
        log.info("the learning of masks resumed at step %d of %d", len(losses), training.steps)
    with torch.no_grad():
        for _ in losses:
            for a in logits.values():
                sampled(a, generator)  # as these steps have drawn
    steps, a_step, started = training.steps, training.batch * tokens.shape[1], time.monotonic() - spent
    with Progress("masks", steps * a_step, "tokens", done=len(losses) * a_step) as progress:
        for step in range(len(losses), steps):
            ramp = min(1.0, (step + 1) / max(1, round(RAMP * steps)))
            aims = {key: 1 - ramp * (1 - target) for key, target in targets.items()}
            gaps = torch.stack([kept_share(a) - aims[key] for key, a in logits.items()])
            drawn = {key: sampled(a, generator) for key, a in logits.items()}
            rows = torch.arange(step * training.batch, (step + 1) * training.batch) % len(tokens)
            loss, gradients = _gradients(model, tokens[rows], drawn, training)
            norm = float(torch.nn.utils.clip_grad_norm_(weights, _MAX_GRAD_NORM))
            _check_finite(loss, norm, step, training)
            penalty = (multipliers[0] * gaps + multipliers[1] * gaps.square()).sum()
            torch.autograd.backward([penalty, *drawn.values()], [None, *gradients])
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                multipliers.clamp_(min=0)
                for key, a in logits.items():
                    _hold_open(a.view(rows_of[key], -1), aims[key])
            losses.append(loss)
            progress.add(a_step, f"step {step + 1} of {steps}, loss {loss:.3f}")
            if kept and step + 1 < steps:
                kept.save(learner, optimizer, losses, time.monotonic() - started)
    model.eval()
    return LearntMasks(
        logits={key: a.detach() for key, a in logits.items()},
        losses=losses,
        seconds=time.monotonic() - started,
        earlier_s=spent,
    )


def _open_masks(
    model: "PreTrainedModel", shape: Sequence[LayerShape], hidden_size: int, depth: int
) -> tuple[dict[tuple[int, str], Tensor], dict[tuple[int, str], float], dict[tuple[int, str], int]]:
    """Return logits for the units of each layer and kind that loses some, and the share that stays.

    The last of the three says in how many rows, each of which keeps that share: one, but for query heads,
    which compete within their group.
    """
    rows, sizes = {}, {HIDDEN: (model.config.hidden_size, hidden_size), LAYERS: (len(shape), depth)}
    for index, (now, after) in enumerate(zip(layer_shapes(model.config), shape, strict=True)):
        whole = after.kv_heads == now.kv_heads
        heads = (now.query_heads, after.query_heads) if whole else (now.kv_heads, after.kv_heads)
        sizes[index, "self_attn.o_proj"] = heads
        rows[index, "self_attn.o_proj"] = now.kv_heads if whole else 1
        sizes[index, "mlp.down_proj"] = (now.mlp_width, after.mlp_width)
    masked = {key: (count, kept) for key, (count, kept) in sizes.items() if kept < count}
    logits = {
        key: torch.full((count,), START, dtype=model.dtype, device=model.device)
        for key, (count, _) in masked.items()
    }
    targets = {key: kept / count for key, (count, kept) in masked.items()}
    return logits, targets, {key: rows.get(key, 1) for key in masked}


def _check_finite(loss: float, norm: float, step: int, training: MaskTraining) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise TrainingError(
        f"learning masks has stopped at step {step + 1} of {training.steps}: the loss is {loss}, the norm "
        f"of its gradient {norm}. Lower prune.distill_rate (it is {training.rate:g}), or set "
        "calibration.precision to float32; either makes it another run."
    )


def _hold_open(rows: Tensor, share: float) -> None:
    """Raise the highest logits of each row, a ``share`` of them, to ``FLOOR`` where they are lower."""
    highest, places = rows.topk(max(1, round(share * rows.shape[1])))
    rows.scatter_(1, places, highest.clamp(min=FLOOR))


def _gradients(
    model: "PreTrainedModel", ids: Tensor, drawn: Masks, training: MaskTraining
) -> tuple[float, list[Tensor]]:
    """Return the mean loss under drawn masks, and its gradients by them; the weights get theirs added."""
    masks = {key: mask.detach().requires_grad_() for key, mask in drawn.items()}
    predictions, total = ids.shape[0] * (ids.shape[1] - 1), 0.0
    for part in ids.to(model.device, torch.long).split(training.micro_batch):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=training.autocast):
            with masked(model, masks):
                states = final_states(model, part)
            of_part, gradient = loss_gradient(model, states, part, scale=1 / predictions)
        states.backward(gradient)
        total += of_part.item() / predictions
    gradients = [mask.grad for mask in masks.values() if mask.grad is not None]
    assert len(gradients) == len(masks), "each layer reads its masks"
    return total, gradients
