"""Layer similarities and group scores with only one layer's gradients in memory (eq. 3-5, 7-10).

One forward pass, layer by layer, keeps each layer's inputs and yields the similarities. The gradient of the
last hidden state starts a backward pass, layer by layer: recompute the layer, back-propagate through it,
reduce what its criterion observes to one number per group, free it. The result is plain autograd's, to
rounding.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from core.errors import CheckpointError, DataError
from core.model.config import layer_shapes
from core.model.families import family_of
from core.model.layerwise import LayerwiseModel, frozen
from core.progress import tracked
from core.pruning.scoring.batching import fitting_micro_batch
from core.pruning.scoring.copies import Arrival, ahead, copies_for
from core.pruning.scoring.criteria import CRITERIA, LayerScoring
from core.pruning.scoring.kept_outputs import KeptOutputs, choose_outputs
from core.pruning.scoring.layer_inputs import LayerInputs, share_out
from core.pruning.scoring.stages import Stage, Stages
from core.pruning.scoring.statistics import LayerScores, Statistics
from core.settings.prune import CriterionName


def draw_calibration(pool: Tensor, *, sequences: int, seed: int, step: int) -> Tensor:
    """Draw the calibration set of one pruning step: new in each step, no document twice.

    Args:
        pool: (P, T) token ids, one row per document.
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
    """Compare a layer's input and output at each token; larger is more similar (eq. 3).

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
    model: PreTrainedModel | LayerwiseModel,
    tokens: Tensor,
    *,
    micro_batch: int = 0,
    similarity: Literal["cosine", "euclidean", "manhattan"] = "cosine",
    criterion: CriterionName = "taylor_l1",
    seed: int = 0,
    state_bytes: int | None = None,
    scratch: Path | None = None,
    keep_bytes: int = 0,
    stages: Stages | None = None,
) -> Statistics:
    """Measure layer similarities and group scores of a model on a calibration set.

    Args:
        model: In any number format; products and sums are float32. Left unchanged. Its layers may be on disk.
        tokens: (S, T) int64 token ids.
        micro_batch: Sequences that pass through a layer at a time; 0 chooses by the free memory. The loss is
            the mean over all predictions of the set, so the split changes no score (except those of the
            criterion ``taylor_per_microbatch``).
        similarity: See ``layer_similarity``.
        criterion: How groups are scored.
        seed: Seed of the criterion ``random``.
        state_bytes: Host memory for the layers' inputs; None for no limit.
        scratch: Folder for inputs beyond ``state_bytes``.
        keep_bytes: Memory on the model's device. An accelerator keeps there, in this order, the hidden states
            between layers, inputs of layers, and outputs of projections, which the backward pass then does
            not compute again; the CPU only the last.
        stages: Keeps what has been measured, from time to time, and has what an earlier attempt has kept.

    Raises:
        StorageError: If ``scratch`` is full.
        CheckpointError: If the loss, a similarity or a score is not finite.
    """
    layerwise = model if isinstance(model, LayerwiseModel) else LayerwiseModel(model)
    micro_batch = micro_batch or fitting_micro_batch(
        layerwise.model.config, tokens.shape, device=layerwise.model.device
    )
    passes = _Passes(layerwise, tokens, micro_batch, criterion, seed, stages)
    passes.make_room(state_bytes, scratch, keep_bytes)
    with frozen(layerwise.model):
        passes.forward(similarity)
        loss = passes.head()
        if passes.goes_back:
            passes.backward()
    return Statistics(
        similarities=passes.similarities / tokens.numel(),
        scores=tuple(passes.scores[index] for index in range(len(layerwise.layers))),
        loss=loss,
        tokens=tokens.numel(),
    )


class _Passes:
    """The three passes over a model, and the resulting scores."""

    def __init__(
        self,
        model: LayerwiseModel,
        tokens: Tensor,
        micro_batch: int,
        criterion: CriterionName,
        seed: int,
        stages: Stages | None = None,
    ) -> None:
        self.model, self.tokens = model, tokens
        self.micro_batch = micro_batch
        self.device = model.model.device
        self.copies = copies_for(self.device)
        self.criterion, self.seed = criterion, seed
        self.goes_back = CRITERIA[criterion].observed in ("weight_gradients", "output_gradients")
        self.layers = len(model.layers)
        self.scores: dict[int, LayerScores] = {}
        self.similarities = torch.zeros(self.layers, dtype=torch.float64)
        self.loss = 0.0
        self.states: list[Tensor] = []
        """Each micro-batch's hidden state between two layers, or in the backward pass its gradient."""
        self.stages = stages
        self.found: Stage | None = None
        self.not_run: set[int] = set()
        """Layers whose inputs an earlier attempt has kept, but not the outputs of their projections."""

    def make_room(self, state_bytes: int | None, scratch: Path | None, keep_bytes: int) -> None:
        """Allocate memory for what is kept between layers, and by the forward pass for the backward pass."""
        model = self.model.model
        layers = len(self.model.layers) if self.goes_back else 0
        shape = (*self.tokens.shape, model.config.hidden_size)
        room = share_out(
            layers,
            math.prod(shape) * model.dtype.itemsize,
            crosses=self.copies.crosses,
            device_bytes=keep_bytes,
            host_bytes=state_bytes,
        )
        self.inputs = LayerInputs(
            layers,
            shape,
            model.dtype,
            room=room,
            device=self.device,
            copies=self.copies,
            scratch=scratch,
        )
        self.parked = None if room.stays else self.copies.host_empty(shape, model.dtype)
        family, a_channel = family_of(model.config), self.tokens.numel() * model.dtype.itemsize
        outputs_bytes = 0
        if self.goes_back:
            chosen = choose_outputs(family, self.model.layers, a_channel, room.left_bytes)
            outputs_bytes = a_channel * sum(width for *_, width in chosen)
        if self.stages is not None:
            outputs_bytes = self._take_up(self.stages, outputs_bytes, room.left_bytes)
        size = self.micro_batch
        self.batches = [slice(i, i + size) for i in range(0, len(self.tokens), size)]
        if self.goes_back:
            self.kept = KeptOutputs(
                family,
                self.model.layers,
                (shape[0], shape[1]),
                dtype=model.dtype,
                device=self.device,
                budget_bytes=outputs_bytes,
            )

    def _take_up(self, stages: Stages, outputs_bytes: int, most_bytes: int) -> int:
        """Take up what an earlier attempt has kept; return the memory that outputs take, as they did then."""
        way = {"micro_batch": self.micro_batch, "outputs_bytes": outputs_bytes}
        way = dict(stages.agree(way, way | {"outputs_bytes": most_bytes}))
        self.micro_batch, self.found = way["micro_batch"], stages.newest
        if self.found is not None:
            self.scores |= self.found.scores
            self.similarities += self.found.similarities
            self.loss = self.found.loss
        return way["outputs_bytes"]

    @torch.no_grad()
    def forward(self, similarity: Literal["cosine", "euclidean", "manhattan"]) -> None:
        """Sum each layer's similarity over tokens; what an earlier attempt has kept is not computed again."""
        self.states = [self._park(rows, self.model.embed(self.tokens[rows])) for rows in self.batches]
        first, last, done = 0, self.layers, 0 if self.found is None else self.found.number
        if done > last:  # the backward pass needs the inputs of the layers that it has not reached
            last = 2 * last + 1 - done
        elif not self.goes_back and self.found is not None:
            first = done
            self._enter(self.found.states)
        for index in tracked(range(first, last), "forward", "layers"):
            after: Tensor | list[Tensor] | None = None
            if self.stages is not None and index < done:
                after = self.states if index + 1 == last < done else self.stages.states(index + 1)
            if after is None:
                self._run(index, similarity)
                self._keep(index + 1, (index + 1) / (4 if self.goes_back else 1) / self.layers)
                continue
            for rows, state in zip(self.batches, self._arriving(), strict=True):
                self.inputs.put(index, rows, state)
            self.not_run.add(index)
            if isinstance(after, Tensor):
                self._enter(after)

    def _run(self, index: int, similarity: Literal["cosine", "euclidean", "manhattan"]) -> None:
        """Run all micro-batches through a layer."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self.model.resident(index) as layer:
            scoring = None if self.goes_back else self._scoring(index, layer)
            for number, (rows, state) in enumerate(zip(self.batches, self._arriving(), strict=True)):
                if scoring is None:
                    self.inputs.put(index, rows, state)
                    with self.kept.keep(index, rows, layer):
                        after = self.model.run(index, state)
                else:
                    with scoring.activations() as seen:
                        after = self.model.run(index, state)
                    scoring.add({name: (v,) for name, v in seen.items()}, tokens=state.shape[:2].numel())
                total += layer_similarity(state, after, similarity).double().sum()
                self.states[number] = self._park(rows, after)
            self.similarities[index] = total.cpu()
            _check_finite(f"the similarity of layer {index}", self.similarities[index])
            if scoring is not None:
                self._keep_scores(index, scoring)

    def head(self) -> float:
        """Return the loss; the hidden states give way to their gradients."""
        if self.found is not None and self.found.number > self.layers:
            self._enter(self.found.states)
            return self.loss
        losses = []
        sequences, length = self.tokens.shape
        for number, (rows, state) in enumerate(zip(self.batches, self._arriving(), strict=True)):
            loss, gradient = self.model.head_gradient(
                self.tokens[rows], state, predictions=sequences * (length - 1)
            )
            _check_finite("the calibration loss", torch.tensor(loss))
            losses.append(loss)
            self.states[number] = self._park(rows, gradient)
        self.loss = sum(losses)
        return self.loss

    def backward(self) -> None:
        """Score the layers from last to first, less those that an earlier attempt has scored."""
        layers = range(min(self.scores, default=self.layers))[::-1]
        inputs = ahead(self.inputs.take(index, rows) for index in layers for rows in self.batches)
        if self.stages is not None:
            self.stages.turn()
        for index in tracked(layers, "backward", "layers"):
            with self.model.resident(index) as layer:
                scoring = self._scoring(index, layer)
                for number, (rows, gradient) in enumerate(zip(self.batches, self._arriving(), strict=True)):
                    state = next(inputs)
                    if index in self.not_run and self.kept.keeps(index):
                        with torch.no_grad(), self.kept.keep(index, rows, layer):
                            self.model.run(index, state)
                    with self.kept.reuse(index, rows, layer):
                        before = self._layer_backward(index, state, scoring, gradient)
                    self.states[number] = self._park(rows, before)
                self._keep_scores(index, scoring)
            if index:
                done = self.layers - index
                self._keep(self.layers + 1 + done, (self.layers + 3 * done) / (4 * self.layers))

    def _enter(self, states: Tensor) -> None:
        """Go on with the states that an earlier attempt has kept."""
        # Copies: last bits of a product may depend on where its operands lie in memory.
        self.states = [self._park(rows, states[rows].to(self.device, copy=True)) for rows in self.batches]

    def _keep(self, number: int, share: float) -> None:
        """Keep the stage ``number`` if that is due; ``share`` of the work is done."""
        size = self.tokens.numel() * self.model.model.config.hidden_size * self.model.model.dtype.itemsize
        if self.stages is None or not self.stages.is_due(share, size):
            return
        superseded = range(0) if self.goes_back else range(number)
        if number > self.layers:  # with the inputs of the layers that are scored
            superseded = range(2 * self.layers + 1 - number, number)
        self.stages.keep(
            lambda: Stage(
                number=number,
                states=torch.cat([state.cpu() for state in self._arriving()]),
                similarities=self.similarities.clone(),
                scores=dict(self.scores),
                loss=self.loss,
            ),
            superseded,
        )

    def _park(self, rows: slice, state: Tensor) -> Tensor:
        """Return a state where it lies until the next layer: on the device, or on its way to the host."""
        if self.parked is None:
            return state
        self.copies.to_host(state, self.parked[rows])
        return self.parked[rows]

    def _arriving(self) -> Iterator[Tensor]:
        """Yield each micro-batch's state on the device; each may be replaced once it has been yielded."""

        def start(state: Tensor) -> Arrival:
            return (lambda: state) if self.parked is None else self.copies.to_device(state)

        return ahead(start(state) for state in self.states)

    def _keep_scores(self, index: int, scoring: LayerScoring) -> None:
        scores = scoring.scores()
        _check_finite(f"a score of layer {index}", *vars(scores).values())
        self.scores[index] = scores

    def _scoring(self, index: int, layer: torch.nn.Module) -> LayerScoring:
        config = self.model.model.config
        shape, seed = layer_shapes(config)[index], self.seed * 10_007 + index
        return LayerScoring(self.criterion, family_of(config), shape, layer, seed=seed)

    def _layer_backward(self, index: int, state: Tensor, scoring: LayerScoring, gradient: Tensor) -> Tensor:
        """Back-propagate a micro-batch through a layer; returns the gradient with respect to its input."""
        state = state.detach().requires_grad_()
        of_weights = scoring.criterion.observed == "weight_gradients"
        for weight in scoring.weights.values():
            weight.requires_grad_(of_weights)
        try:
            with torch.enable_grad(), scoring.activations() as seen:
                output = self.model.run(index, state)
            observed = dict(scoring.weights) if of_weights else seen
            found = torch.autograd.grad(output, [state, *observed.values()], gradient)
        finally:
            for weight in scoring.weights.values():
                weight.requires_grad_(False)
        scoring.add(
            {name: (value.detach(), g) for (name, value), g in zip(observed.items(), found[1:], strict=True)},
            tokens=state.shape[:2].numel(),
        )
        return found[0]


def _check_finite(what: str, *values: Tensor) -> None:
    """Refuse NaN and infinities, which would silently decide what is pruned; values are in host memory."""
    if not all(bool(value.isfinite().all()) for value in values):
        raise CheckpointError(
            f"{what} is not finite, as the model's weights or activations are not. Check the checkpoint; if "
            "training made it, lower training.learning_rate; otherwise set calibration.precision to float32."
        )
