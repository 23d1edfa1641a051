"""The criteria that score groups: eq. 7-10 and alternatives, each a few lines on shared sums.

A weight is cut along its groups into *blocks* of (U, R, ...): U units (query heads, KV heads or channels) of
R rows each, and likewise the activations along the groups. A criterion accumulates a sum for each block over
the micro-batches, and finally turns it into one number per unit. The numbers of a group's blocks are added.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from core.model.families import Family, Kind
from core.model.shape import LayerShape
from core.pruning.scoring.statistics import LayerScores
from core.settings.prune import CriterionName

Observed = Literal["nothing", "inputs", "output_gradients", "weight_gradients"]


def _nothing(*_: Tensor) -> Tensor:
    return torch.empty(0)


def _same(total: Tensor) -> Tensor:
    return total


def _per_unit(terms: Tensor) -> Tensor:
    """Sum (U, R, ...) over all but the units."""
    return terms.flatten(1).sum(dim=1)


def _moments(v: Tensor) -> Tensor:
    wide = v.double()
    return torch.stack([wide.sum(dim=(0, 1)), wide.square().sum(dim=(0, 1))])


def _variance(moments: Tensor, tokens: int) -> Tensor:
    return (moments[1] / tokens - (moments[0] / tokens).square()).clamp_min(0)


def _fluctuation(w: Tensor, s: Tensor, n: int) -> Tensor:
    """Return the variance of each row's input times the squared norm of the weights that read it."""
    return _variance(s, n) * w.square().sum(dim=2)


def _standardised(w: Tensor, s: Tensor, n: int) -> Tensor:
    rows = _fluctuation(w, s, n)
    if rows.shape[1] > 1:  # a head: its published code squares once more
        rows = rows.square()
    spread = rows.std().clamp_min(torch.finfo(rows.dtype).tiny)
    return ((rows - rows.mean()) / spread).mean(dim=1)


_DAMPING = 0.01
"""Ridge of an inverse, as a share of the mean diagonal."""


def _gram(v: Tensor) -> Tensor:
    x = v.flatten(2).flatten(0, 1)
    return x.T @ x


def _damped_inverse(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return (C + lambda I)^-1 and lambda, in float64; not finite if C is not."""
    damped = gram.to(torch.float64, copy=True)
    ridge = _DAMPING * damped.diagonal().mean() + torch.finfo(damped.dtype).tiny
    damped.diagonal().add_(ridge)
    factor, _ = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_inverse(factor), ridge


def squares_bytes(rows: Sequence[int]) -> int:
    """Return what sums of products take: one for each number of rows in float32, and the inverse of one."""
    return sum(4 * width**2 for width in rows) + 24 * max(rows) ** 2


def _leverage(w: Tensor, s: Tensor, n: int) -> Tensor:
    inverse, ridge = _damped_inverse(s)
    return (1 - ridge * inverse.diagonal()).view(w.shape[:2]).sum(dim=1)


def _optimal_brain_surgeon(w: Tensor, s: Tensor, n: int) -> Tensor:
    inverse, _ = _damped_inverse(s)
    units, rows = w.shape[:2]
    of_units = inverse.view(units, rows, units, rows).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    weights = w.double()
    return _per_unit(weights * torch.linalg.solve(of_units, weights)) / n


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One way to score groups.

    Attributes:
        observed: What it observes in each micro-batch. ``inputs``: the activations that enter the projections
            that read groups (o_proj, down_proj). ``output_gradients``: the activations along the groups of
            every sliced weight and their gradients. ``weight_gradients``: every sliced weight and bias
            and its gradient.
        add: A micro-batch's share of a block's sum, from the observations: activations are (B, T, U, R),
            weights (U, R, ...).
        score: (U,) from the weight w (U, R, ...), the block's sum s and the number n of tokens seen.
        finish: A group's score from the total over its blocks.
        squares: Whether a block's sum is a square matrix of its rows.
        of_loss: Whether scores estimate how much the loss changes, so that attention and MLP compare.
    """

    observed: Observed
    add: Callable[..., Tensor] = _nothing
    score: Callable[[Tensor, Tensor, int], Tensor]
    finish: Callable[[Tensor], Tensor] = _same
    squares: bool = False
    of_loss: bool = False


CRITERIA: Mapping[CriterionName, Criterion] = {
    # sum |W * G|, with absolute values taken after the gradients of all micro-batches are summed (eq. 10).
    "taylor_l1": Criterion(
        observed="weight_gradients",
        add=lambda w, g: g,
        score=lambda w, s, n: _per_unit((w * s).abs_()),
        of_loss=True,
    ),
    # |sum W * G|: for a linear map the sum over W * G is that of value * dL/dvalue over tokens.
    "taylor_signed": Criterion(
        observed="output_gradients",
        add=lambda v, g: (v * g).sum(dim=(0, 1, 3)),
        score=lambda w, s, n: s,
        finish=torch.abs,
        of_loss=True,
    ),
    # sum |W * G| of each micro-batch: an approximation of taylor_l1.
    "taylor_per_microbatch": Criterion(
        observed="weight_gradients",
        add=lambda w, g: _per_unit((w * g).abs_()),
        score=lambda w, s, n: s,
        of_loss=True,
    ),
    "magnitude_l1": Criterion(observed="nothing", score=lambda w, s, n: _per_unit(w.abs())),
    "magnitude_l2": Criterion(
        observed="nothing", score=lambda w, s, n: _per_unit(w.square()), finish=torch.sqrt
    ),
    # Wanda (arXiv 2306.11695), structured: |W_ij| * ||x_j|| over a group; the norm is a root mean square.
    "wanda_sp": Criterion(
        observed="inputs",
        add=lambda v: v.double().square().sum(dim=(0, 1)),
        score=lambda w, s, n: _per_unit((s / n).sqrt() * w.abs().sum(dim=2)),
    ),
    # FLAP (arXiv 2312.11983): the variance of x_j times the squared norm of the weights that read it.
    "fluctuation": Criterion(
        observed="inputs",
        add=_moments,
        score=lambda w, s, n: _per_unit(_fluctuation(w, s, n)),
    ),
    # The same, standardised over the rows of a layer's kind: FLAP compares layers by it. A mean over a unit.
    "standardised_fluctuation": Criterion(observed="inputs", add=_moments, score=_standardised),
    # Minitron (arXiv 2407.14679): l2 over sequences of the mean over tokens of a unit's output norm.
    "activation_l2": Criterion(
        observed="inputs",
        add=lambda v: torch.linalg.vector_norm(v, dim=3).mean(dim=1).square().sum(dim=0),
        score=lambda w, s, n: s,
        finish=torch.sqrt,
    ),
    # MoDeGPT (arXiv 2408.09632): [C (C + lambda I)^-1]_jj with C = sum x x^T, how little others predict x_j.
    "leverage": Criterion(observed="inputs", add=_gram, score=_leverage, squares=True),
    # Optimal brain surgeon, structured: the least rise of |W x|^2 a token when a unit goes and all the other
    # weights adapt, trace(W_u ([(C/n + lambda I)^-1]_uu)^-1 W_u^T).
    "obs": Criterion(observed="inputs", add=_gram, score=_optimal_brain_surgeon, squares=True),
    # The diagonal of the empirical Fisher information along a unit's weights: (sum W * G)^2 of each sequence
    # and block. The micro-batches do not matter.
    "fisher": Criterion(
        observed="output_gradients",
        add=lambda v, g: (v * g).sum(dim=(1, 3)).square().sum(dim=0),
        score=lambda w, s, n: s,
    ),
    # The same of what each token adds to G as it passes through the weights: far more squares, so less noise.
    # To second order, twice the loss that removing the block costs, times a constant that all share.
    "fisher_per_token": Criterion(
        observed="output_gradients",
        add=lambda v, g: (v * g).sum(dim=3).square().sum(dim=(0, 1)),
        score=lambda w, s, n: s,
        of_loss=True,
    ),
    "random": Criterion(observed="nothing", score=lambda w, s, n: torch.rand(len(w))),
}


class LayerScoring:
    """Scores the groups of one decoder layer: takes in the micro-batches, then returns the scores."""

    def __init__(
        self, name: CriterionName, family: Family, shape: LayerShape, layer: torch.nn.Module, *, seed: int = 0
    ) -> None:
        """Prepare for a layer of the given sizes; ``seed`` is that of ``random``."""
        parameters = dict(layer.named_parameters())
        self.criterion = CRITERIA[name]
        self.weights = {key: parameters[key] for key in family.slicings if key in parameters}
        """The layer's weights and biases that belong to groups."""
        self._family, self._shape, self._layer, self._seed = family, shape, layer, seed
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._tokens = 0

    @contextlib.contextmanager
    def activations(self) -> Iterator[dict[str, Tensor]]:
        """Record the activations that the criterion observes while the layer runs.

        Yields:
            Name of a weight to the (B, T, U*R) activations along its groups, filled when the layer has run.
        """
        seen: dict[str, Tensor] = {}
        hooks = []
        both = self.criterion.observed == "output_gradients"
        for name in self.weights if both or self.criterion.observed == "inputs" else ():
            module, _, what = name.rpartition(".")
            reads = self._family.slicings[name].axis == 1
            if what != "weight" or not (reads or both):
                continue

            def record(_: Any, inputs: Any, output: Any, name: str = name, reads: bool = reads) -> None:
                seen[name] = inputs[0] if reads else output

            hooks.append(self._layer.get_submodule(module).register_forward_hook(record))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, observations: Mapping[str, tuple[Tensor, ...]], *, tokens: int) -> None:
        """Take in a micro-batch.

        Args:
            observations: Name of a weight to the arguments of ``Criterion.add``, not yet cut into blocks.
            tokens: B * T.
        """
        self._tokens += tokens
        of_weights = self.criterion.observed == "weight_gradients"
        for name, tensors in observations.items():
            axis = self._family.slicings[name].axis if of_weights else -1
            for number, (_, blocks) in enumerate(self._blocks(name, axis, *tensors)):
                value = self.criterion.add(*blocks)
                key = name, number  # a fused projection has several blocks of one kind
                self._sums[key] = self._sums[key].add_(value) if key in self._sums else value

    def scores(self) -> LayerScores:
        """Return the scores: float32 (float64 for float64 weights), in host memory."""
        totals: dict[Kind, Tensor] = {}
        # A criterion that observes inputs scores only the weights that read them.
        names = self.weights if self.criterion.observed == "nothing" else {name for name, _ in self._sums}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            for name in sorted(names):
                weight = self.weights[name].detach()
                blocks = self._blocks(name, self._family.slicings[name].axis, weight)
                for number, (kind, (block,)) in enumerate(blocks):
                    score = self.criterion.score(
                        block, self._sums.get((name, number), torch.empty(0)), self._tokens
                    ).to("cpu", torch.promote_types(weight.dtype, torch.float32))
                    totals[kind] = totals[kind] + score if kind in totals else score
        finish = self.criterion.finish
        groups = totals["query"].view(self._shape.kv_heads, -1).sum(dim=1) + totals.get("kv", 0.0)
        return LayerScores(
            query_heads=finish(totals["query"]), kv_groups=finish(groups), mlp_channels=finish(totals["mlp"])
        )

    def _blocks(self, name: str, axis: int, *tensors: Tensor) -> Iterator[tuple[Kind, list[Tensor]]]:
        """Cut tensors along their groups: weights into (U, R, ...), activations into (B, T, U, R)."""
        at = 0 if axis >= 0 else tensors[0].dim() - 1
        wide = [t.to(torch.promote_types(t.dtype, torch.float32)).movedim(axis, at) for t in tensors]
        for kind, rows in self._family.slicings[name].unit_rows(self._shape, wide[0].shape[at]):
            first, count = int(rows[0, 0]), rows.numel()
            yield kind, [t.narrow(at, first, count).unflatten(at, tuple(rows.shape)) for t in wide]
