"""The command that exports: its formats are tested with their runtimes, in files of their own."""

import shutil

import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from core.model.build import load_model
from pipelines.cli import main
from tests.support.models import random_tokens


@pytest.fixture
def model(smaller):
    return smaller


def export(*arguments):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_a_gguf_file_has_the_number_format_that_was_asked_for(model, tmp_path):
    result = export(model, tmp_path / "m.gguf", "--format", "gguf", "--dtype", "f32")
    assert result.exit_code == 0, result.output
    params = sum(p.numel() for p in load_model(model).parameters())
    assert result.stdout.startswith(f"{tmp_path / 'm.gguf'}: {params:,} parameters, ")
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds == {"F32"}


def test_what_the_user_should_know_stands_in_notes(model, tmp_path):
    result = export(model, tmp_path / "m.gguf", "--format", "gguf", "--dtype", "q8_0")
    assert result.exit_code == 0, result.output
    assert any(line.startswith("note: ") and "rows" in line for line in result.stdout.splitlines())


def test_a_padded_folder_gives_the_same_answers_without_any_code(model, tmp_path):
    result = export(model, tmp_path / "padded", "--format", "padded")
    assert result.exit_code == 0, result.output
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    tokens = random_tokens()
    torch.testing.assert_close(padded(tokens).logits, load_model(model)(tokens).logits)


def test_what_a_format_cannot_hold_is_one_line_and_leaves_nothing(model, tmp_path):
    result = export(model, tmp_path / "decilm", "--format", "decilm")
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {model} cannot become a DeciLM")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten(model, tmp_path):
    (tmp_path / "m.gguf").write_text("precious")
    result = export(model, tmp_path / "m.gguf", "--format", "gguf")
    assert (result.exit_code, result.stderr) == (
        1,
        f"error: {tmp_path / 'm.gguf'} exists already. Remove it, or name another place.\n",
    )
    assert (tmp_path / "m.gguf").read_text() == "precious"


def test_a_place_that_cannot_be_written_is_named_before_a_model_is_fetched(tmp_path):
    (tmp_path / "file").write_text("a file")
    for place, status, problem in (
        ("file", 1, f"{tmp_path}/file exists already"),
        ("file/m.gguf", 2, f"OUTPUT={tmp_path}/file/m.gguf cannot be written (Not a directory)"),
    ):
        result = export("file:///nowhere", tmp_path / place, "--format", "gguf")
        assert (result.exit_code, result.stdout) == (status, "")
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {problem}. ")


def test_a_number_format_is_for_gguf_alone(model, tmp_path):
    result = export(model, tmp_path / "padded", "--format", "padded", "--dtype", "q8_0")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: --dtype=q8_0 is for --format=gguf, not padded. Leave it out.\n"


def test_a_model_that_is_not_there_is_named(tmp_path):
    result = export(tmp_path / "nowhere", tmp_path / "m.gguf", "--format", "gguf")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nowhere is not a folder" in result.stderr


@pytest.mark.parametrize("format_", ["padded", "onnx"])
def test_the_files_of_the_law_go_with_every_folder(model, tmp_path, format_):
    if format_ == "onnx":
        pytest.importorskip("onnxscript")
    laws = {name: f"{name} of ours" for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "COPYING")}
    own = shutil.copytree(model, tmp_path / "model")
    for name, text in laws.items():
        (own / name).write_text(text)
    result = export(own, tmp_path / "out", "--format", format_)
    assert result.exit_code == 0, result.output
    assert {name: (tmp_path / "out" / name).read_text() for name in laws} == laws
