"""A model run one decoder layer at a time, by its own code; its layers may stay on disk until used."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.errors import CheckpointError
from core.machine.memory import available_bytes
from core.model.build import build_model, model_shape
from core.model.checkpoint import ChangeLayer, Checkpoint
from core.model.config import config_with_layers, refuse_sliced
from core.model.decoder import final_states
from core.model.families import family_of
from core.model.loss import loss_gradient
from core.model.shape import LayerShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Resident = Callable[[int], AbstractContextManager[torch.nn.Module]]
"""Takes a layer's number, and holds the layer in memory while it is used."""


class LayerwiseModel:
    """Runs a model's embedding, its layers one by one, and its head.

    The arguments that a family passes to its layers (masks, rotary tables, windows) come from its own code:
    its decoder is run with layers that only record how they are called. That depends only on the shape of a
    batch, since no batch is padded.
    """

    def __init__(self, model: "PreTrainedModel", resident: Resident | None = None) -> None:
        """Wrap a model.

        Args:
            model: The model.
            resident: Brings a layer into memory; None if all are there.

        Raises:
            UnsupportedModelError: If the model is sliced.
        """
        refuse_sliced(model.config)
        self.model = model
        layers = list(model.get_submodule(family_of(model.config).layers).children())
        self.layers: list[torch.nn.Module] = layers
        # Without a reference to self: a cycle would keep the whole model until garbage is collected.
        self.resident: Resident = resident or (lambda index: contextlib.nullcontext(layers[index]))
        self._calls: dict[torch.Size, list[dict[str, Any]]] = {}

    def embed(self, batch: Tensor) -> Tensor:
        """Return the (B, T, D) input of the first layer for (B, T) token ids."""
        states: list[Tensor] = []
        calls: list[dict[str, Any]] = []

        def record(hidden_states: Tensor, **keywords: Any) -> Tensor:
            states.append(hidden_states)
            calls.append(keywords)
            return hidden_states

        with torch.no_grad(), replaced(self.layers, [record] * len(self.layers)):
            self.model.get_decoder()(input_ids=batch.to(self.model.device), use_cache=False)
        self._calls.setdefault(batch.shape, calls)
        return states[0]

    def run(self, index: int, state: Tensor) -> Tensor:
        """Run layer ``index``, which must be in memory, on (B, T, D) states of an embedded batch's shape."""
        output = self.layers[index](state, **self._calls[state.shape[:2]][index])
        return output[0] if isinstance(output, tuple) else output

    def head_gradient(self, batch: Tensor, state: Tensor, *, predictions: int) -> tuple[float, Tensor]:
        """Return a batch's causal-LM loss and its gradient with respect to the last layer's output.

        Everything after the layers (final norm, output head, soft caps) is run by the model's own code.

        Args:
            batch: (B, T) token ids.
            state: (B, T, D) output of the last layer.
            predictions: The loss is divided by this number: of the batch, or of the larger set it belongs to.

        Returns:
            Summed loss / ``predictions`` in nats, and the (B, T, D) gradient.
        """
        ids = batch.to(self.model.device)
        last = state.detach().requires_grad_()
        passes: list[Callable[..., Any]] = [lambda x, **_: x] * (len(self.layers) - 1)
        with torch.enable_grad(), replaced(self.layers, [*passes, lambda *_, **__: last]):
            states = final_states(self.model, ids)
        loss, gradient = loss_gradient(self.model, states, ids, scale=1 / predictions)
        return loss.item() / predictions, torch.autograd.grad(states, last, gradient)[0]


@contextlib.contextmanager
def frozen(model: "PreTrainedModel") -> Iterator[None]:
    """Switch off weight gradients and dropout within the block."""
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
def replaced(layers: Sequence[torch.nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Give each layer another forward within the block."""
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def open_streamed(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    sizes: Sequence[LayerShape] | None = None,
    cut: ChangeLayer = lambda _, tensors: tensors,
) -> LayerwiseModel:
    """Open a checkpoint whose decoder layers stay on disk; a layer is in memory only while it is used.

    ``cut`` changes the tensors of a layer each time they are loaded; ``sizes`` are the sizes that result.
    ``dtype`` None keeps the stored number format.

    Raises:
        CheckpointError: If a file is missing or corrupt, or weights and config do not fit.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config = checkpoint.config if sizes is None else config_with_layers(checkpoint.config, sizes)
    prefix, outside, number_format = checkpoint.family.layers, checkpoint.outside(), dtype or checkpoint.dtype
    # Parameters take no memory, but computed tables (rotary frequencies) are real.
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = build_model(config, dtype=number_format)

    def fill(module: torch.nn.Module, tensors: dict[str, Tensor], what: str) -> None:
        there = {name: tensor.to(device, number_format) for name, tensor in tensors.items()}
        _fill(module, there, f"{checkpoint.directory}: {what}")

    @contextlib.contextmanager
    def resident(index: int) -> Iterator[torch.nn.Module]:
        name = f"{prefix}.{index}"
        layer = model.get_submodule(name)
        fill(layer, cut(index, checkpoint.layer(index)), name)
        try:
            yield layer
        finally:
            layer.to("meta")

    streamed = LayerwiseModel(model, resident)
    owner, _, name = prefix.rpartition(".")
    layers = model.get_submodule(prefix)
    setattr(model.get_submodule(owner), name, torch.nn.ModuleList())
    fill(model, outside, "outside the layers")
    model.tie_weights()
    torch.nn.Module.to(model, device)
    setattr(model.get_submodule(owner), name, layers)
    return streamed


def exceeds_memory(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None, device: torch.device, free_bytes: int | None = None
) -> bool:
    """Return whether a checkpoint's weights would take over half of the memory that is free on ``device``.

    ``dtype`` None stands for the stored number format; ``free_bytes`` None looks.
    """
    free = available_bytes(device) if free_bytes is None else free_bytes
    width = (dtype or checkpoint.dtype).itemsize
    return model_shape(checkpoint.config).num_params() * width > free // 2


def _fill(module: torch.nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Assign all of a module's parameters except tied ones."""
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        message = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{what}: weights do not fit config.json: {message}") from error
    tied = getattr(module, "all_tied_weights_keys", {})
    lost = sorted((set(missing) | set(unexpected)) - set(tied))
    if lost:
        raise CheckpointError(f"{what}: weights and config.json disagree on {', '.join(lost[:5])}.")
