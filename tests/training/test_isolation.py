"""Documents in one row do not see each other: as if each stood alone, in every family."""

import json

import numpy as np
import pytest
import torch

from core.data.packing import Tokenized
from core.data.whole_packing import pack_whole
from core.errors import SettingsError
from core.model.config import load_config, moving_frequencies_from
from core.model.decoder import FLASH, final_states
from core.model.loss import loss_gradient
from core.training import recover as training
from core.training.rows import Rows, documents_of
from tests.support.flash_attention import install
from tests.support.models import CONFIGS, LLAMA3, UNEQUAL, Float64Throughout, random_tokens, tiny
from tests.support.project import recipe_with, resolve
from tests.support.training import training_settings, weights

SIZES = ((9, 1, 6), (4, 12), (16,), (3, 2, 8))
"""Documents of each row, of 16 tokens with their padding; some overrun the sliding windows of 5 tokens."""
LENGTH = 16


def rows_of(sizes, seed=1):
    """Return the packed rows, as tensors, and the documents of each row."""
    rng = np.random.default_rng(seed)
    documents = [
        [
            Tokenized(rng.integers(3, 101, n).astype(np.int32), rng.integers(0, 2, n).astype(np.uint8))
            for n in row
        ]
        for row in sizes
    ]
    packed = [next(pack_whole(row, LENGTH, opening=[], padding=2, held=1)) for row in documents]
    return [torch.from_numpy(np.stack(values)) for values in list(zip(*packed, strict=True))[:3]], documents


def alone(document):
    return torch.from_numpy(document.ids).long()[None], torch.from_numpy(document.trained)[None]


def ways_of_attention(model):
    yield "eager"
    if model._supports_sdpa:  # Gemma 2's soft caps are beyond it
        yield "sdpa"
    assert model._supports_flash_attn
    yield FLASH


@pytest.fixture(autouse=True)
def flash_attention(monkeypatch):
    install(monkeypatch)


@pytest.mark.parametrize("layers", [None, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_gives_each_document_the_logits_that_it_has_alone(name, layers):
    model = tiny(name, layers)
    (ids, _, starts), documents = rows_of(SIZES)
    held = documents_of(starts)
    for way in ways_of_attention(model):
        model.set_attn_implementation(way)
        with torch.no_grad(), Float64Throughout():
            packed = model.lm_head(final_states(model, ids.long(), held))
            for row, parts in enumerate(documents):
                first = 0
                for document in parts:
                    expected = model.lm_head(final_states(model, alone(document)[0]))[0]
                    found = packed[row, first : first + len(document.ids)]
                    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
                    first += len(document.ids)


@pytest.mark.parametrize("flash", [False, True], ids=["torch", "flash"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_of_packed_rows_are_the_sums_of_those_alone(name, flash):
    packed, apart = tiny(name, UNEQUAL), tiny(name, UNEQUAL)
    if flash:
        packed.set_attn_implementation(FLASH)
    (ids, trained, starts), documents = rows_of(SIZES)
    total = 0.0
    with Float64Throughout():
        states = final_states(packed, ids.long(), documents_of(starts))
        loss, gradient = loss_gradient(packed, states, ids.long(), scale=1.0, trained=trained)
        states.backward(gradient)
        for document in (document for row in documents for document in row):
            tokens, mask = alone(document)
            states = final_states(apart, tokens)
            of_one, gradient = loss_gradient(apart, states, tokens, scale=1.0, trained=mask)
            states.backward(gradient)
            total += of_one.item()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    for (name, ours), theirs in zip(packed.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_training_on_packed_rows_is_training_on_their_documents():
    """One step gives the same weights whether documents share rows or have one each."""
    (ids, trained, starts), documents = rows_of(SIZES)
    parts = [document for row in documents for document in row]
    padded = [torch.full((len(parts), LENGTH), 2), torch.zeros(len(parts), LENGTH, dtype=torch.uint8)]
    for row, document in enumerate(parts):
        for tensor, values in zip(padded, document[:2], strict=True):
            tensor[row, : len(values)] = torch.from_numpy(values)
    models = [tiny("qwen2", UNEQUAL) for _ in range(2)]
    for model, tensors, batch, begins in (
        (models[0], (ids, trained), len(ids), starts),
        (models[1], padded, len(parts), None),
    ):
        settings = training_settings(sequence_length=LENGTH, global_batch=batch, micro_batch=1)
        report = training.recover(model, Rows(*tensors, begins), settings, first_step=0, total_steps=9)
        assert report.trained_tokens == sum(int(document.trained[1:].sum()) for document in parts)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-7, atol=1e-9)


def test_rows_of_one_document_give_what_rows_without_documents_give():
    tokens = random_tokens(rows=4)
    starts = torch.zeros_like(tokens)
    starts[:, 0] = 1
    models = [tiny("llama") for _ in range(2)]
    for model, begins in zip(models, (None, starts), strict=True):
        training.recover(
            model,
            Rows(tokens, torch.ones_like(tokens), begins),
            training_settings(),
            first_step=0,
            total_steps=9,
        )
    assert torch.equal(weights(models[0]), weights(models[1]))


FACTORS = {"rope_theta": 1e4, "short_factor": [1.0] * 5, "long_factor": [2.0] * 5}


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, None),
        (LLAMA3, None),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 31),
        ({"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 16}, 16),
    ],
)
def test_documents_whose_frequencies_depend_on_their_neighbours_are_refused(folder, rope, limit):
    place = folder / "base" / "config.json"
    config = json.loads(place.read_text())
    if rope is not None:
        config |= {"rope_parameters": rope, "max_position_embeddings": 31}
    place.write_text(json.dumps(config))
    assert moving_frequencies_from(load_config(folder / "base")) == limit
    if limit is None:
        resolve(recipe_with({}))
        return
    with pytest.raises(SettingsError, match=rf"Set at most {limit}, or training\.packing=cut"):
        resolve(recipe_with({}))
    resolve(recipe_with({"training.packing": "cut"}))
    resolve(recipe_with({"training.tokens": "0", "training.sources": []}))
