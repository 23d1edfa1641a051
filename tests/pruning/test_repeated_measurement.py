import pytest
import torch

from core.model import checkpoint as checkpoints
from core.model.checkpoint import Checkpoint, save_model
from core.pruning.plan import LayerPlan
from core.pruning.scoring import measurement
from core.pruning.scoring.calibration import measure
from core.pruning.scoring.measurement import MeasuredCheckpoint, state_memory
from core.pruning.surgery import open_pruned
from core.settings.calibration import CalibrationSettings
from core.settings.prune import PruneSettings
from tests.support.models import random_tokens, tiny

TOKENS = random_tokens(rows=5)


def cuts_of(model, seed):
    """Two plans, the second for what the first leaves: some MLP channels of each layer go."""
    generator = torch.Generator().manual_seed(seed)
    config, plans = model.config, []
    width = config.intermediate_size
    for share in (0.8, 0.7):
        kept = round(width * share)
        plans.append(
            tuple(
                LayerPlan(
                    query_heads=tuple(range(config.num_attention_heads)),
                    kv_heads=tuple(range(config.num_key_value_heads)),
                    mlp_channels=tuple(sorted(torch.randperm(width, generator=generator)[:kept].tolist())),
                )
                for _ in range(config.num_hidden_layers)
            )
        )
        width = kept
    return plans


@pytest.mark.parametrize("weights", ["memory", "streamed"])
@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_a_checkpoint_cut_twice_measures_like_what_both_plans_leave_on_disk(name, weights, tmp_path):
    model = tiny(name)
    save_model(model, tmp_path, companions=None, provenance={})
    settings = CalibrationSettings(sequences=5, weights=weights, micro_batch=2)
    measured = MeasuredCheckpoint(Checkpoint(tmp_path), settings, PruneSettings(), dtype=None, seed=0)
    first, second = cuts_of(model, seed=3)
    both = tuple(a.then(b) for a, b in zip(first, second, strict=True))
    for cut, left in [(None, None), (first, first), (second, both)]:
        if cut is not None:
            measured.cut(cut)
        found = measured.measure(TOKENS)
        again = open_pruned(Checkpoint(tmp_path), left, device=torch.device("cpu"))
        expected = measure(again, TOKENS, micro_batch=2, criterion=PruneSettings().criterion)
        assert found.loss == expected.loss
        assert torch.equal(found.similarities, expected.similarities)
        for a, b in zip(found.scores, expected.scores, strict=True):
            assert torch.equal(a.mlp_channels, b.mlp_channels)
            assert torch.equal(a.kv_groups, b.kv_groups)


def test_all_steps_of_a_phase_read_the_weights_once(tmp_path, monkeypatch):
    model = tiny("llama")
    save_model(model, tmp_path, companions=None, provenance={})
    opened = []
    real = checkpoints.safe_open
    monkeypatch.setattr(checkpoints, "safe_open", lambda path, **k: opened.append(path) or real(path, **k))
    settings = CalibrationSettings(sequences=5, weights="memory")
    measured = MeasuredCheckpoint(Checkpoint(tmp_path), settings, PruneSettings(), dtype=None, seed=0)
    measured.measure(TOKENS)
    read = len(opened)
    assert read > 0
    for cut in cuts_of(model, seed=3):
        measured.cut(cut)
        measured.measure(TOKENS)
    assert len(opened) == read


@pytest.mark.parametrize(("asked", "state_bytes"), [("auto", 400_000), ("1MB", 10**6)])
def test_host_memory_is_half_of_what_is_free_and_what_the_inputs_leave_of_it_is_for_outputs(
    asked, state_bytes, tmp_path, monkeypatch
):
    save_model(tiny("llama"), tmp_path, companions=None, provenance={})
    monkeypatch.setattr(measurement, "available_bytes", lambda *_: 800_000)
    given = {}
    monkeypatch.setattr(measurement, "measure", lambda model, tokens, **options: given.update(options))
    settings = CalibrationSettings(sequences=5, weights="memory", state_memory=asked, micro_batch=3)
    prune = PruneSettings(criterion="magnitude_l1", similarity="manhattan")
    MeasuredCheckpoint(Checkpoint(tmp_path), settings, prune, dtype=torch.float64, seed=4).measure(TOKENS)
    assert state_memory(settings) == given["state_bytes"] == state_bytes
    # 5 sequences of 12 tokens, 48 dimensions, 3 layers, 8 bytes.
    assert given["keep_bytes"] == state_bytes - 5 * 12 * 48 * 3 * 8
    assert (given["micro_batch"], given["seed"]) == (3, 4)
    assert (given["criterion"], given["similarity"]) == ("magnitude_l1", "manhattan")
