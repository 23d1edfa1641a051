"""Memory that a model's own code takes, found without taking it: torch's fake tensors have sizes and no data.

All operations of a pass run on fake tensors, on a fake CPU whatever the device, while the bytes of storages
that are alive are counted. So no formula a family has to be kept in step with transformers.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from core.model.build import build_model
from core.model.decoder import final_states
from core.model.families import Family, family_of
from core.model.hidden import HiddenLesson
from core.model.layerwise import LayerwiseModel, frozen
from core.model.loss import (
    Lesson,
    StoredLesson,
    chunk_gradient,
    chunk_lesson,
    chunk_positions,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class PassMemory:
    """Bytes that a pass takes beside the weights.

    Attributes:
        kept: What is alive when the forward pass is done: activations for the backward pass, autocast copies.
        peak: The most that is alive at once, gradients of the weights included.
        handed_over: Size of each tensor that waits in host memory meanwhile.
    """

    kept: int
    peak: int
    handed_over: tuple[int, ...] = ()


_P = ParamSpec("_P")
_Simulation = Callable[Concatenate[PreTrainedConfig, _P], PassMemory]


def _once(simulate: _Simulation[_P]) -> _Simulation[_P]:
    """Keep in this process what a simulation has found: plans ask for the same passes again and again."""
    known: dict[Hashable, PassMemory] = {}

    @functools.wraps(simulate)
    def found(config: PreTrainedConfig, /, *args: _P.args, **kwargs: _P.kwargs) -> PassMemory:
        model = config.to_json_string(use_diff=False), config._attn_implementation
        key = *model, *args, *sorted(kwargs.items())
        if key not in known:
            known[key] = simulate(config, *args, **kwargs)
        return known[key]

    return found


@_once
def simulate_training(
    config: PreTrainedConfig,
    batch: int,
    length: int,
    *,
    autocast: bool,
    checkpointing: bool,
    device: str,
    offload: bool = False,
    accumulate: bool = False,
    taught: tuple[float, float] | None = None,
    hidden_layers: tuple[int, ...] = (),
    top_k: int = 0,
    lora_rank: int = 0,
) -> PassMemory:
    """Return what a forward and backward pass of training takes, loss included.

    Args:
        config: The model's; weights are float32.
        batch: Sequences at once.
        length: Tokens a sequence.
        autocast: Whether products are bfloat16.
        checkpointing: Whether activations are recomputed in the backward pass.
        device: Type of the device, by which logits are shared out.
        offload: Whether checkpointing keeps the inputs of layers in host memory.
        accumulate: Whether gradients of another micro-batch are there already.
        taught: Weight and temperature of a ``Lesson``, if the loss holds one; the teacher's hidden states are
            counted too.
        hidden_layers: Those that learn from a teacher's, whose outputs are counted too.
        top_k: If not 0, what the teacher expects is stored: so many of its tokens.
        lora_rank: If not 0, adapters of that rank are trained, and the weights are frozen.
    """
    with _fake_model(config, torch.float32) as (model, counter):
        model.train()
        handed_over: list[int] = []
        if checkpointing:
            model.activation_checkpointing_enable()
        if offload:
            layer: Any
            for layer in model.get_submodule(family_of(config).layers).children():
                checkpoint = layer._gradient_checkpointing_func
                layer._gradient_checkpointing_func = functools.partial(_offloaded, handed_over, checkpoint)
        if lora_rank:
            _add_adapters(model, lora_rank)
        weights = counter.live
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if accumulate:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        before = counter.live
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            tokens = torch.zeros(batch, length, dtype=torch.long)
            of_teacher = functools.partial(torch.zeros, dtype=torch.bfloat16 if autocast else torch.float32)
            hidden = HiddenLesson(
                aims={layer: of_teacher(tokens.numel(), config.hidden_size) for layer in hidden_layers},
                positions=(tokens.flatten(), tokens.flatten()),
                weight=1.0,
            )
            with hidden.taught(model, scale=1.0) if hidden.aims else contextlib.nullcontext():
                states = final_states(model, tokens)
            kept = counter.live - before
            rows = states.detach()[:, :-1].flatten(0, 1)
            lesson: Lesson | StoredLesson | None = None
            if taught is not None and top_k:
                ids = torch.zeros(len(rows), min(top_k, config.vocab_size), dtype=torch.long)
                logs = torch.zeros(len(ids), ids.shape[1] + 1)
                lesson = StoredLesson(ids=ids, logs=logs, weight=taught[0], temperature=taught[1])
                columns = [ids, logs]
            elif taught is not None:
                lesson = Lesson(teacher=model, aims=rows.clone(), weight=taught[0], temperature=taught[1])
                columns = [lesson.aims]
            for part in rows.split(chunk_positions(config.vocab_size, device))[:2]:
                targets = torch.zeros(len(part), dtype=torch.long)
                if lesson is not None:
                    chunk_lesson(model, part, targets, lesson, *(c[: len(part)] for c in columns), scale=1.0)
                else:
                    chunk_gradient(model, part, targets, scale=1.0)
        states.backward(torch.ones_like(states))
        return PassMemory(kept=kept, peak=counter.peak - weights, handed_over=tuple(handed_over))


def _offloaded(sizes: list[int], checkpoint: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint a layer as transformers does with ``offload``: what it keeps is gone until it comes back."""

    def hand_over(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        sizes.append(tensor.nbytes)
        return tensor.shape, tensor.dtype

    def bring_back(kept: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(kept[0], dtype=kept[1])

    with torch.autograd.graph.saved_tensors_hooks(hand_over, bring_back):
        return checkpoint(*args)


def _add_adapters(model: "PreTrainedModel", rank: int) -> None:
    """Freeze a model, and let its projections do what peft's adapters do, which cannot be of fake tensors."""
    model.requires_grad_(False)
    for module in model.get_submodule(family_of(model.config).layers).modules():
        if isinstance(module, nn.Linear):
            a = nn.Parameter(torch.zeros(rank, module.in_features))
            b = nn.Parameter(torch.zeros(module.out_features, rank))
            module.register_parameter("lora_a", a)
            module.register_parameter("lora_b", b)
            module.register_forward_hook(functools.partial(_adapted, a, b))


def _adapted(a: Tensor, b: Tensor, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + F.linear(F.linear(inputs[0].to(a.dtype), a), b) * 2


@_once
def simulate_inference(config: PreTrainedConfig, dtype: torch.dtype, batch: int, length: int) -> PassMemory:
    """Return what a forward pass takes that keeps nothing, without the output head's logits."""
    with _fake_model(config, dtype) as (model, counter), torch.no_grad():
        weights = counter.live
        states = final_states(model, torch.zeros(batch, length, dtype=torch.long))
        return PassMemory(kept=states.nbytes, peak=counter.peak - weights)


@_once
def simulate_head(
    config: PreTrainedConfig, dtype: torch.dtype, batch: int, length: int, *, device: str
) -> PassMemory:
    """Return what the loss and its gradient by the last hidden states take; the weights get no gradients."""
    with _fake_model(config, dtype) as (model, counter), frozen(model):
        before = counter.live
        counter.peak = before
        states = torch.zeros(batch * length, config.hidden_size, dtype=dtype)
        for part in states.split(chunk_positions(config.vocab_size, device))[:2]:
            chunk_gradient(model, part, torch.zeros(len(part), dtype=torch.long), scale=1.0)
        # The final norm's passes: its input, its output, their gradients.
        return PassMemory(kept=states.nbytes, peak=counter.peak - before + 3 * states.nbytes)


@_once
def simulate_layer(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    batch: int,
    length: int,
    *,
    of_weights: bool,
    backward: bool,
    add: Callable[..., Tensor] | None = None,
) -> PassMemory:
    """Return what scoring takes to run the widest decoder layer, and to go back through it.

    Args:
        config: The model's.
        dtype: Number format of weights and activations.
        batch: Sequences at once.
        length: Tokens a sequence.
        of_weights: Whether the layer's weights get gradients.
        backward: Whether there is a backward pass.
        add: What is computed from a float32 copy of each activation that is observed, and of its gradient if
            there is a backward pass: see ``Criterion``. None if none is observed.
    """
    with _fake_model(config, dtype) as (model, counter), frozen(model):
        layerwise = LayerwiseModel(model)
        widest = max(
            range(len(layerwise.layers)),
            key=lambda index: sum(p.numel() for p in layerwise.layers[index].parameters()),
        )
        layer, family = layerwise.layers[widest], family_of(config)
        state = layerwise.embed(torch.zeros(batch, length, dtype=torch.long)).detach().requires_grad_()
        before, counter.peak = counter.live, counter.live
        layer.requires_grad_(of_weights)
        seen: list[Tensor] = []
        with (
            torch.set_grad_enabled(backward),
            contextlib.nullcontext() if add is None else _activations(family, layer, seen, makers=backward),
        ):
            output = layerwise.run(widest, state)
        kept, found = counter.live - before, [seen]
        if backward:
            wanted = [*seen, state, *(layer.parameters() if of_weights else ())]
            found.append(list(torch.autograd.grad(output, wanted, torch.ones_like(output))))
        for observed in zip(*found, strict=False):
            # Each channel is a unit. The copies stay until the next ones are made, as they do in scoring.
            wide = [x.detach().to(torch.promote_types(dtype, torch.float32)).unsqueeze(-1) for x in observed]
            assert add is not None
            add(*wide)
        return PassMemory(kept=kept, peak=counter.peak - before)


@contextlib.contextmanager
def _activations(family: Family, layer: nn.Module, seen: list[Tensor], *, makers: bool) -> Iterator[None]:
    """Add to ``seen`` what the projections that read groups take, and what those that make them give."""
    modules, hooks = dict(layer.named_modules()), []
    for name, slicing in family.slicings.items():
        module, _, what = name.rpartition(".")
        reads = slicing.axis == 1
        if what == "weight" and module in modules and (reads or makers):

            def record(_: Any, inputs: Any, output: Any, reads: bool = reads) -> None:
                seen.append(inputs[0] if reads else output)

            hooks.append(modules[module].register_forward_hook(record))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _fake_model(
    config: PreTrainedConfig, dtype: torch.dtype
) -> "Iterator[tuple[PreTrainedModel, _LiveBytes]]":
    from transformers.initialization import no_init_weights

    with FakeTensorMode(), _LiveBytes() as counter:
        with no_init_weights():
            model = build_model(config, dtype=dtype)
        model.tie_weights()
        yield model, counter


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations have made and that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # torch keeps one object a storage while it lives
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
