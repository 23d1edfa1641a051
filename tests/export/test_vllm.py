"""vLLM reads checkpoints as they are, and two exports; VLLM_PYTHON names it (see ``vllm_answers``)."""

import pytest
import torch

from core.export.decilm import export_decilm
from core.export.padded import export_padded
from core.model.build import build_model, load_model, load_tokenizer
from core.model.checkpoint import save_model
from core.model.config import config_with_layers
from core.model.shape import LayerShape
from tests.support import vllm_answers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(vllm_answers.interpreter() is None, reason="VLLM_PYTHON names no python with vLLM"),
]

PROMPTS = ("The capital of France is", "def fibonacci(n):\n    ", "Water boils at a temperature of")
NEW_TOKENS = 24
UNEQUAL = [
    LayerShape(query_heads=9 - 3 * (i % 5 == 3), kv_heads=3 - (i % 5 == 3), mlp_width=1536 - 11 * (i % 7))
    for i in range(30)
]
PORTABLE = [LayerShape(query_heads=9, kv_heads=3, mlp_width=1536 - 256 * (i % 6 == 4)) for i in range(30)]


def cut(base, layers, folder):
    """SmolLM2 without the last heads and channels of each layer."""
    dense = load_model(base)
    model = build_model(config_with_layers(dense.config, layers))
    whole = dense.state_dict()
    model.load_state_dict(
        {
            name: whole[name][tuple(slice(size) for size in weight.shape)]
            for name, weight in model.state_dict().items()
        }
    )
    save_model(model, folder, companions=base, provenance={})
    return model.eval()


def check(folder, model, tokenizer, tmp_path):
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    found = vllm_answers.answers(folder, prompts, NEW_TOKENS, tmp_path / "answers.json")
    for prompt, (tokens, logprobs) in zip(prompts, found, strict=True):
        ours = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert tokens == ours.tolist()
        logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        expected = torch.log_softmax(logits.double(), dim=-1)[range(NEW_TOKENS), tokens]
        torch.testing.assert_close(torch.tensor(logprobs).double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("export", [None, export_padded], ids=["as it is", "padded"])
def test_vllm_writes_what_pytorch_writes(export, smollm2, tmp_path):
    model = cut(smollm2, UNEQUAL, tmp_path / "model")
    folder = export(tmp_path / "model", tmp_path / "exported").path if export else tmp_path / "model"
    check(folder, model, load_tokenizer(tmp_path / "model"), tmp_path)


def test_vllm_runs_the_portable_profile_in_its_own_classes(smollm2, tmp_path):
    model = cut(smollm2, PORTABLE, tmp_path / "model")
    folder = export_decilm(tmp_path / "model", tmp_path / "decilm").path
    check(folder, model, load_tokenizer(tmp_path / "model"), tmp_path)
