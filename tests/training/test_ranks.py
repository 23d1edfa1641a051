"""Training by several processes, by gloo: the numbers of one process, and one error when one fails."""

import functools
import multiprocessing

import pytest
import torch
from transformers import modeling_utils

from core.training.adapters import add_adapters
from core.training.objective import Teacher
from core.training.parallel.launch import run_ranks
from core.training.parallel.ranks import Ranks
from core.training.parallel.sharding import shard
from core.training.recover import recover
from core.training.rows import Rows
from tests.support.models import UNEQUAL, random_tokens, tiny
from tests.support.training import HostCopies, training_settings

CPU = torch.device("cpu")
STEPS = 3
FAMILIES = ("llama", "llama-tied", "gemma2")


@pytest.fixture(scope="module", autouse=True)
def forkserver():
    """Ranks that start at once: they are forked from a process that has imported everything."""
    multiprocessing.set_forkserver_preload(
        ["tests.training.test_ranks", "transformers.models.llama.modeling_llama"]
    )


def rows():
    tokens = random_tokens(rows=8 * STEPS)
    mask = (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) > 0.4).int()
    mask[:2] = 0  # a rank of 4 has no trained token in the first batch
    starts = torch.zeros_like(tokens)
    starts[:, [0, 5]] = 1
    return Rows(tokens, mask, starts)


def train(ranks, family, dtype=torch.float64, **changes):
    """Train a tiny model and return the losses, the norms and the weights."""
    model = tiny(family, UNEQUAL, dtype=dtype)
    teacher = None
    if "teacher" in changes:
        dense = tiny(family, dtype=dtype, seed=1).requires_grad_(False)
        temperature, hidden = changes["temperature"], changes["hidden_weight"]
        teacher = Teacher(model=dense, weight=0.5, temperature=temperature, hidden_weight=hidden)
    if "lora_rank" in changes:
        torch.manual_seed(0)
        add_adapters(model, changes["lora_rank"])
    if ranks.sharded:
        shard(model, CPU, ranks.size, bfloat16=changes.get("precision") == "bfloat16")
    norms = []

    class Noting(Ranks):
        def clip_gradients(self, parameters, limit):
            norms.append(super().clip_gradients(parameters, limit).item())
            return torch.tensor(norms[-1])

    modeling_utils.save_on_cpu = HostCopies
    settings = training_settings(global_batch=8, micro_batch=2, **changes)
    ranks = Noting(rank=ranks.rank, size=ranks.size, sharded=ranks.sharded)
    report = recover(model, rows(), settings, teacher=teacher, first_step=0, total_steps=100, ranks=ranks)
    whole = [p.full_tensor() if ranks.sharded else p.detach() for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in whole]).tolist()
    return [x for _, x, _ in report.losses], norms, flat, report.trained_tokens


def train_all(rank, size, sharded, cases):
    ranks = Ranks(rank=rank, size=size, sharded=sharded)
    return [train(ranks, family, **changes) for family, changes in cases]


CASES = [
    ("llama", {}),
    ("llama-tied", {"gradient_checkpointing": True, "layer_inputs": "host"}),
    ("gemma2", {"max_grad_norm": 0}),
    ("llama", {"teacher": "base", "temperature": 2.0, "hidden_weight": 0.5}),
    ("llama-tied", {"dtype": torch.float32}),
    ("llama", {"dtype": torch.float32, "precision": "bfloat16"}),
    ("llama", {"lora_rank": 2}),  # the last one: adapters are not sharded
]
TOLERANCES = [1e-12, 1e-12, 1e-12, 1e-12, 1e-5, 1e-2, 1e-12]


@pytest.fixture(scope="module")
def alone():
    return train_all(0, 1, False, CASES)


@pytest.mark.parametrize(("size", "sharded"), [(2, False), (4, True)])
def test_losses_norms_and_weights_are_those_of_one_process(alone, size, sharded):
    cases = CASES[:-1] if sharded else CASES
    work = functools.partial(train_all, size=size, sharded=sharded, cases=cases)
    found = run_ranks(work, size, "cpu", method="forkserver")
    for got, of_one, tolerance in zip(found, alone, TOLERANCES, strict=False):
        (losses, norms, weights, tokens), (expected, wanted_norms, wanted, counted) = got, of_one
        assert losses == pytest.approx(expected, rel=tolerance)
        assert norms == pytest.approx(wanted_norms, rel=10 * tolerance)
        if (
            tolerance < 1e-9
        ):  # Adam's first steps have the size of the learning rate, whatever a gradient's is
            assert weights == pytest.approx(wanted, rel=1e-8, abs=1e-11)
        assert tokens == counted
