"""Ranks are started together, and end together: with one error, or with the process that started them."""

import functools
import logging
import os
import signal

import pytest
import torch
import torch.distributed as dist

from core.errors import OutOfMemoryError, TrainingError
from core.training.parallel.launch import run_ranks
from tests.training.test_ranks import forkserver  # noqa: F401

log = logging.getLogger("core.of_a_rank")


def fail(rank, how):
    """Fail on rank 1 in some way, while the others wait for it."""
    log.info("rank %d begins", rank)
    dist.barrier()  # one that ends at once may do so before the other has heard of it
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "ended":
            os._exit(7)
        elif how == "ours":
            raise OutOfMemoryError("out of memory: set something.")
        elif how == "theirs":
            raise KeyError("lost")
    dist.all_reduce(torch.ones(1))
    dist.barrier()
    return [rank, how]


ERRORS = {
    "killed": (TrainingError, r"^rank 1 of 2 was ended by SIGKILL, as .* memory .*resumes"),
    "ended": (TrainingError, r"^rank 1 of 2 was ended with status 7. Its last lines"),
    "ours": (OutOfMemoryError, r"^out of memory: set something\.$"),
    "theirs": (TrainingError, r"^rank 1 of 2 has failed: KeyError: 'lost'\.$"),
}


@pytest.mark.parametrize("how", ERRORS)
def test_a_rank_that_fails_ends_all_with_one_error(how, caplog):
    caplog.set_level(logging.INFO, "core")
    kind, told = ERRORS[how]
    with pytest.raises(kind, match=told):
        run_ranks(functools.partial(fail, how=how), 2, "cpu", method="forkserver")
    assert "rank 0 begins" in caplog.text
    assert "rank 1 begins" not in caplog.text
    assert ("in fail" in caplog.text) == (how == "theirs"), "a traceback of what is not meant for users"


def test_the_result_is_that_of_rank_0():
    assert run_ranks(functools.partial(fail, how=""), 2, "cpu", method="forkserver") == [0, ""]
