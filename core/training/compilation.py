"""torch.compile for layers of unequal size: their widths are variables of its graphs, so that few serve all.

As constants each size would need its own graph, and torch would give up after eight.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.utils import counters
from torch.fx.experimental import _config as symbolic

from core.errors import SettingsError
from core.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_BACKEND = "inductor"
_VARIABLE_WIDTHS: dict[str, Any] = {
    "force_parameter_static_shapes": False,
    "force_nn_module_property_static_shapes": False,
    "recompile_limit": 64,
    "fail_on_recompile_limit_hit": True,  # it would go on without a word, uncompiled
}


def check_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        SettingsError: If that fails: torch has no compiler of its own.
    """
    try:
        torch.compile(_small, backend=_BACKEND)(torch.ones(8, device=device))
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise SettingsError(
            [
                f"training.compile=true, but torch.compile does not work here: {said}. Install g++ and the "
                "headers of Python, or set training.compile to false: the same run resumes."
            ]
        ) from error


def _small(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


@contextlib.contextmanager
def compiled_layers(model: "PreTrainedModel") -> Iterator[Callable[[], int]]:
    """Let a model's decoder layers run compiled where they are trained, while the ``with`` block lasts.

    Layers that differ in widths alone share a graph; others have one each: another number of query heads to a
    KV head, another kind of mask. What runs without gradients is not compiled.

    Returns:
        What returns the number of graphs so far.
    """
    family = family_of(model.config)
    layers: list[Any] = list(model.get_submodule(family.layers).children())
    axes = {name: slicing.axis for name, slicing in family.slicings.items()}
    before = counters["stats"]["unique_graphs"]

    def number() -> int:
        return counters["stats"]["unique_graphs"] - before

    # Widths that happen to be equal in one layer are not in the next.
    free = symbolic.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    with torch._dynamo.config.patch(**_VARIABLE_WIDTHS), free:
        for layer in layers:
            # Without the checkpointing that transformers puts around it: that is not to be compiled.
            plain = inspect.unwrap(type(layer).forward)
            compiled = torch.compile(plain, backend=_BACKEND)
            layer.forward = functools.partial(_forward, layer, plain, compiled, axes)
        try:
            yield number
        finally:
            for layer in layers:
                del layer.forward
    log.info("torch.compile: %d graphs for %d layers", number(), len(layers))


def _forward(
    layer: Any,
    plain: Callable[..., Any],
    compiled: Callable[..., Any],
    axes: Mapping[str, int],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return plain(layer, *args, **kwargs)
    for name, parameter in layer.named_parameters():  # under FSDP2 they are there only now
        if name in axes:
            torch._dynamo.maybe_mark_dynamic(parameter, axes[name])
    run = functools.partial(compiled, layer, **kwargs)
    return layer._gradient_checkpointing_func(run, *args) if layer.gradient_checkpointing else run(*args)
