"""Which kernels compute the attention of what is trained."""

import functools

import pytest
import torch
from transformers import PreTrainedModel

from core.errors import SettingsError
from core.model.decoder import FLASH
from core.training import attention
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


@pytest.mark.parametrize(
    ("obstacle", "said"),
    [
        ("cpu", "it needs a GPU"),
        ("package", "the package flash-attn is not installed"),
        ("precision", "it needs training.precision=bfloat16, which is float32"),
        ("family", "transformers has none for llama"),
    ],
)
def test_where_it_cannot_be_had_torch_does_it_or_an_error_says_why(obstacle, said, on_gpu, monkeypatch):
    model = tiny("llama")
    if obstacle == "cpu":
        monkeypatch.setattr(PreTrainedModel, "device", property(lambda _: torch.device("cpu")))
    if obstacle == "package":
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    if obstacle == "family":
        monkeypatch.setattr(PreTrainedModel, "_supports_flash_attn", False)
        monkeypatch.setattr(type(model), "_supports_flash_attn", False)
    precision = "float32" if obstacle == "precision" else "bfloat16"
    with attention_of(training_settings(precision=precision), model):
        assert way_of(model) != FLASH
    asked = training_settings(precision=precision, attention="flash")
    expected = f"training.attention=flash, but {said}. Set training.attention"
    with pytest.raises(SettingsError, match=expected), attention_of(asked, model):
        raise AssertionError("it has begun")
