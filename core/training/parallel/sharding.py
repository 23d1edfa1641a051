"""Weights, gradients and moments of a model shared out over ranks, by FSDP2.

Each decoder layer is a group of parameters that is gathered when the layer runs, forward and backward; the
rest (embedding, final norm, output head, tied or not) is another that stays from the decoder's forward pass
to the end of the backward pass, since the loss goes back through the head in between.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Root(nn.Module):
    """What FSDP2 takes for the outermost module: its forward pass is the decoder's."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)


def shard(model: "PreTrainedModel", device: torch.device, size: int, *, bfloat16: bool) -> FSDPModule:
    """Leave each rank its part of a model's weights, in float32 or what is wider, in place.

    From then on a forward pass of the decoder gathers what it needs, and the backward pass leaves each rank
    its part of the gradients, added up over the ranks.

    Args:
        model: The same on each rank, in host memory; its layers may differ in size. No more than one whole
            layer is on the device at once.
        device: This rank's device.
        size: Number of ranks, which have a process group.
        bfloat16: Whether layers are gathered, and their gradients computed, in bfloat16, as autocast does.
            The weights of their norms are rounded too, the signal between layers is not.

    Returns:
        What ``reshard`` is to be called on before the weights are looked at: after a forward pass without a
        backward pass, those outside the layers are still whole.
    """
    mesh = init_device_mesh(device.type, (size,))
    # The signal between the layers stays as the caller has it: autocast chooses what is bfloat16.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None,
        reduce_dtype=torch.float32 if bfloat16 else None,
        cast_forward_inputs=False,
    )
    decoder = model.get_decoder()
    for layer in decoder.layers:
        fully_shard(_widened(layer), mesh=mesh, mp_policy=policy)
    root: Any = _Root(_widened(model))
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is normalised by the tokens of all ranks
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    # The decoder is called by the model's own head, too, with its forward replaced on the instance
    # (core/model/loss.py): a class of its own lets that pass by, where FSDP2's hooks would not.
    class_: Any = type(decoder)

    class Gathering(class_):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return root(super().forward, *args, **kwargs)

    decoder.__class__ = Gathering
    assert isinstance(root, FSDPModule)
    return root


def _widened(module: Any) -> Any:
    """Turn number formats narrower than float32 into float32, in place."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return module
