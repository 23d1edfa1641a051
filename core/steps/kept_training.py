"""The states of what a method trains before it decides, kept like those of a recovery training."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.training.resume import SavedStates

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer


class KeptStates:
    """See ``core.pruning.methods.opened.KeptTraining``."""

    def __init__(self, states: SavedStates) -> None:
        """Keep them there."""
        self._states = states

    def restore(self, learner: "Module", optimizer: "Optimizer") -> tuple[list[float], float]:
        """Load the newest state that fits; see ``SavedStates.newest``."""
        from core.training.state import restore_state

        state = self._states.newest(learner, first_step=0)
        if state is None:
            return [], 0.0
        done = restore_state(state, learner, optimizer)
        return [loss for _, loss, _ in done.losses], done.seconds

    def save(
        self, learner: "Module", optimizer: "Optimizer", losses: Sequence[float], seconds: float
    ) -> None:
        """Save the state, if one is due; see ``SavedStates.save``."""
        from core.training.state import TrainingProgress

        rate = float(optimizer.param_groups[0]["lr"])
        steps = [(step, loss, rate) for step, loss in enumerate(losses)]
        self._states.save(learner, optimizer, TrainingProgress(losses=steps, seconds=seconds))


@contextlib.contextmanager
def kept_states(uri: str, folder: Path, belongs_to: Mapping[str, str]) -> Iterator[KeptStates]:
    """Keep the states of a training at a place in the store; wait in the end for the one under way.

    Args:
        uri: Holds nothing else.
        folder: Holds one state.
        belongs_to: What the training starts from; a state of something else is not used.
    """
    with SavedStates(uri, folder, every=None, belongs_to=belongs_to) as states:
        yield KeptStates(states)
