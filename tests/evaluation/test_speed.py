import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pydantic import TypeAdapter

from core.errors import CheckpointError, ExportError, SettingsError
from core.evaluation.speed.comparison import compare, median_rates, median_speedup, time_pair
from core.evaluation.speed.engines import LlamaCpp, Torch, accelerator_of
from core.evaluation.speed.workload import Workload
from core.model.checkpoint import save_model
from core.model.shape import LayerShape
from core.report.report import build_report
from core.runs.record import RunRecord, SpeedRecord
from core.steps.speed import compare_speed, installed_runtimes
from core.tracking.client import connect
from pipelines.cli import main
from tests.support.models import tiny
from tests.support.project import recipe_with, run_all
from tests.support.reports import make_record

BRIEF = Workload(prompt_tokens=7, new_tokens=5, batches=(1, 3), rounds=2, threads=1)
RECORD = SpeedRecord(
    runtime="llama.cpp",
    device="cpu",
    tokens_per_s={"prompt 1": (900.0, 1100.5), "decode 4": (70.0, 84.0)},
    speedups={"prompt 1": 1.22, "decode 4": 1.2},
    load_s=(3.0, 2.0),
    memory_bytes=(500_000_000, 400_000_000),
)


@pytest.fixture
def pair(project, smaller):
    """A dense model with a tokenizer, and a smaller one."""
    return project / "base", smaller


def test_both_models_do_every_job_in_every_runtime(pair):
    records = compare_speed(*pair, BRIEF)
    assert [record.runtime for record in records] == list(installed_runtimes()) == ["torch", "llama.cpp"]
    for record in records:
        assert set(record.tokens_per_s) == {"prompt 1", "decode 1", "prompt 3", "decode 3"}
        assert set(record.speedups) == set(record.tokens_per_s)
        assert all(rate > 0 for rates in record.tokens_per_s.values() for rate in rates)
        assert min(record.load_s) > 0
        assert (
            TypeAdapter(SpeedRecord).validate_python(json.loads(json.dumps(dataclasses.asdict(record))))
            == record
        )


def test_a_machine_that_is_slow_for_a_while_does_not_change_the_ratio():
    even = [(1.0, 0.8), (1.0, 0.8), (1.0, 0.8), (1.0, 0.8)]
    slow = [(1.0, 0.8), (9.0, 7.2), (4.0, 3.2), (1.0, 0.8)]
    assert median_speedup(even) == pytest.approx(1.25)
    assert median_speedup(slow) == pytest.approx(1.25)
    assert median_rates(even, 20) == pytest.approx((20.0, 25.0))


class Timed:
    """A model that takes a known time, and records whose turn it was."""

    def __init__(self, seconds, turns):
        self.seconds, self.turns = seconds, turns

    def time(self, kind, batch):
        self.turns.append(self.seconds)
        return self.seconds


@pytest.mark.parametrize("reverse", [False, True])
def test_the_seconds_are_those_of_base_and_checkpoint_whoever_went_first(reverse):
    turns = []
    base, checkpoint = Timed(2.0, turns), Timed(1.0, turns)
    assert time_pair(base, checkpoint, "decode", 1, reverse=reverse) == (2.0, 1.0)
    assert turns == ([1.0, 2.0] if reverse else [2.0, 1.0])


def test_mlflow_gets_ratios_that_are_above_1_where_the_checkpoint_is_better():
    assert RECORD.figures() == {
        "speedup/llama_cpp/prompt_batch_1": 1.22,
        "speedup/llama_cpp/decode_batch_4": 1.2,
        "speedup/llama_cpp/load": 1.5,
        "memory_saving/llama_cpp": 1.25,
    }


def test_the_report_shows_what_was_measured():
    page = "".join(build_report(make_record(speed=(RECORD,))).splitlines())
    assert "Speed in llama.cpp on cpu" in page
    assert "<td>decoding, batch of 4 (tokens/s)</td><td>70.0</td><td>84.0</td><td>1.20</td>" in page
    assert "Speed in" not in build_report(make_record())


def test_pytorch_reads_the_prompt_at_once_and_writes_token_by_token(pair):
    engine = Torch(pair[1], BRIEF, "cpu")
    seen = []
    engine._model.model.layers[0].register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape[:2])
    )
    engine.time("prompt", 3)
    assert seen == [(3, 7)]
    seen.clear()
    engine.time("decode", 3)
    assert seen == [(3, 7)] + [(3, 1)] * 5


def test_llama_cpp_writes_as_many_tokens_as_are_counted(pair, tmp_path):
    from core.export.gguf import export_gguf

    engine = LlamaCpp(export_gguf(pair[1], tmp_path / "model.gguf").path, BRIEF, "cpu")
    timings = engine._complete(0, 6)["timings"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (7, 6)


def test_llama_cpp_is_said_to_run_where_it_does_and_not_where_pytorch_does(pair, tmp_path):
    from core.export.gguf import export_gguf

    files = [export_gguf(folder, tmp_path / f"{folder.name}.gguf").path for folder in pair]
    assert compare("llama.cpp", *files, BRIEF, device="cuda").device == "cpu"  # PyPI's build knows no other


@pytest.mark.parametrize(
    ("devices", "accelerator"),
    [
        ({"CPU": "CPU"}, "cpu"),
        ({"BLAS": "ACCEL", "CPU": "CPU"}, "cpu"),
        ({"CUDA0": "GPU", "CUDA1": "GPU", "CPU": "CPU"}, "cuda"),
        ({"Vulkan0": "IGPU", "CPU": "CPU"}, "vulkan"),
    ],
)
def test_a_build_for_an_accelerator_is_known_by_its_devices(devices, accelerator):
    from xllamacpp import ggml_backend_dev_type as kinds

    found = [
        {"name": name, "type": kinds[f"GGML_BACKEND_DEVICE_TYPE_{kind}"]} for name, kind in devices.items()
    ]
    assert accelerator_of(found) == accelerator


@pytest.mark.slow
def test_memory_is_that_of_the_model_alone(pair, tmp_path):
    large = tiny("llama", [LayerShape(query_heads=6, kv_heads=3, mlp_width=70_000)] * 3, dtype=torch.float32)
    save_model(large, tmp_path / "large", companions=pair[0], provenance={})
    weights = sum(p.numel() * p.element_size() for p in large.parameters())
    small, big = compare("torch", pair[0], tmp_path / "large", BRIEF).memory_bytes
    assert weights < big < 4 * weights
    assert small < big / 2


def test_a_model_that_cannot_be_loaded_is_named(pair, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty cannot be measured: .*holds no config\.json"):
        compare("torch", pair[0], tmp_path / "empty", BRIEF)


def test_a_runtime_that_is_not_installed_is_refused_before_anything_is_loaded(pair, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert installed_runtimes() == ("torch",)
    with pytest.raises(SettingsError, match="pip install"):
        compare_speed(*pair, BRIEF, runtimes=["llama.cpp"])


def test_a_prompt_that_is_longer_than_the_model_sees_is_refused_before_anything_is_loaded(pair):
    long = Workload(prompt_tokens=250, new_tokens=6)
    with pytest.raises(SettingsError, match=r"need 257 positions, but .*base has 256\. Shorten"):
        compare_speed(*pair, long)


@pytest.mark.slow
def test_a_family_that_llama_cpp_cannot_read_is_left_out_unless_it_was_asked_for(pair, tmp_path):
    save_model(tiny("granite", dtype=torch.float32), tmp_path / "granite", companions=pair[0], provenance={})
    folder = tmp_path / "granite"
    assert [record.runtime for record in compare_speed(folder, folder, BRIEF)] == ["torch"]
    with pytest.raises(ExportError, match="granite"):
        compare_speed(folder, folder, BRIEF, runtimes=["llama.cpp"])


@pytest.mark.slow
def test_a_run_that_asks_for_it_shows_the_speed_wherever_it_shows_results(project, tmp_path, monkeypatch):
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "model_name": "small"}
    recipe = recipe_with(
        {"evaluation.speed": True, "training.tokens": "0", "prune.phases": 1, "tracking": tracking}
    )
    _, final = run_all(recipe, tmp_path / "artifacts")
    record = RunRecord.from_dict(json.loads(Path(final, "record.json").read_text()))
    assert [speed.runtime for speed in record.speed] == ["torch", "llama.cpp"]
    figures = {name: value for speed in record.speed for name, value in speed.figures().items()}
    assert len(figures) == 2 * 6
    client = connect(tracking["uri"])
    parent = client.get_run(record.tracking_run)
    assert figures.items() <= parent.data.metrics.items()
    (model,) = client.search_logged_models([parent.info.experiment_id])
    assert figures.items() <= {metric.key: metric.value for metric in model.metrics}.items()
    for file in ("README.md", "report.html"):
        assert "decoding, batch of 4" in Path(final, file).read_text()


def test_the_command_shows_a_table_and_writes_the_figures(pair, tmp_path):
    base, pruned = pair
    arguments = ["benchmark", pruned, "--against", base, "--runtime", "torch", "--rounds", 1]
    arguments += ["--prompt-tokens", 5, "--new-tokens", 3, "--json", tmp_path / "new" / "speed.json"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "decoding, batch of 4" in result.output
    figures = json.loads((tmp_path / "new" / "speed.json").read_text())
    assert figures["params"][0] > figures["params"][1]
    assert figures["speed"][0]["runtime"] == "torch"


def test_a_folder_that_is_not_there_is_named_by_its_option(pair):
    result = CliRunner().invoke(main, ["benchmark", str(pair[0]), "--against", "nowhere"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--against=nowhere is not a folder" in result.stderr


def test_a_file_that_cannot_be_written_is_named_before_anything_is_measured(pair, tmp_path):
    (tmp_path / "file").write_text("a file")
    for place, reason in (("file/speed.json", "Not a directory"), ("", "Is a directory")):
        path = tmp_path / place
        result = CliRunner().invoke(
            main, ["benchmark", str(pair[1]), "--against", str(pair[0]), "--json", str(path)]
        )
        assert (result.exit_code, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: --json={path} cannot be written ({reason}). ")
