import gc
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import LlamaConfig

from core.errors import CheckpointError
from core.model.build import build_model
from core.model.checkpoint import Checkpoint, save_model
from core.model.config import layer_shapes
from core.model.families import family_of
from core.model.layerwise import exceeds_memory, open_streamed
from core.pruning.plan import LayerPlan
from core.pruning.scoring.calibration import measure
from core.pruning.scoring.statistics import Statistics
from core.pruning.surgery import open_pruned, prune_layer, prune_model
from tests.support.models import CONFIGS, UNEQUAL, random_tokens, tiny

TOKENS = random_tokens(rows=5)


def assert_same(found, expected):
    assert found.loss == pytest.approx(expected.loss, abs=1e-12)
    torch.testing.assert_close(found.similarities, expected.similarities, rtol=1e-12, atol=0)
    for a, b in zip(found.scores, expected.scores, strict=True):
        for kind in ("query_heads", "kv_groups", "mlp_channels"):
            torch.testing.assert_close(getattr(a, kind), getattr(b, kind), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_streamed_from_disk_score_like_a_model_in_memory(name, tmp_path):
    model = tiny(name, UNEQUAL)
    save_model(model, tmp_path, companions=None, provenance={})
    assert_same(
        measure(open_streamed(Checkpoint(tmp_path)), TOKENS, micro_batch=2),
        measure(model, TOKENS, micro_batch=2),
    )


@pytest.mark.parametrize("criterion", ["taylor_signed", "fluctuation", "magnitude_l2"])
def test_every_kind_of_criterion_is_streamed(criterion, tmp_path):
    model = tiny("qwen2")
    save_model(model, tmp_path, companions=None, provenance={})
    found = measure(open_streamed(Checkpoint(tmp_path)), TOKENS, micro_batch=2, criterion=criterion)
    assert_same(found, measure(model, TOKENS, micro_batch=2, criterion=criterion))


def test_only_the_layer_in_use_is_in_memory(tmp_path):
    save_model(tiny("llama"), tmp_path, companions=None, provenance={})
    streamed = open_streamed(Checkpoint(tmp_path))

    def in_memory():
        return [not next(layer.parameters()).is_meta for layer in streamed.layers]

    assert in_memory() == [False, False, False]
    with streamed.resident(1):
        assert in_memory() == [False, True, False]
    assert in_memory() == [False, False, False]


PLANS = (
    LayerPlan(query_heads=(0, 1, 4, 5), kv_heads=(0, 2), mlp_channels=(0, 3, 4, 17, 39)),
    LayerPlan(query_heads=(2, 3), kv_heads=(1,), mlp_channels=tuple(range(40))),
    LayerPlan(query_heads=tuple(range(6)), kv_heads=(0, 1, 2), mlp_channels=(38,)),
)


@pytest.mark.parametrize("layers", [None, PLANS], ids=["whole", "cut"])
@pytest.mark.parametrize("streamed", [False, True], ids=["in-memory", "streamed"])
def test_a_measured_model_is_gone_at_once_not_when_garbage_is_collected(layers, streamed, tmp_path):
    save_model(tiny("llama-biased"), tmp_path, companions=None, provenance={})
    models = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(12):
            device = torch.device("cpu")
            layerwise = open_pruned(Checkpoint(tmp_path), layers, device=device, streamed=streamed)
            measure(layerwise, TOKENS, micro_batch=2)
            models.append(weakref.ref(layerwise.model))
            assert sum(model() is not None for model in models) == 1
    finally:
        gc.enable()


def test_layers_are_cut_while_they_are_streamed(tmp_path):
    model = tiny("llama-biased")
    save_model(model, tmp_path, companions=None, provenance={})
    family, shapes = family_of(model.config), layer_shapes(model.config)
    streamed = open_streamed(
        Checkpoint(tmp_path),
        sizes=[plan.shape() for plan in PLANS],
        cut=lambda i, tensors: prune_layer(family, shapes[i], tensors, PLANS[i]),
    )
    expected = measure(prune_model(model, PLANS), TOKENS, micro_batch=2)
    assert_same(measure(streamed, TOKENS, micro_batch=2), expected)


def test_weights_that_do_not_fit_are_refused_when_their_layer_is_loaded(tmp_path):
    save_model(tiny("llama", UNEQUAL), tmp_path, companions=None, provenance={})
    config = json.loads((tmp_path / "config.json").read_text())
    config["per_layer_config"]["2"]["intermediate_size"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.2: weights do not fit config\.json"):
        measure(open_streamed(Checkpoint(tmp_path)), TOKENS, micro_batch=2)


def test_weights_over_half_of_the_free_memory_are_streamed(tmp_path):
    model = tiny("llama-tied", UNEQUAL, dtype=torch.float32)
    save_model(model, tmp_path, companions=None, provenance={})
    weight_bytes = sum(p.nbytes for p in model.parameters())  # tied ones once
    checkpoint = Checkpoint(tmp_path)

    def exceeds(free_bytes, dtype=None):
        return exceeds_memory(checkpoint, dtype=dtype, device=torch.device("cpu"), free_bytes=free_bytes)

    assert not exceeds(2 * weight_bytes)
    assert exceeds(2 * weight_bytes - 1)
    assert not exceeds(weight_bytes, torch.bfloat16)


WITHIN = """
import resource, sys
from pathlib import Path
import torch
from core.model.build import load_model
from core.model.checkpoint import Checkpoint
from core.model.layerwise import open_streamed
from core.pruning.scoring.calibration import measure
from tests.support.models import random_tokens

checkpoint, out, how, allowed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
tokens = random_tokens(rows=2)
# Memory that every process takes before it opens a model does not count.
import transformers.models.llama.modeling_llama, accelerate
now = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + allowed, now + allowed))
model = open_streamed(Checkpoint(checkpoint)) if how == "streamed" else load_model(checkpoint)
measure(model, tokens, micro_batch=1).save(out)
"""


@pytest.mark.slow
def test_a_model_larger_than_the_memory_is_scored(tmp_path):
    sizes = dict(hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=4)
    config = LlamaConfig(**sizes, num_hidden_layers=16, vocab_size=101, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = build_model(config)
    weight_bytes = sum(p.nbytes for p in model.parameters())
    save_model(model, tmp_path / "model", companions=None, provenance={})
    allowed = weight_bytes // 2

    def score(how):
        command = [sys.executable, "-c", WITHIN, tmp_path / "model", tmp_path / "s.safetensors", how, allowed]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)

    refused = score("whole")
    assert refused.returncode != 0
    assert "memory" in refused.stderr.lower()
    streamed = score("streamed")
    assert streamed.returncode == 0, streamed.stderr[-2000:]
    expected = measure(model, random_tokens(rows=2), micro_batch=1)
    found = Statistics.load(tmp_path / "s.safetensors")
    torch.testing.assert_close(found.scores[7].mlp_channels, expected.scores[7].mlp_channels)
