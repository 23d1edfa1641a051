"""The processes that train together, as the training loop sees them.

A global batch is shared out by rows. Each rank adds up the gradients of its rows, scaled by the number of
trained tokens of the *global* batch; the sum over all ranks is then the gradient that one process would have.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from core.training.rows import Rows


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together; without arguments it trains alone.

    Attributes:
        rank: Its number, from 0. Rank 0 reports and publishes.
        size: How many there are.
        sharded: Whether each holds a part of weights, gradients and moments: ``shard`` has been called.
            Otherwise each holds all of them.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False

    def share(self, batch: Rows) -> Rows:
        """Return this rank's rows of a global batch, which their number divides."""
        mine = len(batch.input_ids) // self.size
        return batch.part(self.rank * mine, mine)

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a value over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def clip_gradients(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        """Add up the gradients over all ranks and clip them to an l2 norm.

        Args:
            parameters: Those of the model.
            limit: The norm; infinity clips nothing.

        Returns:
            The l2 norm of all gradients before: the same on each rank.
        """
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.size > 1 and not self.sharded:  # sharded ones were added up in the backward pass
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                assert work is not None
                work.wait()
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm


ALONE = Ranks()
