"""Compiled layers of unequal size: few graphs, and the numbers of what is not compiled, to rounding."""

import functools

import pytest
import torch
from transformers import modeling_utils

from core.errors import SettingsError
from core.model.build import build_model
from core.model.config import config_with_layers
from core.model.shape import LayerShape
from core.training import compilation
from core.training.compilation import check_compiler
from core.training.parallel.launch import run_ranks
from core.training.parallel.ranks import Ranks
from core.training.recover import recover
from core.training.rows import Rows
from core.training.state import read_state, state_tensors, write_state
from tests.support.models import CONFIGS, UNEQUAL, random_tokens
from tests.support.training import HostCopies, training_settings, weights
from tests.training import test_ranks
from tests.training.test_ranks import forkserver  # noqa: F401

# More than torch compiles anew before it gives up; two of them have 3 query heads to a KV head.
HEADS = [(2 * number, number) for number in (2, 3, 4, 2, 4, 3, 2, 3)] + [(6, 2), (9, 3)]
TEN = tuple(
    LayerShape(query_heads=query, kv_heads=kv, mlp_width=5 + 3 * index)
    for index, (query, kv) in enumerate(HEADS)
)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(layers, steps=2, **changes):
    torch.manual_seed(0)
    config = CONFIGS["llama-tied"]()
    config.num_hidden_layers = len(layers)
    model = build_model(config_with_layers(config, layers))
    tokens = random_tokens(rows=4 * steps)
    starts = torch.zeros_like(tokens)
    starts[:, [0, 5]] = 1
    rows = Rows(tokens, torch.ones_like(tokens), starts)
    options = {name: changes.pop(name) for name in ("save", "resume_from") if name in changes}
    settings = training_settings(micro_batch=2, **changes)
    report = recover(
        model, rows, settings, held_out=rows.part(0, 3), first_step=0, total_steps=steps, **options
    )
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    return [loss for _, loss, _ in report.losses], weights(model), report


@pytest.mark.slow
def test_ten_unequal_layers_take_two_graphs(monkeypatch):
    monkeypatch.setattr(compilation, "_BACKEND", "eager")
    expected, of_eager, alone = train(TEN)
    losses, found, report = train(TEN, compile=True)
    assert (alone.compilations, report.compilations) == (None, 2), "2 query heads to a KV head, or 3"
    assert losses == expected
    assert torch.equal(found, of_eager)
    assert report.series["held_out_loss"] == alone.series["held_out_loss"]


@pytest.mark.slow
def test_compiled_training_is_that_of_eager_to_rounding_and_resumes_bit_for_bit(monkeypatch, tmp_path):
    monkeypatch.setattr(modeling_utils, "save_on_cpu", HostCopies)
    frugal = dict(steps=4, gradient_checkpointing=True, layer_inputs="host")
    expected, _, _ = train(UNEQUAL, **frugal)
    models, build = [], build_model

    def built(config):
        models.append(build(config))
        return models[-1]

    def save(optimizer, progress):
        if len(progress.losses) == 2:
            write_state(tmp_path / "state", state_tensors(models[-1], optimizer), progress, belongs_to={})

    monkeypatch.setitem(train.__globals__, "build_model", built)
    losses, found, report = train(UNEQUAL, compile=True, save=save, **frugal)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert 1 <= report.compilations <= 4
    torch._dynamo.reset()
    again, same, _ = train(UNEQUAL, compile=True, resume_from=read_state(tmp_path / "state"), **frugal)
    assert again == losses
    assert torch.equal(same, found)


def train_compiled(rank, size, sharded):
    compilation._BACKEND = "eager"
    return test_ranks.train(Ranks(rank=rank, size=size, sharded=sharded), "llama-tied", compile=True)


@pytest.mark.slow
def test_compiled_layers_of_ranks_compute_what_one_process_does():
    losses, norms, of_one, _ = test_ranks.train(Ranks(), "llama-tied")
    work = functools.partial(train_compiled, size=2, sharded=True)
    found = run_ranks(work, 2, "cpu", method="forkserver")
    assert found[0] == pytest.approx(losses, rel=1e-12)
    assert found[1] == pytest.approx(norms, rel=1e-11)
    assert found[2] == pytest.approx(of_one, rel=1e-8, abs=1e-11)


def test_a_machine_without_a_compiler_is_one_line(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no\ncompiler")

    monkeypatch.setattr(compilation, "_BACKEND", broken)
    with pytest.raises(SettingsError, match=r"does not work here: .*no compiler.* Install g\+\+"):
        check_compiler(torch.device("cpu"))
    monkeypatch.setattr(compilation, "_BACKEND", "eager")
    check_compiler(torch.device("cpu"))


def test_adapters_are_not_compiled():
    with pytest.raises(SettingsError, match=r"compile=true is not for adapters \(lora_rank=2\)"):
        training_settings(compile=True, lora_rank=2)
