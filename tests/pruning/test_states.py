import math

import pytest
import torch

from core.errors import StorageError
from core.pruning.scoring.batching import fitting_micro_batch
from core.pruning.scoring.calibration import measure
from core.pruning.scoring.copies import Copies
from core.pruning.scoring.layer_inputs import LayerInputs, share_out
from tests.support.models import CONFIGS, UNEQUAL, random_tokens, tiny


def layer_inputs(layers, shape, *, host_bytes, scratch):
    room = share_out(layers, 4 * math.prod(shape), crosses=False, device_bytes=0, host_bytes=host_bytes)
    return LayerInputs(
        layers,
        shape,
        torch.float32,
        room=room,
        device=torch.device("cpu"),
        copies=Copies(),
        scratch=scratch,
    )


def test_what_exceeds_the_limit_lies_on_disk_until_it_is_taken(tmp_path):
    inputs = layer_inputs(3, (4, 5, 10), host_bytes=1000, scratch=tmp_path)  # 800 a layer
    states = {(layer, first): torch.randn(2, 5, 10) for layer in range(3) for first in (0, 2)}
    for (layer, first), state in states.items():
        inputs.put(layer, slice(first, first + 2), state)
    assert len(list(tmp_path.iterdir())) == 4
    for layer in (2, 1, 0):
        for first in (0, 2):
            assert torch.equal(inputs.take(layer, slice(first, first + 2))(), states[layer, first])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_do_not_depend_on_where_the_layers_inputs_lie(dtype, tmp_path):
    model, tokens = tiny("llama", dtype=dtype), random_tokens(rows=5)
    expected = measure(model, tokens, micro_batch=2)
    found = measure(model, tokens, micro_batch=2, state_bytes=0, scratch=tmp_path)
    assert torch.equal(found.similarities, expected.similarities)
    assert torch.equal(found.scores[1].mlp_channels, expected.scores[1].mlp_channels)
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_folder_that_takes_nothing_is_named(tmp_path):
    inputs = layer_inputs(1, (2, 1, 3), host_bytes=0, scratch=tmp_path / "missing")
    with pytest.raises(StorageError, match=r"layer-000-000001\.safetensors cannot be written .*state_memory"):
        inputs.put(0, slice(1, 2), torch.randn(1, 1, 3))


def fitting(sequences, length, free_bytes):
    device = torch.device("cpu")
    config = CONFIGS["llama"]()
    return fitting_micro_batch(config, (sequences, length), device=device, free_bytes=free_bytes)


def test_micro_batches_share_the_sequences_out_evenly():
    assert fitting(512, 64, 2**40) == 32  # 2,048 tokens
    assert fitting(40, 64, 2**40) == 20  # not 32 and 8
    assert fitting(3, 64, 2**40) == 3


def test_little_memory_means_small_micro_batches():
    a_lot, some, little = fitting(512, 64, 2**40), fitting(512, 64, 2**25), fitting(512, 64, 2**16)
    assert a_lot > some > little == 1
    assert fitting(512, 4096, 2**40) == 1


@pytest.mark.parametrize("layers", [None, UNEQUAL])
def test_a_micro_batch_fits_into_a_quarter_of_the_free_memory(layers):
    """In float32, a token: 16 hidden states, 8 MLP widths, 8 heads of 10, 3 rows of attention weights."""
    config = tiny("llama", layers).config
    a_sequence = 100 * 4 * (16 * 48 + 8 * 40 + 8 * 6 * 10 + 3 * 6 * 100)
    for size in (1, 2, 5, 11):
        for free_bytes, expected in ((4 * size * a_sequence, size), (4 * (size + 1) * a_sequence - 4, size)):
            found = fitting_micro_batch(config, (11, 100), device=torch.device("cpu"), free_bytes=free_bytes)
            assert -(-11 // found) == -(-11 // min(expected, 11))
            assert found <= expected
