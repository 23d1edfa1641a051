"""Sheared-LLaMA (Xia et al., arXiv 2310.06694): masks of groups are learnt beside the weights, to a shape.

Every attention unit (a KV head with its query heads, or a query head), and every MLP channel, has a
hard-concrete mask z (Louizos et al.):

    z = clamp(s (HIGH - LOW) + LOW, 0, 1),   s = sigmoid((log u - log(1 - u) + a) / BETA),   u uniform

with a learnt logit a. A Lagrangian, its multipliers by gradient ascent, pulls the expected share of masks
that are not 0 to that of the target shape, in each layer and for each kind. In the end the highest logits of
each layer stay, exactly as many as the shape has, and what is left of their masks goes into the weights.

Where embedding channels are to go (``prune.hidden_size``), each has a mask, too, the same in all layers: it
multiplies the signal before each norm, whose mean is over the channels that are not 0.

Where layers are to go (``prune.layers``), each has a mask of what its attention and its MLP add to the
signal.

Left out: batches that are shared out among domains by their loss, as there is one calibration corpus, and
rows of the training mixture hold several sources. Our choice: the logits start at ``START``, and the shape is
uniform.

Unlike the paper's, the target is no equality that the Lagrangian alone keeps. In a few hundred updates its
multipliers wind up while there are too many masks, and go on to close those of groups that are to stay; once
closed, a mask has no gradient left that would open it. So the multiplier of the gap never goes below 0: it
pushes down only. And after each update the highest logits, as many as stay at the target of that update, are
raised to ``FLOOR`` where they are lower, which is the projection onto what has that many open masks.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.errors import TrainingError
from core.model.build import model_shape
from core.model.checkpoint import model_parts
from core.model.config import layer_shapes
from core.model.decoder import final_states
from core.model.layerwise import LayerwiseModel
from core.model.loss import loss_gradient
from core.model.shape import LayerShape
from core.progress import Progress
from core.pruning.methods.masks import HIDDEN, LAYERS, Masks, masked, put_into_weights
from core.pruning.methods.minitron import narrowed_config, narrowed_parts
from core.pruning.methods.opened import OpenedModel
from core.pruning.methods.shortgpt import fewest_layers, step_without
from core.pruning.plan import LayerPlan
from core.pruning.planning import DecideStep, Step, StepRequest, plan_step, sizing_for, step_to
from core.pruning.scoring.statistics import LayerScores
from core.pruning.sparsity import smallest_params
from core.quantities import parse_count

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


def masking_decision(opened: OpenedModel) -> DecideStep:
    """Return what decides a step by masks that are learnt on an opened model, beside its weights."""

    def decide(given: StepRequest) -> Step:
        settings, model = given.settings, opened.model.model
        config, whole = model.config, given.current
        if settings.narrows:
            config = narrowed_config(config, settings, given.target_params)
            given = replace(given, dense=model_shape(config), current=model_shape(config))
        current = given.current
        depth = fewest_layers(settings, current, given.target_params)
        step = plan_step(replace(given, target_params=_at_full_depth(given, depth)))
        if step.shape == whole and depth == len(whole.layers):
            return step
        batch = -(-parse_count(settings.distill_batch_tokens) // opened.tokens.shape[1])
        training = MaskTraining(
            steps=settings.mask_steps,
            batch=batch,
            micro_batch=opened.micro_batch or batch,
            rate=settings.distill_rate,
            mask_rate=settings.mask_rate,
            autocast=opened.autocast,
            seed=opened.seed,
        )
        started = time.monotonic()
        logits, losses = learn_masks(
            model,
            opened.tokens,
            step.shape.layers,
            training,
            hidden_size=config.hidden_size,
            depth=depth,
        )
        scores = (
            _scores(index, now, logits, own)
            for index, (now, own) in enumerate(zip(current.layers, given.statistics.scores, strict=True))
        )
        given = replace(given, statistics=replace(given.statistics, scores=tuple(scores)))
        if LAYERS in logits:
            stay = _highest(logits[LAYERS], depth).tolist()
            step = step_without(given, frozenset(range(len(current.layers))).difference(stay))
        else:
            step = step_to(
                given.statistics,
                step.shape.layers,
                current=current,
                importance=step.importance,
                sparsity=step.sparsity,
            )
        masks = final_masks(model, logits, step.layers, config.hidden_size)
        opened.figures.update(_outcome(logits, masks, step.layers, config.hidden_size))
        put_into_weights(model, masks)
        if settings.narrows:
            kept = _highest(logits[HIDDEN], config.hidden_size)
            opened.remake(config, narrowed_parts(LayerwiseModel(model), config, kept))
        else:
            opened.remake(config, model_parts(model))
        opened.figures.update(
            mask_s=time.monotonic() - started,
            mask_tokens=len(losses) * batch * opened.tokens.shape[1],
            mask_losses=losses,
        )
        return step

    return decide


def _at_full_depth(given: StepRequest, depth: int) -> int:
    """Return the parameters of a model of all layers, as large each as ``depth`` of them at the target."""
    current, target_params = given.current, given.target_params
    if depth == len(current.layers):
        return target_params
    shallow = current.with_layers(current.layers[:depth])
    smallest_params(sizing_for(given.settings, shallow, shallow), target_params)
    inside = (target_params - current.outside_params) * len(current.layers) / depth
    return min(current.num_params(), current.outside_params + round(inside))


def sampled(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw masks."""
    u = torch.rand(logits.shape, dtype=logits.dtype, generator=generator).to(logits.device)
    u = u.clamp(1e-6, 1 - 1e-6)
    return _stretched(torch.sigmoid((u.log() - (-u).log1p() + logits) / BETA))


def kept_share(logits: Tensor) -> Tensor:
    """Return the expected share of masks that are not 0."""
    return torch.sigmoid(logits - FLOOR).mean()


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
) -> tuple[Masks, list[float]]:
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

    Returns:
        The logits, and the loss of each step under the masks that were drawn for it, in nats a token.

    Raises:
        TrainingError: If a loss or the gradient norm is not finite.
    """
    generator = torch.Generator().manual_seed(training.seed)
    logits, targets, rows_of = _open_masks(model, shape, hidden_size, depth)
    # A multiplier of the gap and one of its square for each layer and kind.
    multipliers = torch.zeros(2, len(logits), dtype=model.dtype, device=model.device, requires_grad=True)
    weights = list(model.requires_grad_(True).train().parameters())
    learner = torch.optim.AdamW(
        [
            {"params": weights, "lr": training.rate},
            {"params": list(logits.values()), "lr": training.mask_rate},
        ],
        weight_decay=0.0,
    )
    opponent = torch.optim.AdamW([multipliers], lr=training.mask_rate, weight_decay=0.0, maximize=True)
    steps, a_step, losses = training.steps, training.batch * tokens.shape[1], list[float]()
    with Progress("masks", steps * a_step, "tokens") as progress:
        for step in range(steps):
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
            for optimizer in (learner, opponent):
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                multipliers.clamp_(min=0)
                for key, a in logits.items():
                    _hold_open(a.view(rows_of[key], -1), aims[key])
            losses.append(loss)
            progress.add(a_step, f"step {step + 1} of {steps}, loss {loss:.3f}")
    model.eval()
    return {key: a.detach() for key, a in logits.items()}, losses


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
        key: torch.full((count,), START, dtype=model.dtype, device=model.device, requires_grad=True)
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


def final_masks(
    model: "PreTrainedModel", logits: Masks, plans: Sequence[LayerPlan], hidden_size: int
) -> Masks:
    """Return the masks in the end: 0 for what goes, and without chance for what stays."""
    masks = {}
    for key, a in logits.items():
        kept = _kept(key, a, plans, hidden_size)
        if key[1] == "self_attn.o_proj":
            a = _of_heads(a, layer_shapes(model.config)[key[0]])
        masks[key] = mask = torch.zeros_like(a)
        mask[kept] = _stretched(torch.sigmoid(a))[kept]
    return masks


def _kept(key: tuple[int, str], a: Tensor, plans: Sequence[LayerPlan], hidden_size: int) -> list[int]:
    """Return which embedding channels, layers, query heads or MLP channels stay."""
    if key == HIDDEN:
        return _highest(a, hidden_size).tolist()
    if key == LAYERS:
        return [number for number, plan in enumerate(plans) if plan.stays]
    plan = plans[key[0]]
    return list(plan.query_heads if key[1] == "self_attn.o_proj" else plan.mlp_channels)


def _outcome(
    logits: Masks, masks: Masks, plans: Sequence[LayerPlan], hidden_size: int
) -> dict[str, float | int]:
    """Return the expected share of open masks of each kind, and how many groups stay with a mask of 0."""
    shares, closed = dict[str, list[float]](), 0
    for key, a in logits.items():
        shares.setdefault(key[1], []).append(kept_share(a).item())
        closed += int((masks[key][_kept(key, a, plans, hidden_size)] == 0).sum())
    means = {kind: sum(each) / len(each) for kind, each in shares.items()}
    text = ", ".join(f"{share:.3f} of {kind}" for kind, share in means.items())
    log.info("masks: expected to be open are %s; %d groups that stay have a mask of 0", text, closed)
    return {"mask_closed": closed} | {f"mask_share/{kind}": share for kind, share in means.items()}


def _highest(logits: Tensor, count: int) -> Tensor:
    """Return the places of the highest logits, ascending; the first of equals stay."""
    return logits.argsort(descending=True, stable=True)[:count].sort().values


def _of_heads(a: Tensor, layer: LayerShape) -> Tensor:
    """Return the logit of each query head from those of query heads or of KV heads."""
    return a.repeat_interleave(layer.query_heads // len(a))


def _scores(index: int, now: LayerShape, logits: Masks, own: LayerScores) -> LayerScores:
    """Return the logits of a layer's groups; ``own`` scores where they have no masks."""
    heads = _of_heads(logits.get((index, "self_attn.o_proj"), own.query_heads).cpu(), now)
    channels = logits.get((index, "mlp.down_proj"), own.mlp_channels).cpu()
    return LayerScores(
        query_heads=heads, kv_groups=heads.view(now.kv_heads, -1).amax(dim=1), mlp_channels=channels
    )
