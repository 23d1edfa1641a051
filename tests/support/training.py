"""What the tests of training share."""

import torch

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
        precision="float32",
    )
    return TrainingSettings(**defaults | changes)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
