"""Layer similarities and exact group scores with the gradients of one layer in memory (eq. 3-5, 7-10).

One forward pass keeps each layer's inputs in host memory and yields the similarities. The gradient by the
last hidden state starts a backward pass, layer by layer: recompute the layer, back-propagate through it,
reduce its weight gradients to one number a group, free them, go down. The result is plain autograd's, to
rounding.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from core.errors import DataError
from core.model.build import layer_shapes
from core.model.families import family_of
from core.pruning.importance import LayerScores, Statistics, group_scores

log = logging.getLogger(__name__)

_HEAD_TOKENS = 1024
"""Tokens whose logits are held at once: (1024, V) float32 is 0.5 GB at V = 128,256."""


def draw_calibration(pool: Tensor, *, sequences: int, seed: int, step: int) -> Tensor:
    """Draw the calibration set of one pruning step: fresh each step, no document twice.

    Args:
        pool: (P, T) token ids, one row a document.
        sequences: S, rows to draw.
        seed: Seed of the run.
        step: Number of the pruning step within the run.

    Returns:
        (S, T) token ids.

    Raises:
        DataError: If the pool holds fewer documents.
    """
    if len(pool) < sequences:
        raise DataError(
            f"calibration.sequences={sequences} is more than the {len(pool)} documents of at least "
            f"{pool.shape[1]} tokens in calibration.source. Lower it, or name a larger corpus."
        )
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return pool[torch.randperm(len(pool), generator=generator)[:sequences]].long()


def layer_similarity(
    inputs: Tensor, outputs: Tensor, kind: Literal["cosine", "euclidean", "manhattan"] = "cosine"
) -> Tensor:
    """Compare a layer's input and output at each token; larger is more alike (eq. 3).

    Args:
        inputs: (B, T, D) hidden states that enter the layer.
        outputs: (B, T, D) hidden states that leave it.
        kind: ``cosine``, or minus the l2 or l1 distance.

    Returns:
        (B, T) float32.
    """
    x, y = inputs.float(), outputs.float()
    if kind == "cosine":
        return torch.nn.functional.cosine_similarity(x, y, dim=-1, eps=1e-12)
    return -torch.linalg.vector_norm(y - x, ord=2 if kind == "euclidean" else 1, dim=-1)


def measure(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    micro_batch: int,
    similarity: Literal["cosine", "euclidean", "manhattan"] = "cosine",
) -> Statistics:
    """Measure layer similarities and group scores of a model on a calibration set.

    Args:
        model: Any number format; products and sums are float32. Left as it was found.
        tokens: (S, T) int64 token ids.
        micro_batch: Sequences that pass through a layer at once. The loss is the sum over micro-batches of
            each one's mean over its tokens, as the paper's.
        similarity: How a layer's input and output are compared.
    """
    family = family_of(model.config)
    layers = list(model.get_submodule(family.layers).children())
    shapes = layer_shapes(model.config)
    batches = tokens.split(micro_batch)
    started = time.monotonic()
    with _frozen(model):
        # States of all micro-batches, in host memory: inputs[i] enters layer i, the last one leaves the
        # last layer.
        inputs: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
        keywords: list[list[dict[str, Any]]] = []
        similarities = torch.zeros(len(layers), dtype=torch.float64)
        for batch in batches:
            state, calls = _embed(model, layers, batch)
            keywords.append(calls)
            inputs[0].append(state.cpu())
            for index, layer in enumerate(layers):
                with torch.no_grad():
                    after = _run(layer, state, calls[index])
                similarities[index] += (
                    layer_similarity(state, after, similarity).sum(dtype=torch.float64).cpu()
                )
                inputs[index + 1].append(after.cpu())
                state = after
        similarities /= tokens.numel()
        log.info("forward over %d tokens took %.1f s", tokens.numel(), time.monotonic() - started)

        losses, gradients = [], []
        for batch, state in zip(batches, inputs.pop(), strict=True):
            loss, gradient = _head_gradient(model, layers, batch, state.to(model.device))
            losses.append(loss)
            gradients.append(gradient.cpu())

        scores: list[LayerScores] = []
        for index in reversed(range(len(layers))):
            weights, sums = _layer_gradients(
                layers[index],
                family.slicings,
                inputs.pop(),
                gradients,
                [calls[index] for calls in keywords],
                pass_on=index > 0,
            )
            scores.append(group_scores(family, shapes[index], weights, sums))
            log.debug("layer %d of %d scored", index + 1, len(layers))
    log.info("scores of %d layers took %.1f s in all", len(layers), time.monotonic() - started)
    return Statistics(
        similarities=similarities,
        scores=tuple(
            LayerScores(
                query_heads=s.query_heads.cpu(), kv_heads=s.kv_heads.cpu(), mlp_channels=s.mlp_channels.cpu()
            )
            for s in reversed(scores)
        ),
        loss=sum(losses) / len(losses),
        tokens=tokens.numel(),
    )


@contextlib.contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Switch off all weight gradients and dropout for a while."""
    required = [p.requires_grad for p in model.parameters()]
    training = model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter, flag in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(flag)
        model.train(training)


@contextlib.contextmanager
def _replaced(layers: Sequence[torch.nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Give each layer another forward for a while."""
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _embed(
    model: PreTrainedModel, layers: Sequence[torch.nn.Module], batch: Tensor
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Run the model with layers that only record how they are called.

    What a family hands to its layers (masks, rotary tables, per-layer windows) is so taken from its own code.

    Returns:
        (B, T, D) input of the first layer, and the keyword arguments of each layer.
    """
    states: list[Tensor] = []
    keywords: list[dict[str, Any]] = []

    def record(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        states.append(hidden_states)
        keywords.append(kwargs)
        return hidden_states

    with torch.no_grad(), _replaced(layers, [record] * len(layers)):
        model.get_decoder()(input_ids=batch.to(model.device), use_cache=False)
    return states[0], keywords


def _run(layer: torch.nn.Module, state: Tensor, keywords: dict[str, Any]) -> Tensor:
    output = layer(state, **keywords)
    return output[0] if isinstance(output, tuple) else output


def _head_gradient(
    model: PreTrainedModel, layers: Sequence[torch.nn.Module], batch: Tensor, state: Tensor
) -> tuple[float, Tensor]:
    """Return a micro-batch's loss and its gradient by the last layer's output.

    Args:
        model: Everything after the layers is run by the model's own code: final norm, output head, soft caps.
        layers: The decoder layers.
        batch: (B, T) token ids.
        state: (B, T, D) output of the last layer.

    Returns:
        Mean loss in nats a token, and the (B, T, D) gradient.
    """
    predictions = batch.shape[0] * (batch.shape[1] - 1)
    rows = max(1, _HEAD_TOKENS // batch.shape[1])
    total, gradients = 0.0, []
    for ids, part in zip(batch.split(rows), state.split(rows), strict=True):
        part = part.detach().requires_grad_()
        forwards: list[Callable[..., Any]] = [lambda hidden_states, **_: hidden_states] * (len(layers) - 1)
        with torch.enable_grad(), _replaced(layers, [*forwards, lambda *_, part=part, **__: part]):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
                ids[:, 1:].flatten().to(model.device),
                reduction="sum",
            )
            gradients.append(torch.autograd.grad(loss / predictions, part)[0])
        total += loss.item()
    return total / predictions, torch.cat(gradients)


def _layer_gradients(
    layer: torch.nn.Module,
    wanted: Any,
    inputs: Sequence[Tensor],
    gradients: list[Tensor],
    keywords: Sequence[dict[str, Any]],
    *,
    pass_on: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Back-propagate all micro-batches through one layer.

    Args:
        layer: The decoder layer.
        wanted: Names of the weights whose gradients are wanted.
        inputs: (B, T, D) inputs of the layer, one a micro-batch.
        gradients: (B, T, D) gradients by its outputs; replaced by those by its inputs.
        keywords: Keyword arguments of each call.
        pass_on: Whether a layer below needs the gradients.

    Returns:
        The weights, and their gradients summed over all micro-batches in float32.
    """
    weights = {name: p for name, p in layer.named_parameters() if name in wanted}
    device = next(iter(weights.values())).device
    sums: dict[str, Tensor] = {}
    for parameter in weights.values():
        parameter.requires_grad_(True)
    for number, (state, call) in enumerate(zip(inputs, keywords, strict=True)):
        state = state.to(device).requires_grad_(pass_on)
        with torch.enable_grad():
            output = _run(layer, state, call)
        sources = [*weights.values(), *([state] if pass_on else [])]
        found = torch.autograd.grad(output, sources, gradients[number].to(device))
        for name, gradient in zip(weights, found, strict=False):
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            sums[name] = sums[name].add_(wide) if name in sums else wide
        gradients[number] = found[-1].cpu() if pass_on else torch.empty(0)
    for parameter in weights.values():
        parameter.requires_grad_(False)
    return {name: p.detach() for name, p in weights.items()}, sums
