"""A training by two ranks of which one is killed, resumed by one and by four from what was saved."""

import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import CheckpointError, TrainingError
from core.model.build import load_model
from core.model.checkpoint import save_model
from core.model.shape import LayerShape
from core.storage.store import open_store
from core.training.job import TrainingJob, train_here
from core.training.parallel.parts import merged
from core.training.parallel.ranks import Ranks
from core.training.parallel.training import recover_by_ranks
from core.training.state import STATE
from tests.support.models import random_tokens, tiny
from tests.support.training import training_settings, weights
from tests.training.test_ranks import forkserver  # noqa: F401

STEPS, FIRST_STEP = 6, 10
# 9 channels over 4 ranks are 3, 3, 3 and 0.
LAYERS = (
    LayerShape(query_heads=6, kv_heads=3, mlp_width=9),
    LayerShape(query_heads=4, kv_heads=2, mlp_width=40),
    LayerShape(query_heads=5, kv_heads=1, mlp_width=7),
)
SETTINGS = training_settings(global_batch=4, micro_batch=1, save_every="1 steps")


@contextlib.contextmanager
def dying(uri):
    """Rank 1 kills itself in its fourth step, once a state is published."""
    steps, clip = [], Ranks.clip_gradients

    def clip_or_die(ranks, *args):
        steps.append(1)
        if ranks.rank == 1 and len(steps) == 4:
            deadline = time.monotonic() + 120
            while not any(key.endswith("MANIFEST.json") for key in open_store(uri).list()):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return clip(ranks, *args)

    Ranks.clip_gradients = clip_or_die
    yield


def job_of(folder, uri, ranks, explaining=contextlib.nullcontext):
    return TrainingJob(
        checkpoint=folder.parent / "checkpoint",
        base=None,
        rows=folder.parent / "rows.safetensors",
        held_out=folder.parent / "held-out.safetensors",
        settings=SETTINGS,
        ranks=ranks,
        sharded=True,
        device="cpu",
        seed=3,
        first_step=FIRST_STEP,
        total_steps=30,
        states_uri=uri,
        belongs_to={"checkpoint": "c"},
        explaining=explaining,
        live=contextlib.nullcontext,
        scratch=folder / "scratch",
    )


def train(job, by_ranks):
    """Train as the step does, from what is saved; return the report, the weights and the moments."""
    model, left = load_model(job.checkpoint), []
    with job.states() as states:
        state = states.newest(model, first_step=FIRST_STEP)
        if by_ranks:
            report = recover_by_ranks(job, model, resume_from=state, hand_on=left.append, method="forkserver")
        else:
            report = train_here(job, model, resume_from=state, hand_on=left.append)
    (optimizer,) = left
    moments = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()])
    return report, weights(model), moments


@pytest.fixture
def folder(tmp_path):
    save_model(tiny("llama-tied", LAYERS), tmp_path / "checkpoint", companions=None, provenance={})
    for name, rows, seed in (("rows", 4 * STEPS, 1), ("held-out", 3, 2)):
        tokens = random_tokens(rows=rows, seed=seed)
        tensors = {"input_ids": tokens.int(), "trained": torch.ones_like(tokens).int()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.slow
def test_a_rank_that_is_killed_is_one_error_and_one_or_four_ranks_resume(folder, caplog):
    caplog.set_level(logging.INFO, "core")
    uri = str(folder / "states-of-two")
    killed = job_of(folder / "killed", uri, 2, functools.partial(dying, uri))
    with pytest.raises(TrainingError, match=r"^rank 1 of 2 was ended by SIGKILL.* resumes from") as caught:
        train(killed, by_ranks=True)
    assert "\n" not in str(caught.value)
    (saved,) = {key.partition("/")[0] for key in open_store(uri).list()}
    assert FIRST_STEP < int(saved) <= FIRST_STEP + 3
    shutil.copytree(uri, folder / "states-for-four")
    expected = train(job_of(folder / "undisturbed", str(folder / "none"), 1), by_ranks=False)
    for job, by_ranks in (
        (job_of(folder / "one", uri, 1), False),
        (job_of(folder / "four", str(folder / "states-for-four"), 4), True),
    ):
        caplog.clear()
        report, *tensors = train(job, by_ranks)
        assert f"resumed at step {int(saved)} of 30" in caplog.text
        assert_same_curves(report, expected[0])
        for found, wanted in zip(tensors, expected[1:], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-14)


def test_parts_that_are_missing_or_twice_make_no_state(tmp_path):
    """As torch names the files and writes their headers; the real ones are read by the test above."""

    def put(number, offset, rows):
        (tmp_path / "state").mkdir(exist_ok=True)
        info = {"weight.w": {"saved_offsets": [offset, 0]}, "step.w": {"saved_offsets": []}}
        tensors = {
            "weight.w": torch.arange(rows * 2.0).reshape(rows, 2) + 10 * offset,
            "step.w": torch.ones(()),
        }
        if number > 1:
            del info["step.w"], tensors["step.w"]
        path = tmp_path / "state" / f"shard-{number:05d}-model-00001-of-00001.safetensors"
        save_file(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(info)})
        return path

    (tmp_path / "state").mkdir()
    (tmp_path / "state" / STATE).write_text("{}")
    put(1, 0, 2), put(2, 2, 1)
    folder = merged([tmp_path / "state"], tmp_path / "whole")
    whole = load_file(folder / "state-00001.safetensors")
    assert whole["weight.w"].tolist() == [[0, 1], [2, 3], [20, 21]]
    assert whole["step.w"] == 1
    assert json.loads((folder / STATE).read_text()) == {"shards": 1}
    assert merged([folder], tmp_path / "unused") == folder
    put(2, 3, 1)
    with pytest.raises(CheckpointError, match=r"parts of weight\.w are missing"):
        merged([tmp_path / "state"], tmp_path / "with-a-gap")
    put(2, 1, 2)
    with pytest.raises(CheckpointError, match=r"or there twice"):
        merged([tmp_path / "state"], tmp_path / "with-a-row-twice")
    put(2, 2, 1).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"holds no whole state"):
        merged([tmp_path / "state"], tmp_path / "damaged")


def assert_same_curves(report, expected):
    assert [step for step, *_ in report.losses] == [step for step, *_ in expected.losses]
    assert [x for _, x, _ in report.losses] == pytest.approx([x for _, x, _ in expected.losses], rel=1e-12)
    for name in ("gradient_norm", "held_out_loss"):
        found, wanted = (dict(r.series[name]) for r in (report, expected))
        assert found == pytest.approx(wanted, rel=1e-12), name
    assert report.trained_tokens == expected.trained_tokens
