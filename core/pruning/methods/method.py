"""Which rules a pruning method decides its steps by; everything else follows from settings.

Which settings a method decides is in ``core.settings.methods``: the criterion, the repair, one step a phase.
Calibration, surgery, checkpoints, training and evaluation are the same for all.
"""

from typing import TYPE_CHECKING

from core.pruning.methods import flap, shortgpt, slicegpt
from core.pruning.planning import DecideStep, plan_step
from core.settings.prune import PruneSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def decision_of(settings: PruneSettings, config: "PreTrainedConfig") -> DecideStep:
    """Return what decides a step of a method on the model that ``config`` describes.

    That is ``plan_step`` where the method has no rule of its own.
    """
    match settings.method:
        case "flap":
            return flap.plan_step
        case "shortgpt":
            return shortgpt.plan_step
        case "slicegpt":
            return slicegpt.slicing_step(config)
        case _:
            return plan_step
