"""Minitron (Muralidharan et al., arXiv 2407.14679): depth by the measured loss, and the hidden size.

Depth: every block of as many layers as go is left out of the model in turn; the one without which the loss on
calibration text is lowest goes. Channels take up the rest of the size, as under ShortGPT.

Hidden size: the channels of the signal between the layers are ranked by what the norms before attention and
MLPs give, and all matrices are cut along it. Heads and MLP channels take up the rest of the size, by the
scores that they have in the whole model. A norm's mean is over the channels that are left, as in the authors'
code: nothing makes up for those that went.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.errors import CheckpointError, TargetError
from core.model.build import build_empty, model_shape
from core.model.config import config_with_hidden_size
from core.model.decoder import final_states
from core.model.families import family_of
from core.model.layerwise import frozen, replaced
from core.model.loss import loss_sum
from core.model.shape import ModelShape
from core.progress import Progress
from core.pruning.methods.opened import OpenedModel
from core.pruning.methods.shortgpt import fewest_layers, least_params, step_without
from core.pruning.planning import DecideStep, Step, StepRequest, plan_step
from core.pruning.scoring.batching import fitting_micro_batch
from core.pruning.sensitivity import recorded
from core.pruning.widths.search import measured_tokens
from core.quantities import is_share, parse_count

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from core.model.layerwise import LayerwiseModel
    from core.settings.prune import PruneSettings

log = logging.getLogger(__name__)


def depth_decision(opened: OpenedModel) -> DecideStep:
    """Return what decides a step by the loss of an opened model without each of its blocks of layers."""

    def plan_step(given: StepRequest) -> Step:
        fewest = fewest_layers(given.settings, given.current, given.target_params)
        count = layers_to_go(given.current, least_params(given), fewest)
        gone = range(0)
        if count:
            losses = losses_without(
                opened.model, measured_tokens(opened.tokens), count, batch_size=opened.micro_batch
            )
            first = min(range(len(losses)), key=losses.__getitem__)
            gone = range(first, first + count)
            log.info("layers %d to %d go: a loss of %.3f without them", first, gone[-1], losses[first])
        return step_without(given, frozenset(gone))

    return plan_step


def layers_to_go(shape: ModelShape, least_params: float, fewest: int = 1) -> int:
    """Return how many layers next to each other may go, wherever they are.

    ``least_params`` stay, and at least the ``fewest`` layers.
    """
    sizes, count = [shape.layer_num_params(layer) for layer in shape.layers], 0
    while count + fewest < len(sizes):
        largest = max(sum(sizes[first : first + count + 1]) for first in range(len(sizes) - count))
        if shape.num_params() - largest < least_params:
            break
        count += 1
    return count


def losses_without(
    model: "LayerwiseModel", tokens: Tensor, count: int, *, batch_size: int
) -> Sequence[float]:
    """Return a model's next-token loss without ``count`` layers, by the number of the first of them.

    Args:
        model: Held in memory as a whole; left unchanged.
        tokens: (S, T) integer token ids.
        count: At least 1, and fewer than there are.
        batch_size: Sequences per forward pass; the states of all layers are held for one batch.
    """
    whole, layers = model.model, model.layers
    batches = tokens.to(whole.device, torch.long).split(batch_size)
    totals = [0.0] * (len(layers) - count + 1)
    progress = Progress("depth", len(batches) * len(totals), "measurements")
    with progress, frozen(whole), torch.no_grad():
        for batch in batches:
            outputs: list[Any] = []
            with recorded(layers, outputs):
                final_states(whole, batch)
            for first in range(len(totals)):
                totals[first] += _loss_without(whole, layers, first, count, outputs, batch)
                progress.add()
    predictions = tokens.shape[0] * (tokens.shape[1] - 1)
    losses = [total / predictions for total in totals]
    if not all(map(torch.isfinite, torch.tensor(losses))):
        raise CheckpointError(
            "the loss without some layers is not finite. Check the checkpoint; else set "
            "calibration.precision to float32."
        )
    return losses


def _loss_without(
    model: "PreTrainedModel",
    layers: Sequence[torch.nn.Module],
    first: int,
    count: int,
    outputs: Sequence[Any],
    batch: Tensor,
) -> float:
    """Return the summed loss without a block; the layers below it have run: ``outputs`` are theirs."""

    def skip(state: Tensor, **_: Any) -> Any:
        return outputs[first - 1] if first else state

    with replaced(layers[: first + count], [skip] * (first + count)):
        return loss_sum(model, final_states(model, batch), batch)


def width_decision(opened: OpenedModel) -> DecideStep:
    """Return the decision to cut an opened model to fewer embedding channels, and then its groups."""

    def decide(given: StepRequest) -> Step:
        config = narrowed_config(opened.model.model.config, given.settings, given.target_params)
        scores = channel_scores(opened.model, opened.tokens, micro_batch=opened.micro_batch)
        best = scores.argsort(descending=True, stable=True)[: config.hidden_size]
        opened.remake(config, narrowed_parts(opened.model, config, best.sort().values))
        narrow = model_shape(config)
        return plan_step(replace(given, dense=narrow, current=narrow))

    return decide


def narrowed_config(
    config: "PreTrainedConfig", settings: "PruneSettings", target_params: int
) -> "PreTrainedConfig":
    """Return the config of a model with the embedding channels that ``settings.hidden_size`` asks for.

    Their number is a multiple of the query heads: some families' own configs allow no other.

    Raises:
        TargetError: If that is all of them, or the model has fewer parameters than the target.
        UnsupportedModelError: If the family's layers are more than norms, blocks and plain sums.
    """
    asked, whole = settings.hidden_size, config.hidden_size
    multiple = math.lcm(8, config.to_dict()["num_attention_heads"])
    count = whole * float(asked.strip(" %")) / 100 if is_share(asked) else parse_count(asked)
    size = multiple * max(1, round(count / multiple))
    if size >= whole:
        raise TargetError(
            f"prune.hidden_size={asked} leaves all {whole} embedding channels: their number is a multiple of "
            f"{multiple}. Lower it by that, or leave it out."
        )
    narrow = config_with_hidden_size(config, size)
    shape = model_shape(narrow)
    if shape.num_params() + settings.width_multiple * shape.mlp_channel_params / 2 < target_params:
        raise TargetError(
            f"prune.hidden_size={asked} alone leaves {shape.num_params():,} parameters ({size} embedding "
            f"channels), fewer than the target of {target_params:,}. Raise it, or lower prune.target."
        )
    return narrow


@torch.no_grad()
def channel_scores(model: "LayerwiseModel", tokens: Tensor, *, micro_batch: int = 0) -> Tensor:
    """Return the (D,) float64 importance of each embedding channel.

    It is the sum, over the norms before attention and MLPs, of the l2 norm over sequences of the mean over
    tokens of the absolute value that the norm gives.

    Args:
        model: Stays as it is.
        tokens: (S, T) token ids of the calibration set.
        micro_batch: Sequences that pass through a layer at once; 0 for as many as the free memory suggests.

    Raises:
        CheckpointError: If a norm's output is not finite.
    """
    whole = model.model
    size = micro_batch or fitting_micro_batch(whole.config, tokens.shape, device=whole.device)
    states = [model.embed(tokens[i : i + size]).cpu() for i in range(0, len(tokens), size)]
    scores = torch.zeros(states[0].shape[-1], dtype=torch.float64)
    with Progress("hidden size", len(model.layers), "layers") as progress, frozen(whole):
        for index in range(len(model.layers)):
            with model.resident(index) as layer:
                outputs: list[list[Tensor]] = [[], []]
                hooks = [
                    layer.get_submodule(norm).register_forward_hook(
                        lambda _, __, output, means=means: means.append(output.double().abs().mean(dim=1))
                    )
                    for norm, means in zip(
                        ("input_layernorm", "post_attention_layernorm"), outputs, strict=True
                    )
                ]
                states = [model.run(index, state.to(whole.device)).cpu() for state in states]
                for hook in hooks:
                    hook.remove()
            scores += sum(torch.cat(means).norm(dim=0).cpu() for means in outputs)
            progress.add()
    if not bool(scores.isfinite().all()):
        raise CheckpointError(
            "what a norm gives is not finite. Check the checkpoint; else set calibration.precision to "
            "float32."
        )
    return scores


def narrowed_parts(
    model: "LayerwiseModel", config: "PreTrainedConfig", kept: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Yield what ``kept`` embedding channels leave of a model's tensors by name, a layer's at a time.

    ``config`` is that of the model that is left, whose tensors are smaller along these channels alone.
    """
    after = {name: tensor.shape for name, tensor in build_empty(config).state_dict().items()}

    def cut(name: str, tensor: Tensor) -> Tensor:
        for axis, length in enumerate(after[name]):
            if tensor.shape[axis] != length:
                tensor = tensor.index_select(axis, kept.to(tensor.device))
        return tensor

    prefix, whole = family_of(config).layers, model.model
    for index in range(len(model.layers)):
        with model.resident(index) as layer:
            named = layer.named_parameters(f"{prefix}.{index}")
            yield {name: cut(name, parameter.detach()) for name, parameter in named}
    yield {
        name: cut(name, parameter.detach())
        for name, parameter in whole.named_parameters()
        if not name.startswith(f"{prefix}.")
    }
