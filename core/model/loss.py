"""The losses of a causal language model and their gradients, a chunk of positions at a time.

The next-token loss, and the divergence from a teacher: sum p (log p - log q) of p, what the teacher expects,
and q, what the model does. Where the teacher's likeliest tokens are stored, all others count as one.

Logits are the largest array of a small model: V numbers per position. Only those of one chunk exist at a
time, and only for positions whose next token counts. The model's own code computes them from the final hidden
states, because some families scale or cap them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from core.machine.memory import sent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
"""Logits that exist at a time: 64 MiB in float32, 340 positions at V = 49,152. A GPU needs more."""
_PART_ROWS = 2**13  # of a weight's gradient


def loss_sum(
    model: "PreTrainedModel", states: Tensor, ids: Tensor, *, trained: Tensor | None = None
) -> float:
    """Return the next-token loss, summed over all predictions, in nats.

    Args:
        model: Its output head is used, in the number format of ``states`` or of the caller's autocast.
        states: (B, T, D) hidden states from ``final_states``.
        ids: (B, T) int64 token ids; the first of a sequence is not predicted, the last predicts nothing.
        trained: (B, T), nonzero where a token is a target; None for all.

    Returns:
        The sum over B * (T - 1) predictions, or those of targets; each is float32 (float64 for float64
        states), the sum float64.
    """
    rows, targets = states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    if trained is not None:
        counts = sent((trained[:, 1:] != 0).flatten().nonzero().squeeze(1), rows.device)
        rows, targets = rows[counts], targets[counts]
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    with torch.no_grad():
        for part, of_part in _chunks(model, rows, targets):
            losses = F.cross_entropy(_wide(head_logits(model, part)), of_part, reduction="none")
            total += losses.double().sum()
    return total.item()


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a teacher expects at the positions of a batch, and how much that counts beside the next token.

    The loss becomes (1 - weight) * next-token loss + weight * t^2 * divergence, where both models' logits are
    divided by the temperature t for the divergence. t^2 keeps its gradient's size (Hinton et al., 2015).

    Attributes:
        teacher: A model of the same vocabulary on the same device; its output head is used.
        aims: (B, T, D of the teacher) its hidden states, without a graph.
        weight: In (0, 1]; at 1 the next token does not count.
        temperature: t, positive.
    """

    teacher: "PreTrainedModel"
    aims: Tensor
    weight: float
    temperature: float

    def columns(self, counts: tuple[Tensor, ...]) -> list[Tensor]:
        """Return what the divergence at the positions ``counts`` of (B, T - 1) is found from."""
        return [self.aims[:, :-1][counts]]

    def divergence(self, logits: Tensor, aims: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed divergence of (N, V) logits and its gradient; ``aims`` are (N, D)."""
        return _divergence(logits, _wanted(self.teacher, aims), self.temperature)


@dataclass(frozen=True, kw_only=True)
class StoredLesson:
    """What a teacher was found to expect: a ``Lesson`` that needs no teacher.

    Attributes:
        ids: (N, K) token ids at the N positions whose next token counts, in their order.
        logs: (N, K + 1) logarithms of their probabilities at ``temperature``; the last one is of all other
            tokens together.
        weight: See ``Lesson``.
        temperature: See ``Lesson``.
    """

    ids: Tensor
    logs: Tensor
    weight: float
    temperature: float

    def columns(self, _: tuple[Tensor, ...]) -> list[Tensor]:
        """See ``Lesson``."""
        return [self.ids, self.logs]

    def divergence(self, logits: Tensor, ids: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Lesson``."""
        return _divergence_of_likeliest(logits, ids.long(), logs, self.temperature)


def loss_gradient(
    model: "PreTrainedModel",
    states: Tensor,
    ids: Tensor,
    *,
    scale: float,
    trained: Tensor | None = None,
    lesson: Lesson | StoredLesson | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the summed next-token loss and the gradient of ``scale`` times it with respect to ``states``.

    Parameters of the head that require a gradient get theirs added to ``grad``; a frozen head costs nothing.

    Args:
        model: As for ``loss_sum``.
        states: (B, T, D) hidden states from ``final_states``; their graph is left to the caller.
        ids: (B, T) int64 token ids.
        scale: Factor on the gradient, such as 1 / predictions.
        trained: (B, T), nonzero where a token is a target; None for all. Other positions cost nothing. If it
            is in host memory, the host waits for no accelerator.
        lesson: What a teacher adds to the loss of the same positions; None for the next-token loss alone.

    Returns:
        The sum, unscaled: float64, on the device. And the (B, T, D) gradient in the format of ``states``.
    """
    rows, targets = states.detach()[:, :-1], ids[:, 1:]
    counts = counted_positions(torch.ones(ids.shape) if trained is None else trained, rows.device)
    columns = [rows[counts], targets[counts]]
    if lesson is not None:
        columns += lesson.columns(counts)
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    gradients = []
    for part, of_part, *of_lesson in _chunks(model, *columns):
        if lesson is None:
            loss, gradient = chunk_gradient(model, part, of_part, scale=scale)
        else:
            loss, gradient = chunk_lesson(model, part, of_part, lesson, *of_lesson, scale=scale)
        gradients.append(gradient)
        total += loss
    gradient = torch.zeros_like(states, requires_grad=False)
    gradient[:, :-1][counts] = torch.cat(gradients)
    return total, gradient


def counted_positions(trained: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Return where the next token counts, as indices of (B, T - 1) on a device; arguments as above."""
    return tuple(sent(places, device) for places in (trained[:, 1:] != 0).nonzero(as_tuple=True))


def chunk_gradient(
    model: "PreTrainedModel", rows: Tensor, targets: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of (N, D) states with (N,) targets, and ``scale`` times its (N, D) gradient."""
    return _gradient(model, rows, lambda logits: _cross_entropy(logits, targets), scale)


def chunk_lesson(
    model: "PreTrainedModel",
    rows: Tensor,
    targets: Tensor,
    lesson: Lesson | StoredLesson,
    *columns: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return what ``chunk_gradient`` does, with a lesson; ``columns`` are its own of the N positions."""

    def mixed(logits: Tensor) -> tuple[Tensor, Tensor]:
        divergence, gradient = lesson.divergence(logits, *columns)
        if lesson.weight == 1:
            return divergence, gradient
        loss, of_loss = _cross_entropy(logits, targets)
        return loss.lerp(divergence, lesson.weight), of_loss.lerp_(gradient, lesson.weight)

    return _gradient(model, rows, mixed, scale)


def divergence_sum(
    model: "PreTrainedModel", states: Tensor, teacher: "PreTrainedModel", aims: Tensor
) -> float:
    """Return the divergence from a teacher, summed over all positions, in nats; arguments as below."""
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    with torch.no_grad():
        for part, aim in _chunks(model, states.flatten(0, -2), aims.flatten(0, -2)):
            total += _divergence(head_logits(model, part), head_logits(teacher, aim))[0]
    return total.item()


def divergence_gradient(
    model: "PreTrainedModel", states: Tensor, teacher: "PreTrainedModel", aims: Tensor, *, scale: float
) -> tuple[float, Tensor]:
    """Return the summed divergence and the gradient of ``scale`` times it with respect to ``states``.

    Parameters of the model's head that require a gradient get theirs added to ``grad``; the teacher's do not.

    Args:
        model: Its output head is used, in the number format of ``states`` or of the caller's autocast.
        states: (..., D) hidden states from ``final_states``; their graph is left to the caller.
        teacher: A model of the same vocabulary, used likewise.
        aims: (..., D of the teacher) its hidden states at the same positions.
        scale: Factor on the gradient, such as 1 / positions.

    Returns:
        The sum, unscaled, and the (..., D) gradient in the format of ``states``.
    """
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    gradients = []
    for part, aim in _chunks(model, states.detach().flatten(0, -2), aims.flatten(0, -2)):
        divergence, gradient = chunk_divergence(model, part, teacher, aim, scale=scale)
        gradients.append(gradient)
        total += divergence
    return total.item(), torch.cat(gradients).view_as(states)


def chunk_divergence(
    model: "PreTrainedModel", rows: Tensor, teacher: "PreTrainedModel", aims: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the summed divergence of (N, D) states, and ``scale`` times its (N, D) gradient."""
    return _gradient(model, rows, lambda logits: _divergence(logits, _wanted(teacher, aims)), scale)


def _gradient(
    model: "PreTrainedModel", rows: Tensor, loss_of: Callable[[Tensor], tuple[Tensor, Tensor]], scale: float
) -> tuple[Tensor, Tensor]:
    """Go back through the head with what ``loss_of`` returns for the logits: a sum and its gradient.

    It may overwrite the logits: no head's last operation needs them again (autograd would refuse).
    """
    rows, head = rows.detach().requires_grad_(), model.get_output_embeddings()
    with contextlib.ExitStack() as stack, torch.enable_grad():
        if head.weight.requires_grad:
            stack.callback(head.register_forward_hook(_collect).remove)
        logits = head_logits(model, rows)
    loss, gradient = loss_of(logits.detach())
    with torch.autocast(logits.device.type, enabled=False):
        # Of the rows alone: autograd's gradient of the weight would be an array of its own each time.
        (of_rows,) = torch.autograd.grad(logits, rows, gradient.mul_(scale).to(logits.dtype))
    return loss, of_rows


def _collect(head: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Have the gradient of a head's weight added to ``grad``, once the one of its output is known."""
    states, weight = inputs[0].detach().flatten(0, -2), head.weight

    def add(gradient: Tensor) -> None:
        gradient = gradient.flatten(0, -2)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        if weight.dtype == gradient.dtype:
            weight.grad.addmm_(gradient.T, states)
        else:  # autocast: each part is made in the gradient's format first
            parts = weight.grad.split(_PART_ROWS), gradient.split(_PART_ROWS, dim=1)
            for total, part in zip(*parts, strict=True):
                total += part.T @ states.to(part.dtype)

    output.register_hook(add)


def chunk_positions(vocabulary: int, device: str) -> int:
    """Return how many positions' logits exist at once."""
    return max(1, _CHUNK_LOGITS.get(device, 2**24) // vocabulary)


def _chunks(model: "PreTrainedModel", rows: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield (N, D) states and what belongs to each, such as (N,) targets; an empty chunk for none."""
    size = chunk_positions(int(model.config.vocab_size), rows.device.type)
    yield from zip(*(column.split(size) for column in (rows, *columns)), strict=True)


def head_logits(model: "PreTrainedModel", states: Tensor) -> Tensor:
    """Let the model compute (N, V) logits from (N, D) hidden states, by its own code."""
    decoder = model.get_decoder()
    output = BaseModelOutputWithPast(last_hidden_state=states[None])
    decoder.forward = lambda *_, **__: output
    try:
        logits = model(input_ids=None, use_cache=False).logits
    finally:
        del decoder.forward
    assert isinstance(logits, Tensor)
    return logits.squeeze(0)  # an index would copy the gradient on its way back


@torch.no_grad()
def _wanted(teacher: "PreTrainedModel", aims: Tensor) -> Tensor:
    return head_logits(teacher, aims)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of (N, V) logits and its gradient: softmax minus one-hot.

    Computed by hand in the place of the logits, if those are float32 or wider: autograd takes four arrays.
    """
    wide = _wide(logits)
    wide.sub_(wide.amax(dim=-1, keepdim=True))
    likely = wide.gather(1, targets[:, None])
    total = wide.exp_().sum(dim=-1, keepdim=True)
    loss = (total.log() - likely).double().sum()
    gradient = wide.div_(total)
    gradient.scatter_add_(1, targets[:, None], gradient.new_full((), -1.0).expand(len(targets), 1))
    return loss, gradient


def _divergence(logits: Tensor, wanted: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the summed divergence of (N, V) logits from the teacher's, and its gradient.

    At a temperature t: t^2 * divergence of the logits / t, whose gradient is t * (q - p).
    """
    if temperature != 1:
        wanted, logits = _wide(wanted) / temperature, _wide(logits) / temperature
    expected = _wide(wanted).log_softmax(dim=-1)
    del wanted  # nobody else has it
    found = _wide(logits).log_softmax(dim=-1)
    p = expected.exp()
    # Of the difference, as equal logits are to give exactly 0.
    divergence = torch.linalg.vecdot(p, expected.sub_(found)).double().sum()
    return temperature**2 * divergence, found.exp_().sub_(p).mul_(temperature)


def _divergence_of_likeliest(
    logits: Tensor, ids: Tensor, logs: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the summed divergence over K tokens and the others as one, and its gradient.

    The others' share keeps both distributions whole. Without it, the K shares scaled up to 1, a model would
    be taught that nothing else ever comes. It is at most the full divergence, and equal to it at K = V. Its
    gradient by a logit / t: q - p for the K tokens, q - p_rest * q / q_rest for the others.
    """
    wide = _wide(logits) / temperature
    logs = _wide(logs).log_softmax(dim=-1)  # what is stored is rounded
    rest = wide.scatter(1, ids, -torch.inf)
    of_rest, normaliser = (each.logsumexp(dim=-1, keepdim=True) for each in (rest, wide))
    expected = logs.exp()
    found = torch.cat([wide.gather(1, ids), of_rest], dim=1).sub_(normaliser)
    # What is never expected adds nothing, whatever is found: 0 * (-inf - -inf) at K = V.
    nothing = expected == 0
    divergence = (expected * (logs - found)).masked_fill_(nothing, 0).double().sum()
    gradient = wide.sub_(normaliser).exp_()
    shift = (logs[:, -1:] - of_rest).masked_fill_(nothing[:, -1:], -torch.inf)
    gradient.sub_(rest.add_(shift).exp_())
    gradient.scatter_add_(1, ids, -expected[:, :-1])
    return temperature**2 * divergence, gradient.mul_(temperature)


@torch.no_grad()
def likeliest(logits: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return what (N, V) logits say of the next token, by its likeliest values.

    Args:
        logits: Of any number format.
        count: K, at most V.
        temperature: What they are divided by.

    Returns:
        (N, K) token ids and (N, K + 1) logarithms, as ``StoredLesson`` has them; and (N,) what that leaves
        out: the divergence, in nats, of the others all being as likely as each other.
    """
    logs = (_wide(logits) / temperature).log_softmax(dim=-1)
    values, ids = logs.topk(count)
    shares = logs.exp()
    entropy = -torch.linalg.vecdot(shares, logs)
    others = shares.scatter_(1, ids, 0).sum(dim=-1, keepdim=True)
    kept = torch.cat([values, others.log()], dim=1)
    even = kept.clone()
    even[:, -1] -= math.log(max(logits.shape[1] - count, 1))
    left_out = -entropy - (kept.exp() * even).nan_to_num_(0).sum(dim=-1)
    return ids, kept, left_out
