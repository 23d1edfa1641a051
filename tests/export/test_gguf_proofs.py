"""Long proofs on a real model, SmolLM2-135M-Instruct, and with llama.cpp's own quantizer."""

import os
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig

from core.export.gguf import export_gguf
from core.model.build import build_model, load_model, load_tokenizer
from core.model.checkpoint import save_model
from core.model.shape import LayerShape
from core.pruning.plan import LayerPlan
from core.pruning.surgery import prune_model
from tests.export.test_gguf import make  # noqa: F401
from tests.export.test_gguf_tokenizer import TEXTS
from tests.support import llama_raw
from tests.support.llamacpp import LlamaCpp
from tests.support.models import random_tokens

pytestmark = pytest.mark.slow

needs_raw = pytest.mark.skipif(
    llama_raw.interpreter() is None, reason="llama-cpp-python is not installed, nor LLAMA_CPP_PYTHON set"
)

QUESTIONS = [
    "The capital of France is",
    "Once upon a time there was a little girl who",
    "def fibonacci(n):\n    ",
    "List three colours:",
    "What is 12 + 30?",
    "Translate 'good morning' into French.",
    "In 1969, the first man",
    "Äpfel und Birnen sind",
    "1, 2, 3, 4,",
    "The sun is a star, which means that",
]


@pytest.fixture(scope="module")
def pruned(smollm2, tmp_path_factory):
    """Unequal heads, KV heads and widths: what goes are the channels that weigh least, and some heads."""
    folder = tmp_path_factory.mktemp("pruned") / "model"
    model = load_model(smollm2)
    heads = [
        (tuple(range(9)), (0, 1, 2)),
        (tuple(range(9)), (0, 1, 2)),
        (tuple(range(9)), (0, 1, 2)),
        ((0, 1, 3, 4, 6, 8), (0, 1, 2)),
        (tuple(range(9)), (0, 1, 2)),
        ((0, 1, 2, 6, 7, 8), (0, 2)),
    ]
    plans = []
    for index, layer in enumerate(model.model.layers):
        query, kv = heads[index % 6] if index < 24 else heads[0]
        size = layer.mlp.down_proj.weight.norm(dim=0) * layer.mlp.up_proj.weight.norm(dim=1)
        kept = size.argsort(descending=True)[: 1536 - 13 * (index % 7)].sort().values
        plans.append(LayerPlan(query_heads=query, kv_heads=kv, mlp_channels=tuple(kept.tolist())))
    save_model(prune_model(model, tuple(plans)), folder, companions=smollm2, provenance={})
    return folder


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_a_pruned_model_writes_the_same_texts(pruned, tmp_path, chat):
    llama = LlamaCpp(export_gguf(pruned, tmp_path / "pruned.gguf", dtype="f32").path)
    model, tokenizer = load_model(pruned), load_tokenizer(pruned)
    written = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = llama.chat_prompt(messages) if chat else question
        if chat:
            assert prompt == tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        text, tokens, _ = llama.generate(prompt, 32)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=[0, 2])
        expected = expected[0, ids.shape[1] :].tolist()
        written.append(text)
        assert tokens == expected, (text, tokenizer.decode(expected))
        assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(set(written)) > 8


@pytest.mark.parametrize("digits", [False, True], ids=["as imported", "splitting digits"])
def test_the_real_tokenizer_cuts_texts_into_the_same_tokens(pruned, tmp_path, digits):
    from pydoc_data.topics import topics

    ours = load_tokenizer(pruned)
    if digits:
        backend = ours.backend_tokenizer
        steps = [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        for file in pruned.iterdir():
            if not file.name.startswith("tokenizer"):
                (tmp_path / "model" / file.name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, tmp_path / "model" / file.name)
        ours.save_pretrained(tmp_path / "model")
    folder = tmp_path / "model" if digits else pruned
    exported = export_gguf(folder, tmp_path / "model.gguf")
    name = gguf.GGUFReader(exported.path).get_field("tokenizer.ggml.pre").contents()
    assert name == ("smollm" if digits else "gpt-2")
    theirs = LlamaCpp(exported.path)
    for text in [*TEXTS, *topics.values()]:
        assert theirs.tokenize(text) == ours(text)["input_ids"], text[:100]


WITHIN = """
import resource, sys
from pathlib import Path
from core.export.gguf import export_gguf
from core.model.build import load_tokenizer

source, out, allowed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
load_tokenizer(source)("What every process takes is not at stake.")
[size] = [l for l in open("/proc/self/status") if l.startswith("VmSize")]
now = int(size.split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + allowed, now + allowed))
export_gguf(source, out, dtype="f16")
"""


def test_a_model_is_exported_without_being_held_in_memory(tmp_path, tokenizer):
    sizes = dict(hidden_size=1024, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=4)
    config = LlamaConfig(**sizes, num_hidden_layers=20, vocab_size=411, tie_word_embeddings=True)
    model = build_model(config)
    save_model(model, tmp_path / "model", companions=None, provenance={})
    tokenizer.save_pretrained(tmp_path / "model")
    stored = sum(parameter.nbytes for parameter in model.parameters())
    # The checkpoint's files are mapped, which takes addresses alone; what is written is half as large.
    allowed = stored + stored // 8

    def export(bytes_allowed):
        command = [sys.executable, "-c", WITHIN, tmp_path / "model", tmp_path / "out.gguf", bytes_allowed]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)

    assert export(stored // 2).returncode != 0
    done = export(allowed)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out.gguf").stat().st_size > stored // 2


def raw_logits(path, tokens, folder):
    llama_raw.run("logits", path=path, tokens=tokens, out=folder / "logits.npz")
    saved = np.load(folder / "logits.npz")
    return torch.from_numpy(saved["at_once"]), torch.from_numpy(saved["one_by_one"])


WIDE = dict(hidden_size=256, head_dim=32, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3)


@needs_raw
@pytest.mark.parametrize(
    ("kind", "dtype", "widths", "expected"),
    [
        ("Q4_K_M", "f16", (512, 256, 768), {"Q4_K", "Q6_K"}),
        ("Q8_0", "f16", (512, 96, 160), {"Q8_0"}),
        ("Q4_0", "f32", (512, 96, 160), {"Q4_0", "Q6_K"}),
        ("Q4_K_M", "bf16", (512, 96, 160), {"Q4_K", "Q6_K", "Q5_0", "Q8_0"}),
        ("Q4_K_M", "f16", (512, 77, 160), {"Q4_K", "Q6_K", "Q5_0", "Q8_0", "F16"}),
        ("Q8_0", "f16", (512, 77, 160), {"Q8_0", "F16"}),
        ("Q4_0", "f16", (512, 77, 160), {"Q4_0", "Q6_K", "F16"}),
    ],
)
def test_the_quantizer_does_what_the_notes_say(make, tmp_path, kind, dtype, widths, expected):  # noqa: F811
    layers = [LayerShape(query_heads=8, kv_heads=4, mlp_width=width) for width in widths]
    checkpoint = make("llama-tied", layers, scale=0.05, **WIDE)
    exported = export_gguf(checkpoint, tmp_path / "full.gguf", dtype=dtype)
    llama_raw.run("quantize", path=exported.path, out=tmp_path / "small.gguf", kind=kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "small.gguf").tensors}
    assert {t.tensor_type.name for t in tensors.values() if len(t.shape) > 1} <= expected
    for index, width in enumerate(widths):
        stored = tensors[f"blk.{index}.ffn_down.weight"].tensor_type.name
        notes = [note for note in exported.notes if f"(such as {width})" in note]
        if width % 32:
            assert stored == "F16"
            assert "stays in float16" in notes[0]
        elif width % 256 and kind == "Q4_K_M":
            assert stored in ("Q5_0", "Q8_0")
        else:
            assert stored in ("Q4_K", "Q6_K", "Q8_0", "Q4_0")
    assert bool(exported.notes) == any(width % 256 for width in widths)
    llama = LlamaCpp(tmp_path / "small.gguf")
    tokens = random_tokens(rows=1, length=30)[0].tolist()
    found = raw_logits(tmp_path / "small.gguf", tokens, tmp_path)
    with torch.no_grad():
        whole = load_model(checkpoint)(torch.tensor([tokens])).logits[0]
    for logits in found:
        assert torch.corrcoef(torch.stack([logits.flatten(), whole.flatten()]))[0, 1] > 0.95
    assert len(llama.generate(tokens, 3)[1]) == 3


@needs_raw
def test_q8_0_is_that_of_llama_cpp_bit_for_bit(make, tmp_path):  # noqa: F811
    layers = [LayerShape(query_heads=8, kv_heads=4, mlp_width=width) for width in (512, 96, 77)]
    checkpoint = make("qwen2-tied", layers, **WIDE)
    full = export_gguf(checkpoint, tmp_path / "full.gguf", dtype="f32").path
    llama_raw.run("quantize", path=full, out=tmp_path / "theirs.gguf", kind="Q8_0")
    ours = export_gguf(checkpoint, tmp_path / "ours.gguf", dtype="q8_0").path
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors}
    for tensor in gguf.GGUFReader(ours).tensors:
        assert tensor.tensor_type == theirs[tensor.name].tensor_type
        np.testing.assert_array_equal(tensor.data, theirs[tensor.name].data)
