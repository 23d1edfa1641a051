"""Which kernels compute the attention of what is trained."""

import contextlib
import dataclasses
import functools
import logging
import sys

import pytest
import torch
from transformers import PreTrainedModel

from core.errors import SettingsError
from core.model.decoder import FLASH
from core.training import attention, job
from core.training import recover as training
from core.training.attention import attention_of
from core.training.objective import Teacher
from core.training.rows import Rows, documents_of
from tests.support import flash_attention
from tests.support.models import UNEQUAL, random_tokens, tiny
from tests.support.training import training_settings

TOKENS = random_tokens(rows=8)
STARTS = torch.zeros_like(TOKENS)
STARTS[:, 0] = STARTS[:, 5] = STARTS[2::2, 6] = 1


def way_of(model):
    return model.config._attn_implementation


@pytest.fixture
def on_gpu(monkeypatch):
    """Models say that they are on one, and flash-attn is there."""
    monkeypatch.setattr(PreTrainedModel, "device", property(lambda _: torch.device("cuda")))
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(attention, "has_native_bfloat16", lambda: True)
    flash_attention.install(monkeypatch)


def test_documents_are_where_they_begin_and_each_row_begins_one():
    starts = torch.tensor([[0, 0, 1, 0], [1, 1, 0, 0]])
    positions, edges = documents_of(starts)
    assert positions.tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    assert edges.tolist() == [0, 2, 4, 5, 8]
    assert edges.dtype == torch.int32
    assert starts[0, 0] == 0, "what it was given is left alone"


def test_training_by_flash_attention_is_that_of_torch_but_for_rounding(monkeypatch):
    monkeypatch.setattr(attention, "_obstacle", lambda *_: "")
    flash_attention.install(monkeypatch)
    formats = set()
    computed = flash_attention.flash_attn_varlen_func

    @functools.wraps(computed)  # transformers looks at its parameters
    def seen(q, *args, **kwargs):
        formats.add(q.dtype)
        return computed(q, *args, **kwargs)

    monkeypatch.setattr("flash_attn.flash_attn_varlen_func", seen)
    losses = []
    for way in ("torch", "auto"):
        model, base = tiny("gemma2", UNEQUAL).float(), tiny("gemma2", seed=2).bfloat16()
        teacher = Teacher(model=base, weight=0.5, temperature=1.0)
        settings = training_settings(precision="bfloat16", attention=way, micro_batch=2)
        rows = Rows(TOKENS, torch.ones_like(TOKENS), STARTS)
        before = way_of(model)
        with attention_of(settings, model, teacher.model):
            assert (way_of(model) == FLASH) == (way_of(base) == FLASH) == (way == "auto")
            report = training.recover(model, rows, settings, teacher=teacher, first_step=0, total_steps=9)
        assert way_of(model) == before
        losses.append([loss for _, loss, _ in report.losses])
    assert formats == {torch.bfloat16}, "flash-attn takes no float32"
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0] != losses[1]


def test_models_are_left_as_they_were_after_an_error(on_gpu):
    model = tiny("llama")
    before = way_of(model)
    settings = training_settings(precision="bfloat16")
    with pytest.raises(RuntimeError, match=FLASH), attention_of(settings, model, None):
        raise RuntimeError(way_of(model))
    assert way_of(model) == before


@pytest.mark.parametrize("way", ["auto", "torch"])
def test_the_training_of_a_step_computes_it_as_the_settings_say(way, on_gpu, monkeypatch, tmp_path):
    model, base, seen = tiny("llama"), tiny("llama", seed=2), []
    before = way_of(model)
    settings = training_settings(precision="bfloat16", attention=way, teacher="base")
    given = dict.fromkeys((field.name for field in dataclasses.fields(job.TrainingJob)), None)
    monkeypatch.setattr(job, "load_teacher", lambda *_: Teacher(model=base, weight=0.5, temperature=1.0))
    monkeypatch.setattr(job, "read_rows", lambda *_: None)
    monkeypatch.setattr(job, "recover", lambda *_, **__: seen.extend([way_of(model), way_of(base)]))
    job.train_here(job.TrainingJob(**given | {"settings": settings, "seed": 1}), model)
    assert seen == [FLASH if way == "auto" else before] * 2
    assert way_of(model) == way_of(base) == before


@pytest.mark.parametrize("other", ["gradient_checkpointing", pytest.param("compile", marks=pytest.mark.slow)])
def test_it_goes_with_what_saves_memory_and_time(other, monkeypatch):
    monkeypatch.setattr(attention, "_obstacle", lambda *_: "")
    flash_attention.install(monkeypatch)
    losses = []
    for changes in ({}, {other: True}):
        model = tiny("llama", UNEQUAL).float()
        settings = training_settings(precision="bfloat16", micro_batch=2, **changes)
        rows = Rows(TOKENS, torch.ones_like(TOKENS), STARTS)
        with attention_of(settings, model):
            report = training.recover(model, rows, settings, first_step=0, total_steps=9)
        losses.append([loss for _, loss, _ in report.losses])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize(
    ("obstacle", "said"),
    [
        ("cpu", "it needs a GPU"),
        ("package", "the package flash-attn is not installed"),
        ("build", "the package flash-attn cannot be imported"),
        ("emulated", "it needs a GPU that computes in bfloat16 itself"),
        ("precision", "training.precision is float32"),
        ("family", "transformers has none for llama"),
    ],
)
def test_where_it_cannot_be_had_torch_does_it_or_an_error_says_why(
    obstacle, said, on_gpu, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "core")
    model = tiny("llama")
    if obstacle == "cpu":
        monkeypatch.setattr(PreTrainedModel, "device", property(lambda _: torch.device("cpu")))
    if obstacle == "package":
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    if obstacle == "build":
        monkeypatch.setitem(sys.modules, "flash_attn", None)
    if obstacle == "emulated":
        monkeypatch.setattr(attention, "has_native_bfloat16", lambda: False)
    if obstacle == "family":
        monkeypatch.setattr(PreTrainedModel, "_supports_flash_attn", False)
        monkeypatch.setattr(type(model), "_supports_flash_attn", False)
    precision = "float32" if obstacle == "precision" else "bfloat16"
    with attention_of(training_settings(precision=precision), model):
        assert way_of(model) != FLASH
    assert (said in caplog.text) == (obstacle != "package"), "it is said where it was installed"
    with pytest.raises(SettingsError) as caught, contextlib.ExitStack() as stack:
        stack.enter_context(attention_of(training_settings(precision=precision, attention="flash"), model))
    (line,) = str(caught.value).splitlines()
    assert obstacle == "precision" or line.startswith(f"training.attention=flash, but {said}")
    assert "Set " in line
