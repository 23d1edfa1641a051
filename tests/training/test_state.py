"""A training that stops and resumes from a written state equals one that never stopped, to the last bit."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from core.errors import CheckpointError, StorageError
from core.model.build import build_model
from core.training import state as state_module
from core.training.recover import recover
from core.training.rows import Rows
from core.training.state import (
    TrainingProgress,
    check_fits,
    read_state,
    restore_state,
    state_tensors,
    write_state,
)
from tests.support.models import SIZES, UNEQUAL, random_tokens, tiny
from tests.support.training import training_settings, weights

STEPS, FIRST_STEP, TOTAL_STEPS = 6, 10, 30


class StoppedError(Exception):
    pass


def unequal(name):
    return lambda seed: tiny(name, UNEQUAL, dtype=torch.float32, seed=seed)


def with_dropout(seed):
    torch.manual_seed(seed)
    return build_model(LlamaConfig(**SIZES, attention_dropout=0.3), dtype=torch.float32)


def train(model, *, resume_from=None, save=None, seed=3, **changes):
    tokens = random_tokens(rows=4 * STEPS)
    settings = training_settings(**dict(micro_batch=2, weight_decay=0.1) | changes)
    torch.manual_seed(seed)
    mask = (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) > 0.3).int()
    return recover(
        model,
        Rows(tokens, mask),
        settings,
        first_step=FIRST_STEP,
        total_steps=TOTAL_STEPS,
        resume_from=resume_from,
        save=save,
    )


def state_after(steps, model, folder, *, resume_from=None, **changes):
    """Train until so many steps of the phase are done, write the state, stop, and read it again."""

    def save(optimizer, progress):
        if len(progress.losses) == steps:
            write_state(folder, state_tensors(model, optimizer), progress, belongs_to={"a": "b"})
            raise StoppedError

    with pytest.raises(StoppedError):
        train(model, resume_from=resume_from, save=save, **changes)
    return read_state(folder)


def tensors_of(state):
    return {
        name: tensor
        for path in sorted(state.directory.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("stops", [(1,), (5,), (2, 3), (1, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (unequal("llama"), {}),
        (unequal("qwen2-tied"), {"precision": "bfloat16"}),
        (unequal("llama-tied"), {"gradient_checkpointing": True}),
        (with_dropout, {}),
        (with_dropout, {"gradient_checkpointing": True, "precision": "bfloat16"}),
    ],
    ids=["llama", "tied-bfloat16", "tied-checkpointing", "dropout", "dropout-checkpointing-bfloat16"],
)
def test_training_resumes_bit_for_bit(make, changes, stops, tmp_path):
    undisturbed = make(0)
    expected = train(undisturbed, **changes)
    state = None
    for attempt, stop in enumerate(stops):
        # Only the first attempt has the weights to start with: the others take all from the state.
        model = make(attempt)
        state = state_after(stop, model, tmp_path / str(stop), resume_from=state, **changes)
        check_fits(state, model)
    last = make(len(stops))
    report = train(last, resume_from=state, **changes)
    assert report.losses == expected.losses
    assert (report.tokens, report.trained_tokens) == (expected.tokens, expected.trained_tokens)
    assert torch.equal(weights(last), weights(undisturbed))
    assert not last.training


def test_dropout_draws_other_numbers_with_another_seed():
    losses = [train(with_dropout(0), seed=seed).losses for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_a_state_takes_twelve_bytes_per_parameter_and_holds_tied_ones_once(tmp_path):
    model = unequal("llama-tied")(0)
    state = state_after(2, model, tmp_path / "state")
    tensors = tensors_of(state)
    names = [name for name, _ in model.named_parameters()]
    kinds = ("weight", "exp_avg", "exp_avg_sq", "step")
    assert set(tensors) == {f"{kind}.{name}" for kind in kinds for name in names} | {"rng.cpu"}
    apart = tensors["rng.cpu"].nbytes + 4 * len(names)
    assert sum(tensor.nbytes for tensor in tensors.values()) == 12 * model.num_parameters() + apart
    assert {tensors[f"step.{name}"].item() for name in names} == {2}


def test_a_state_is_split_into_files_so_that_few_tensors_are_copied_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(state_module, "_SHARD_BYTES", 20_000)
    undisturbed, model = unequal("llama")(0), unequal("llama")(1)
    expected = train(undisturbed)
    state = state_after(3, unequal("llama")(0), tmp_path / "state")
    assert state.shards == len(list(state.directory.glob("*.safetensors"))) > 5
    for path in state.directory.glob("*.safetensors"):
        part = load_file(path)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 20_000
    check_fits(state, model)
    assert train(model, resume_from=state).losses == expected.losses
    assert torch.equal(weights(model), weights(undisturbed))


def test_what_is_restored_outlives_the_files(tmp_path):
    model = unequal("llama")(0)
    state = state_after(2, model, tmp_path / "state")
    before = {name: tensor.clone() for name, tensor in tensors_of(state).items()}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    restore_state(state, model, optimizer)
    for path in state.directory.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))  # the same file: a view of it would change
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[f"weight.{name}"])
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][moment], before[f"{moment}.{name}"])


def test_time_and_tokens_of_earlier_attempts_count(tmp_path):
    model = unequal("llama")(0)

    def save(optimizer, progress):
        long = TrainingProgress(losses=progress.losses, trained_tokens=progress.trained_tokens, seconds=1e4)
        if len(progress.losses) == 2:
            write_state(tmp_path / "state", state_tensors(model, optimizer), long, belongs_to={})

    train(model, save=save)
    report = train(unequal("llama")(1), resume_from=read_state(tmp_path / "state"))
    assert report.tokens == 4 * STEPS * 12
    assert 0 < report.tokens_per_s <= report.tokens / 1e4


def test_progress_survives_a_round_trip(tmp_path):
    model = unequal("llama")(0)
    losses = [(7, float("nan"), 0.1 + 0.2), (8, float("inf"), 5e-324)]
    progress = TrainingProgress(losses=losses, trained_tokens=2**60, seconds=1 / 3)
    optimizer = torch.optim.AdamW(model.parameters())
    write_state(tmp_path / "s", state_tensors(model, optimizer), progress, belongs_to={"a": "b"})
    state = read_state(tmp_path / "s")
    assert repr(state.progress) == repr(progress)
    assert state.progress.next_step == 9
    assert state.belongs_to == {"a": "b"}


# --- what is not a state of this model


def rewrite(change):
    def damage(state):
        path = state.directory / "state-00001.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def first(kind, tensors):
    return next(name for name in sorted(tensors) if name.startswith(kind))


def truncate(state):
    path = state.directory / "state-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "a weight is missing": rewrite(lambda t: t.pop(first("weight.", t))),
    "a moment is missing": rewrite(lambda t: t.pop(first("exp_avg_sq.", t))),
    "a weight too many": rewrite(lambda t: t.update({"weight.other": torch.zeros(1)})),
    "another shape": rewrite(lambda t: t.update({first("exp_avg.", t): torch.zeros(3, 5)})),
    "another number format": rewrite(lambda t: t.update({n: x.double() for n, x in t.items() if x.dim()})),
    "a random state of another size": rewrite(lambda t: t.update({"rng.cpu": t["rng.cpu"][:-1]})),
    "a random state of another kind": rewrite(lambda t: t.update({"rng.xpu": t["rng.cpu"].clone()})),
    "a pickle in place of the tensors": lambda state: torch.save(
        {}, state.directory / "state-00001.safetensors"
    ),
    "a part is cut short": truncate,
    "a part is gone": lambda state: (state.directory / "state-00001.safetensors").unlink(),
}


def test_a_state_of_a_gpu_is_resumed_without_one(tmp_path):
    model = unequal("llama")(0)
    state = state_after(2, model, tmp_path / "state")
    rewrite(lambda t: t.update({"rng.cuda": torch.zeros(16, dtype=torch.uint8)}))(state)
    check_fits(state, model)
    assert train(unequal("llama")(1), resume_from=state).losses == train(unequal("llama")(0)).losses


def test_a_state_from_without_a_gpu_is_resumed_on_one(tmp_path, monkeypatch):
    model = unequal("llama")(0)
    state = state_after(2, model, tmp_path / "state")
    on_gpu = {"cpu": torch.get_rng_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    monkeypatch.setattr("core.training.state._random_states", lambda model: on_gpu)
    check_fits(state, model)
    rewrite(lambda t: t.update({"rng.cuda": torch.zeros(8, dtype=torch.uint8)}))(state)
    with pytest.raises(CheckpointError, match=r"rng\.cuda differ"):
        check_fits(state, model)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_state_that_lacks_or_changes_a_tensor_is_refused(damage, tmp_path):
    model = unequal("llama")(0)
    state = state_after(2, model, tmp_path / "state")
    check_fits(state, model)
    damage(state)
    with pytest.raises(CheckpointError, match=r"differ|cannot be read"):
        check_fits(state, model)


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny("llama", dtype=torch.float32),
        lambda: tiny("llama", UNEQUAL[::-1], dtype=torch.float32),
        lambda: tiny("llama", UNEQUAL, dtype=torch.float64),
        lambda: tiny("llama-tied", UNEQUAL, dtype=torch.float32),
        lambda: tiny("qwen2", UNEQUAL, dtype=torch.float32),
    ],
    ids=["unpruned", "layers in another order", "float64", "tied", "another family"],
)
def test_a_state_of_another_model_is_refused(other, tmp_path):
    state = state_after(2, unequal("llama")(0), tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"is a state of another model: .* differ"):
        check_fits(state, other())


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.clear(),
        lambda data: data.update(format=2),
        lambda data: data.update(shards="x"),
        lambda data: data.pop("belongs_to"),
        lambda data: data.update(progress=[]),
        lambda data: data["progress"].update(losses=[]),
        lambda data: data["progress"]["losses"].pop(1),
        lambda data: data["progress"]["losses"][1].pop(),
        lambda data: data["progress"]["losses"].reverse(),
        lambda data: data["progress"]["losses"][-1].__setitem__(0, 10**15),
        lambda data: data["progress"].update(seconds=None),
        lambda data: data["progress"].update(trained_tokens=float("inf")),
    ],
)
def test_a_state_file_of_other_content_is_refused(change, tmp_path):
    state = state_after(4, unequal("llama")(0), tmp_path / "state")
    data = json.loads((state.directory / "state.json").read_text())
    change(data)
    (state.directory / "state.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"state\.json is not a training state"):
        read_state(state.directory)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'])
def test_anything_but_a_state_file_is_refused(content, tmp_path):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a training state"):
        read_state(tmp_path)
    (tmp_path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="is not a training state"):
        read_state(tmp_path)


def test_a_disk_that_takes_no_state_is_a_storage_error(tmp_path):
    model = unequal("llama")(0)
    optimizer, progress = torch.optim.AdamW(model.parameters()), TrainingProgress(losses=[(0, 1.0, 0.1)])

    def write(folder):
        with pytest.raises(StorageError, match=r"cannot be (read or )?written: ") as caught:
            write_state(folder, state_tensors(model, optimizer), progress, belongs_to={})
        return str(caught.value)

    (tmp_path / "file").touch()
    assert "not a directory" in write(tmp_path / "file" / "state")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a disk that fills up on the way
    try:
        assert "File too large" in write(tmp_path / "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
