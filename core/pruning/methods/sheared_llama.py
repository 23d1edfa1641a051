"""Sheared-LLaMA (Xia et al., arXiv 2310.06694): masks of groups are learnt beside the weights, to a shape.

Every attention unit (a KV head with its query heads, or a query head), and every MLP channel, has a mask;
``core.pruning.methods.mask_learning`` says how it is learnt. In the end the highest logits of each layer
stay, exactly as many as the shape has, and what is left of their masks goes into the weights.

Where embedding channels are to go (``prune.hidden_size``), each has a mask, too, the same in all layers: it
multiplies the signal before each norm, whose mean is over the channels that are not 0.

Where layers are to go (``prune.layers``), each has a mask of what its attention and its MLP add to the
signal.

Left out: batches that are shared out among domains by their loss, as there is one calibration corpus, and
rows of the training mixture hold several sources. Our choice: the logits start at ``START``, and the shape is
uniform.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.model.build import model_shape
from core.model.checkpoint import model_parts
from core.model.config import layer_shapes
from core.model.layerwise import LayerwiseModel
from core.model.shape import LayerShape
from core.pruning.methods.mask_learning import MaskTraining, certain, kept_share, learn_masks
from core.pruning.methods.masks import HIDDEN, LAYERS, Masks, put_into_weights
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
        with opened.kept as kept:
            learnt = learn_masks(
                model,
                opened.tokens,
                step.shape.layers,
                training,
                hidden_size=config.hidden_size,
                depth=depth,
                kept=kept,
            )
        logits = learnt.logits
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
            channels = _highest(logits[HIDDEN], config.hidden_size)
            opened.remake(config, narrowed_parts(LayerwiseModel(model), config, channels))
        else:
            opened.remake(config, model_parts(model))
        opened.figures.update(
            mask_s=learnt.seconds,
            mask_tokens=len(learnt.losses) * batch * opened.tokens.shape[1],
            mask_losses=learnt.losses,
            seconds=learnt.earlier_s,
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
        mask[kept] = certain(a)[kept]
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
