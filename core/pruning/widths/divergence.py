"""How far a model with groups cut is from the whole one, measured with masks: no smaller model is built."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.errors import CheckpointError
from core.model.config import layer_shapes
from core.model.decoder import final_states
from core.model.families import family_of
from core.model.layerwise import frozen, replaced
from core.model.loss import divergence_sum
from core.progress import Progress
from core.pruning.plan import LayerPlan
from core.pruning.sensitivity import recorded, silenced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Cut = Sequence[LayerPlan]
"""What each layer of the model keeps."""


class CutDivergence:
    """Divergence of a model's cuts from the model itself, on fixed tokens, in nats a token."""

    def __init__(self, model: "PreTrainedModel", tokens: Tensor, *, batch_size: int, every: int = 1) -> None:
        """Let the whole model run once; its final hidden states are kept.

        Args:
            model: Left unchanged.
            tokens: (S, T) integer token ids.
            batch_size: Sequences per forward pass; states between layers are held for one batch at a time.
            every: Measure at the last of each so many positions of a sequence: all tokens pass the layers,
                these alone the output head, which costs more than the layers where vocabularies are large.
        """
        self._model, self._family, self._shapes = model, family_of(model.config), layer_shapes(model.config)
        self._layers = list(model.get_submodule(self._family.layers).children())
        self._batches = tokens.to(model.device, torch.long).split(batch_size)
        self._measured = slice(min(every, tokens.shape[1]) - 1, None, every)
        with frozen(model), torch.no_grad():
            self._aims = [final_states(model, batch)[:, self._measured] for batch in self._batches]
        self._positions = sum(aims.shape[:2].numel() for aims in self._aims)

    def of(self, cuts: Sequence[Cut]) -> list[float]:
        """Return the divergence of each cut."""
        totals = [0.0] * len(cuts)
        with self._running("cuts", len(cuts)) as progress:
            for number, cut in enumerate(cuts):
                for batch, aims in zip(self._batches, self._aims, strict=True):
                    with self._cut(cut):
                        totals[number] += self._distance(batch, aims)
                    progress.add()
        return self._means(totals)

    def with_one_layer_changed(self, cut: Cut, changes: Sequence[tuple[int, LayerPlan]]) -> list[float]:
        """Return the divergence of a cut with each one of the changes alone; the layers below run once.

        Args:
            cut: What each layer keeps.
            changes: A layer's number, and what it keeps instead.
        """
        totals = [0.0] * len(changes)
        with self._running("changes", len(changes)) as progress:
            for batch, aims in zip(self._batches, self._aims, strict=True):
                outputs: list[Any] = []
                with self._cut(cut), recorded(self._layers, outputs):
                    final_states(self._model, batch)
                for number, (index, plan) in enumerate(changes):
                    below = outputs[index - 1] if index else None
                    skipped = [lambda *_, below=below, **__: below] * index
                    changed = [*cut[:index], plan, *cut[index + 1 :]]
                    with replaced(self._layers[:index], skipped), self._cut(changed, first=index):
                        totals[number] += self._distance(batch, aims)
                    progress.add()
        return self._means(totals)

    @contextlib.contextmanager
    def _running(self, what: str, count: int) -> Iterator[Progress]:
        progress = Progress(f"width search, {what}", count * len(self._batches), "measurements")
        with progress, frozen(self._model), torch.no_grad():
            yield progress

    @contextlib.contextmanager
    def _cut(self, cut: Cut, first: int = 0) -> Iterator[None]:
        """Zero what ``cut`` drops, from layer ``first``."""
        with contextlib.ExitStack() as stack:
            for shape, layer, plan in list(zip(self._shapes, self._layers, cut, strict=True))[first:]:
                stack.enter_context(silenced(self._family, shape, layer, plan))
            yield

    def _distance(self, batch: Tensor, aims: Tensor) -> float:
        states = final_states(self._model, batch)[:, self._measured]
        return divergence_sum(self._model, states, self._model, aims)

    def _means(self, totals: Sequence[float]) -> list[float]:
        means = [total / self._positions for total in totals]
        if any(mean != mean for mean in means):
            raise CheckpointError(
                "the divergence is not a number, as the model's logits are not. Check the checkpoint."
            )
        return means
