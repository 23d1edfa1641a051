"""Which rules a pruning method decides its steps by; everything else follows from settings.

Which settings a method decides is in ``core.settings.methods``: the criterion, the repair, one step a phase.
Calibration, surgery, checkpoints, training and evaluation are the same for all.
"""

from collections.abc import Callable

from core.pruning.methods import flap, minitron, sheared_llama, shortgpt, slicegpt
from core.pruning.methods.opened import OpenedModel
from core.pruning.planning import DecideStep, plan_step
from core.pruning.widths.search import WidthSearch, measured_tokens
from core.settings.prune import PruneSettings


def decision_of(settings: PruneSettings, opened: Callable[[], OpenedModel]) -> DecideStep:
    """Return what decides a step of a method; ``plan_step`` where it has no rule of its own.

    Args:
        settings: As they apply.
        opened: Opens the model that the phase begins with, for decisions that statistics do not give.
    """
    match settings.method:
        case "flap":
            return flap.plan_step
        case "shortgpt":
            return shortgpt.plan_step
        case "minitron" if settings.narrows:
            return minitron.width_decision(opened())
        case "minitron-depth":
            return minitron.depth_decision(opened())
        case "slicegpt":
            return slicegpt.slicing_decision(opened())
        case "sheared-llama":
            return sheared_llama.masking_decision(opened())
    if settings.widths == "search":
        given = opened()
        return WidthSearch(
            given.model.model, measured_tokens(given.tokens), batch_size=given.micro_batch
        ).step
    return plan_step
