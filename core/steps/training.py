"""A training from its job to the weights: it resumes from its last state, by this process or by ranks."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from core.model.build import load_model, pick_device
from core.steps.footprint import explaining_memory
from core.training.adapters import add_adapters
from core.training.job import TrainingJob, train_here
from core.training.parallel.nodes import Meeting, newest_of_all
from core.training.parallel.training import recover_by_ranks

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

EXPLAINING = functools.partial(
    explaining_memory, "training.micro_batch=0 or lower, or training.gradient_checkpointing=true"
)
"""What ``TrainingJob`` wants to turn running out of memory into one line."""

_OfOptimizer = Callable[["PreTrainedModel", "Optimizer"], None]


def train(
    job: TrainingJob,
    meeting: Meeting,
    *,
    carry: _OfOptimizer | None = None,
    hand_on: _OfOptimizer | None = None,
) -> "tuple[PreTrainedModel, dict[str, Any]]":
    """Train what a job says.

    Args:
        job: The training.
        meeting: The nodes that train; only the first one's model has the trained weights.
        carry: See ``recover``; gets the model, too.
        hand_on: See ``recover``; gets the model, too.

    Returns:
        The model in float32, adapters added to its weights; and figures for the step's report.
    """
    place = pick_device() if job.ranks == 1 else "cpu"  # the ranks have the devices
    network = load_model(job.checkpoint, dtype=torch.float32, device=place)
    adapters = None
    if job.settings.lora_rank:
        torch.manual_seed(job.seed)
        adapters = add_adapters(network, job.settings.lora_rank)
    given = None if carry is None else functools.partial(carry, network)
    taken = None if hand_on is None else functools.partial(hand_on, network)
    with job.states() as states:
        found = newest_of_all(meeting, states, network, first_step=job.first_step)
        if job.ranks > 1:
            trained = recover_by_ranks(
                job, network, carry=given, resume_from=found, hand_on=taken, meeting=meeting
            )
        else:
            save = functools.partial(states.save, network)
            with job.explaining():
                trained = train_here(job, network, carry=given, resume_from=found, save=save, hand_on=taken)
    if adapters is not None:
        adapters.merge_and_unload()
    return network, {
        "losses": trained.losses,
        "series": trained.series,
        "tokens": trained.tokens,
        "trained_tokens": trained.trained_tokens,
        "tokens_per_s": trained.tokens_per_s,
        "compilations": trained.compilations,
        "accelerators": job.ranks if job.device != "cpu" else 0,
        "seconds": found.progress.seconds if found else 0.0,
    }
