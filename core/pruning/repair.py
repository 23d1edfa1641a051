"""Closed-form repair: the weights that stay take over what those that go contributed.

What a cut removes from the output of o_proj or down_proj is W_R x_R, of which x_K, the inputs that stay,
predict a part. By a ridge regression that is centred on the kept weights,

    W' = W_K + E (G_KK + lambda D)^-1,   E = sum (W_R x_R) x_K^T,   G_KK = sum x_K x_K^T,   D = diag G_KK

over the tokens of a calibration set. Each input has a ridge of its own size: some layers have an input that
is hundreds of times as large as the others, and a ridge of the mean would leave nothing of theirs to change.
An input that is nearly silent has that of a hundredth of the median input: by its own it would get weights as
large as it is small, and drown all else on text where it speaks.
Where the projection has a bias, the sums are about the means, and the bias takes over what the means
contributed. Layers are repaired in order, each on the activations that the repaired ones before it give, with
the sums of one projection and one hidden state a token in memory.

Two other repairs are those of compared methods. ``ridge_to_zero`` pulls W' to zero instead of W_K, by the
mean of diag G_KK for all inputs, so E is less by lambda mean(diag G_KK) W_K. ``bias`` leaves the weights
alone and adds what went on average, W_R mean(x_R), to the bias; the means are those of the model before the
cut, as in FLAP.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.errors import CheckpointError
from core.model.config import layer_shapes
from core.model.families import Kind, family_of
from core.model.layerwise import LayerwiseModel, frozen, replaced
from core.progress import Progress
from core.pruning.plan import LayerPlan
from core.pruning.scoring.batching import fitting_micro_batch

RepairKind = Literal["ridge", "ridge_to_zero", "bias"]

_QUIET = 0.01
"""Share of the median of D that no entry of it is below."""
_ATTENTION, _MLP = "self_attn", "mlp"
"""The blocks of a layer, in every family."""


class Repair:
    """Repairs the layers of a model for a plan, first to last."""

    def __init__(
        self,
        model: LayerwiseModel,
        tokens: Tensor,
        *,
        kind: RepairKind = "ridge",
        ridge: float,
        micro_batch: int = 0,
        keep_bytes: int = 0,
    ) -> None:
        """Embed the calibration set.

        Args:
            model: The model before the cut. Layers in memory are changed: weights that go become 0.
            tokens: (S, T) int64 token ids.
            kind: What takes over.
            ridge: lambda.
            micro_batch: Sequences that pass through a layer at once; 0 for as many as the free memory
                suggests.
            keep_bytes: Memory on the model's device for activations that would otherwise be computed twice.
        """
        self.model, self.kind, self.ridge, self._keep_bytes = model, kind, ridge, keep_bytes
        self._family, self._shapes = family_of(model.model.config), layer_shapes(model.model.config)
        self._device = model.model.device
        size = micro_batch or fitting_micro_batch(model.model.config, tokens.shape, device=self._device)
        self._progress = Progress("repair", len(self._shapes), "layers")
        self._states = [model.embed(tokens[i : i + size]).cpu() for i in range(0, len(tokens), size)]

    @torch.no_grad()
    def layer(self, index: int, plan: LayerPlan) -> dict[str, Tensor]:
        """Repair a layer, after all those before it.

        Args:
            index: Number of the layer.
            plan: What it keeps.

        Returns:
            Name within the layer of each weight and bias that changes, to what is added to the part of it
            that stays: float32 (float64 for float64 weights), in host memory.

        Raises:
            CheckpointError: If an activation is not finite.
        """
        changes: dict[str, Tensor] = {}
        with frozen(self.model.model), self.model.resident(index) as layer:
            known: list[_Observed | None] = []
            for path, stay in self._cuts(index, layer, plan):
                linear = layer.get_submodule(path)
                assert isinstance(linear, nn.Linear), "what reads groups is a linear map"
                sums, known = _Sums(linear, stay, self.kind), []
                for observed in self._up_to(index, layer, linear):
                    sums.add(observed.inputs)
                    known.append(observed if self._fits(observed, len(known)) else None)
                try:
                    of_weight, of_bias = sums.solve(self.ridge)
                except ValueError as error:
                    raise CheckpointError(
                        f"the activations that enter {path} of layer {index} are not finite. Check the "
                        "checkpoint; else set calibration.precision to float32."
                    ) from error
                except ArithmeticError as error:
                    raise CheckpointError(
                        f"the repair of {path} of layer {index} has no solution within rounding "
                        f"(prune.repair_ridge={self.ridge}). Raise prune.repair_ridge."
                    ) from error
                if of_bias is not None:
                    changes[f"{path}.bias"] = of_bias.cpu()
                if of_weight is None:
                    continue
                repaired = torch.zeros_like(linear.weight)
                repaired[:, stay] = (linear.weight[:, stay] + of_weight).to(repaired.dtype)
                linear.weight.data = repaired
                changes[f"{path}.weight"] = of_weight.cpu()
                if of_bias is not None:
                    linear.bias.data = (linear.bias + of_bias).to(repaired.dtype)
            if index + 1 < len(self._shapes):
                self._advance(index, layer, known)
        self._progress.add()
        if index + 1 == len(self._shapes):
            self._progress.close()
        return changes

    def _cuts(self, index: int, layer: nn.Module, plan: LayerPlan) -> Iterator[tuple[str, Tensor]]:
        """Yield each projection that loses inputs, in the order in which they run, and those that stay."""
        units: dict[Kind, tuple[int, ...]] = {"query": plan.query_heads, "mlp": plan.mlp_channels}
        for name, slicing in self._family.slicings.items():
            if slicing.axis == 1:
                length = layer.get_parameter(name).shape[1]
                ((kind, rows),) = slicing.unit_rows(self._shapes[index], length)
                if len(units[kind]) < len(rows):
                    yield name.removesuffix(".weight"), rows[list(units[kind])].flatten().to(self._device)

    def _up_to(self, index: int, layer: nn.Module, linear: nn.Module) -> Iterator["_Observed"]:
        """Run each micro-batch through a layer as far as a projection."""
        attention: list[Any] = []
        inputs: list[Tensor] = []

        def stop(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs.append(given[0])
            raise _ReachedError

        hooks = [
            layer.get_submodule(_ATTENTION).register_forward_hook(lambda *seen: attention.append(seen[-1])),
            linear.register_forward_pre_hook(stop),
        ]
        try:
            for state in self._states:
                with contextlib.suppress(_ReachedError):
                    self.model.run(index, state.to(self._device))
                yield _Observed(inputs=inputs.pop(), attention=attention.pop() if attention else None)
        finally:
            for hook in hooks:
                hook.remove()

    def _fits(self, observed: "_Observed", already: int) -> bool:
        """Return whether there is room to keep what was observed, beside as many micro-batches."""
        inputs, width = observed.inputs, self.model.model.config.hidden_size
        a_token = (inputs.shape[-1] + width) * inputs.element_size()
        return (already + 1) * inputs.shape[:2].numel() * a_token <= self._keep_bytes

    def _advance(self, index: int, layer: nn.Module, known: "list[_Observed | None]") -> None:
        """Run all micro-batches through a layer that is repaired, less what is known of its activations."""
        blocks = [layer.get_submodule(name) for name in (_ATTENTION, _MLP)]
        last = layer.get_submodule(self._family.last_projection)
        for number, state in enumerate(self._states):
            observed = known[number] if number < len(known) else None
            with contextlib.ExitStack() as stack:
                if observed is not None and observed.attention is not None:
                    answers = (
                        lambda *_, o=observed, **__: o.attention,
                        lambda *_, o=observed: last(o.inputs),
                    )
                    stack.enter_context(replaced(blocks, answers))
                self._states[number] = self.model.run(index, state.to(self._device)).cpu()


@dataclass(frozen=True, kw_only=True)
class _Observed:
    """What a micro-batch gives in a layer.

    Attributes:
        inputs: (B, T, F) what enters a projection.
        attention: What the attention block returned, if it had run before.
    """

    inputs: Tensor
    attention: Any


class _ReachedError(Exception):
    """Ends the run through a layer."""


class _Sums:
    """The sums over tokens that the repair of a projection is computed from."""

    def __init__(self, linear: nn.Linear, stay: Tensor, kind: RepairKind) -> None:
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        goes = torch.ones(linear.in_features, dtype=torch.bool, device=stay.device)
        goes[stay] = False
        self._stay, self._goes = stay, goes.nonzero().flatten()
        self._kind, self._weight = kind, linear.weight.detach()
        self._lost = self._weight[:, self._goes].to(dtype)
        self._gram = self._lost.new_zeros(len(stay), len(stay))
        self._error = self._lost.new_zeros(len(self._lost), len(stay))
        self._biased = linear.bias is not None
        self._inputs_sum, self._error_sum = (
            self._gram.new_zeros(len(stay)),
            self._lost.new_zeros(len(self._lost)),
        )
        # Sums of large means would lose in rounding what varies about them.
        self._about = self._inputs_sum.clone(), self._error_sum.clone()
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Take in (B, T, F) inputs of the projection."""
        rows = inputs.flatten(0, 1).to(self._lost.dtype)
        x, error = rows[:, self._stay], rows[:, self._goes] @ self._lost.T
        if self._biased:
            if not self._tokens:
                self._about = x.mean(dim=0), error.mean(dim=0)
            x, error = x - self._about[0], error - self._about[1]
        if self._kind != "bias":
            self._gram.addmm_(x.T, x)
            self._error.addmm_(error.T, x)
        self._inputs_sum += x.sum(dim=0)
        self._error_sum += error.sum(dim=0)
        self._tokens += len(x)

    def solve(self, ridge: float) -> tuple[Tensor | None, Tensor | None]:
        """Return what is added to the (D, K) kept weights, and to the (D,) bias; None for nothing.

        Raises:
            ValueError: If a sum is not finite.
            ArithmeticError: If the ridge is lost in rounding.
        """
        dtype, gram, error = self._lost.dtype, self._gram.double(), self._error.double()
        mean, of_mean = self._inputs_sum.double() / self._tokens, self._error_sum.double() / self._tokens
        if self._biased:
            gram -= self._tokens * mean.outer(mean)
            error -= self._tokens * of_mean.outer(mean)
            mean, of_mean = mean + self._about[0], of_mean + self._about[1]
        if not all(bool(sums.isfinite().all()) for sums in (gram, error, of_mean)):
            raise ValueError("a sum is not finite")
        if self._kind == "bias":
            return None, of_mean.to(dtype)
        # Inputs that are 0 throughout tell nothing, and change nothing.
        squares = gram.diagonal()
        if self._kind == "ridge_to_zero":
            squares = squares.mean()
        elif len(heard := squares[squares > 0]):
            squares = squares.clamp_min(_QUIET * heard.median())
        strength = ridge * squares + torch.finfo(gram.dtype).tiny
        gram.diagonal().add_(strength)
        if self._kind == "ridge_to_zero":
            error -= strength * self._weight[:, self._stay].double()
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed):
            raise ArithmeticError("the ridge is lost in rounding")
        of_weight = torch.cholesky_solve(error.T, factor).T
        of_bias = of_mean - of_weight @ mean if self._biased else None
        return of_weight.to(dtype), None if of_bias is None else of_bias.to(dtype)
