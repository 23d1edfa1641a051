"""How a run is divided into phases: sizes, training tokens, optimizer steps (section 3.2, eq. 11)."""

import math
from typing import Literal

MAX_STEP_SHARE = 0.05
"""Largest share of parameters that steps remove on average, as importance changes with what is removed."""


def phase_sizes(
    base_params: int, target_params: int, phases: int, kind: Literal["geometric", "linear"]
) -> tuple[int, ...]:
    """Return the parameter count that each phase ends at.

    Args:
        base_params: |M|, parameters of the dense model.
        target_params: Parameters after the last phase.
        phases: N_P.
        kind: ``geometric``: phase i ends at |M| * P^i with P = (target / |M|)^(1 / N_P), as in the paper;
            ``linear``: all phases remove the same number of parameters.

    Returns:
        One count per phase; the last one is the target.
    """
    sizes = []
    for phase in range(1, phases + 1):
        share = phase / phases
        if kind == "geometric":
            sizes.append(round(base_params * (target_params / base_params) ** share))
        else:
            sizes.append(round(base_params + (target_params - base_params) * share))
    sizes[-1] = target_params
    return tuple(sizes)


def pruning_steps(before_params: int, target_params: int, setting: int = 0) -> int:
    """Return the number of pruning steps of a phase.

    Args:
        before_params: Parameters before the phase.
        target_params: Parameters after it.
        setting: ``prune.steps_per_phase``; 0 keeps their mean within ``MAX_STEP_SHARE``.
    """
    return setting or max(1, math.ceil((1 - target_params / before_params) / MAX_STEP_SHARE - 1e-9))


def phase_shares(phases: int) -> tuple[float, ...]:
    """Return each phase's share of the training tokens: 2(i+1) / (T(T+1)) for i from 0, T = N_P (eq. 11)."""
    return tuple(2 * (i + 1) / (phases * (phases + 1)) for i in range(phases))


def phase_steps(total_steps: int, phases: int) -> tuple[int, ...]:
    """Split optimizer steps over the phases by ``phase_shares``; the last phase takes the remainder.

    Every phase gets at least one step if there are enough.
    """
    if total_steps < phases:
        return (0,) * (phases - 1) + (total_steps,)
    steps = [max(1, int(total_steps * share)) for share in phase_shares(phases)[:-1]]
    return (*steps, total_steps - sum(steps))
