"""What a pruning method does in its own way; everything else follows from settings.

Which settings a method decides is in ``core.settings.methods``: the criterion, the repair, one step a phase.
Calibration, surgery, checkpoints, training and evaluation are the same for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from core.pruning.methods import flap, shortgpt
from core.pruning.planning import DecideStep, plan_step
from core.settings.methods import MethodName
from core.settings.prune import PruneSettings


@dataclass(frozen=True, kw_only=True)
class Method:
    """The rules of a method.

    Attributes:
        step: Decides a pruning step from the statistics.
    """

    step: DecideStep = plan_step


_METHODS: Mapping[MethodName, Method] = {
    "flap": Method(step=flap.plan_step),
    "shortgpt": Method(step=shortgpt.plan_step),
}


def method_of(settings: PruneSettings) -> Method:
    """Return the rules of the method of a run: those of Adapt-Pruner where it has none of its own."""
    return _METHODS.get(settings.method, Method())
