"""What the tests of training share."""

from typing import ClassVar

import torch
from torch.autograd.graph import saved_tensors_hooks

from core.settings.texts import TextSource
from core.settings.training import TrainingSettings


def training_settings(**changes):
    """Settings for sequences of 12 tokens, four to a global batch."""
    defaults = dict(
        tokens="1k",
        sources=(TextSource(path="x"),),
        sequence_length=12,
        global_batch=4,
        micro_batch=4,
        learning_rate=1e-2,
        min_learning_rate=1e-3,
        teacher="none",
        precision="float32",
    )
    return TrainingSettings(**defaults | changes)


class HostCopies(saved_tensors_hooks):
    """What transformers' ``save_on_cpu`` does, where there is no accelerator to pin memory for."""

    sizes: ClassVar = []
    """Of all that was handed over, in bytes."""

    def __init__(self, pin_memory, device_type):
        assert pin_memory
        super().__init__(self.pack, torch.clone)

    def pack(self, tensor):
        self.sizes.append(tensor.nbytes)
        return tensor.detach().clone()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
