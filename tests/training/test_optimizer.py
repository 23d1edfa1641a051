"""AdamW whose moments are kept by the host computes what torch's computes."""

import torch

from core.training import optimizer as optimizer_module
from core.training.optimizer import HostAdamW, adamw, device_of_moments
from core.training.recover import recover
from core.training.rows import Rows
from core.training.state import check_fits, read_state, restore_state, state_tensors, write_state
from tests.support.models import UNEQUAL, random_tokens, tiny
from tests.support.training import training_settings, weights


def train(place, monkeypatch, **options):
    model, tokens = tiny("llama-tied", UNEQUAL, dtype=torch.float32), random_tokens(rows=12)
    moved = []
    monkeypatch.setattr(
        HostAdamW,
        "_move",
        lambda self, p, device, move=HostAdamW._move: (moved.append((p, device.type)), move(self, p, device))[
            1
        ],
    )
    rows = Rows(tokens, torch.ones_like(tokens))
    settings = training_settings(moments=place, weight_decay=0.1)
    report = recover(model, rows, settings, first_step=0, total_steps=30, **options)
    monkeypatch.undo()
    return model, report, moved


def test_moments_pass_through_the_device_in_parts_and_change_no_number(monkeypatch):
    monkeypatch.setattr(optimizer_module, "_PART_BYTES", 50_000)
    expected, first, none = train("device", monkeypatch)
    monkeypatch.setattr(optimizer_module, "_PART_BYTES", 50_000)
    model, report, moved = train("host", monkeypatch)
    assert report.losses == first.losses
    assert torch.equal(weights(model), weights(expected))
    assert not none
    assert len(moved) == 2 * 3 * len(list(model.parameters()))


def test_a_parameter_is_in_one_part_and_parts_are_small():
    parameters = [torch.empty(size) for size in (1000, 5, 2**28, 7, 3)]
    parts = list(optimizer_module._parts(parameters))
    assert [p for part in parts for p in part] == parameters
    assert [len(part) for part in parts] == [2, 1, 2]


def test_moments_of_the_host_are_saved_and_restored_there(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    optimizer = adamw(model.parameters(), training_settings(moments="host"))
    model(random_tokens()).logits.sum().backward()
    optimizer.step()
    from core.training.state import TrainingProgress

    progress = TrainingProgress(losses=[(0, 1.0, 0.1)])
    state = write_state(tmp_path / "state", state_tensors(model, optimizer), progress, belongs_to={})
    check_fits(read_state(state.directory), model)
    other = adamw(model.parameters(), training_settings(moments="host"))
    restore_state(state, model, other)
    for parameter in model.parameters():
        for name, moment in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][name], moment), name
        assert other.state[parameter]["exp_avg"].device == device_of_moments(other, parameter)
