"""Loads checkpoints as anybody would who has transformers but not this package; run by itself, with folders.

Each folder holds a checkpoint and ``expected.safetensors``: tokens, and the logits that this package gives.
Prints one JSON object: the version of transformers, and for each folder a list of what went wrong.
"""

import importlib.util
import json
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
)


@dataclass(frozen=True)
class Checkpoint:
    folder: str
    tokens: torch.Tensor
    logits: torch.Tensor
    attention: str

    def load(self, auto=AutoModelForCausalLM, *, folder=None, **kwargs):
        kwargs.setdefault("attn_implementation", self.attention)
        return auto.from_pretrained(folder or self.folder, trust_remote_code=True, **kwargs).eval()


def logits_are_equal_bit_for_bit(it):
    for attention in {"eager", it.attention}:
        model = it.load(attn_implementation=attention)
        assert model.config._attn_implementation == attention
        found = model(it.tokens).logits
        assert attention != it.attention or torch.equal(found, it.logits)
        torch.testing.assert_close(found, it.logits, atol=2e-4, rtol=1e-4)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(it.tokens).logits, it.logits, atol=2e-4, rtol=1e-4)


def loading_reports_nothing(it):
    _, report = AutoModelForCausalLM.from_pretrained(
        it.folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values()), report


def the_future_is_not_seen(it):
    model, changed = it.load(), it.tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 100
    torch.testing.assert_close(model(changed).logits[:, :-1], it.logits[:, :-1])


def caches_give_the_same_logits(it):
    model = it.load()
    static = StaticCache(config=model.config, max_cache_len=it.tokens.shape[1])
    for cache in (None, static):
        steps = []
        for position in range(it.tokens.shape[1]):
            out = model(
                it.tokens[:, position : position + 1],
                past_key_values=cache,
                use_cache=True,
                attention_mask=torch.ones(len(it.tokens), position + 1, dtype=torch.long),
            )
            cache = out.past_key_values
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), it.logits, atol=2e-4, rtol=1e-4)


def static_generation_equals_dynamic(it):
    model = it.load()
    kwargs = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    dynamic = model.generate(it.tokens, **kwargs)
    static = model.generate(it.tokens, cache_implementation="static", disable_compile=True, **kwargs)
    assert torch.equal(dynamic, static)
    longer = model(dynamic).logits[:, it.tokens.shape[1] - 1 : -1].argmax(dim=-1)
    assert torch.equal(dynamic[:, it.tokens.shape[1] :], longer)


def left_padding_changes_nothing(it):
    model = it.load()
    kwargs = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    lengths = [it.tokens.shape[1], 5, 8]
    batch, mask = torch.zeros(3, it.tokens.shape[1], dtype=torch.long), torch.zeros(3, it.tokens.shape[1])
    for row, length in enumerate(lengths):
        batch[row, -length:], mask[row, -length:] = it.tokens[row, :length], 1
    together = model.generate(batch, attention_mask=mask.long(), **kwargs)
    for row, length in enumerate(lengths):
        alone = model.generate(it.tokens[row : row + 1, :length], **kwargs)
        assert torch.equal(together[row, -6:], alone[0, -6:])


def hidden_states_and_attentions_are_given(it):
    model = it.load(attn_implementation="eager")
    out = model(it.tokens, output_hidden_states=True, output_attentions=True)
    layers = model.config.num_hidden_layers
    assert (len(out.hidden_states), len(out.attentions)) == (layers + 1, layers)


def saving_and_loading_again_keeps_all_bits(it):
    with tempfile.TemporaryDirectory() as again:
        it.load().save_pretrained(again)
        assert torch.equal(it.load(folder=again)(it.tokens).logits, it.logits)
        third = Path(again) / "third"
        it.load(folder=again).save_pretrained(third)
        assert torch.equal(it.load(folder=third)(it.tokens).logits, it.logits)
        kept = json.loads((third / "config.json").read_text())
    first = json.loads((Path(it.folder) / "config.json").read_text())
    assert {key: kept.get(key) for key in ("auto_map", "architectures")} == {
        key: first.get(key) for key in ("auto_map", "architectures")
    }


def the_body_alone_is_loaded(it):
    model = it.load()
    body = it.load(AutoModel)
    hidden = body(it.tokens).last_hidden_state
    inner = model.get_decoder()(it.tokens).last_hidden_state
    assert torch.equal(hidden, inner)


def a_fresh_model_has_initial_weights(it):
    config = AutoConfig.from_pretrained(it.folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    sizes = {name: p.shape for name, p in it.load().named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == sizes
    spreads = {n: p.std().item() for n, p in model.named_parameters() if n.endswith("down_proj.weight")}
    assert all(0.014 < spread < 0.026 for spread in spreads.values()), spreads


class _Tokens(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def _train(model, tokens, folder, **kwargs):
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=12,
        per_device_train_batch_size=len(tokens),
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **kwargs,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=_Tokens(tokens))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0], losses


def trainer_tunes_it_and_its_checkpoint_loads(it):
    with tempfile.TemporaryDirectory() as out:
        model = it.load()
        _train(model, it.tokens, out, save_steps=12, gradient_checkpointing=True)
        saved = it.load(folder=f"{out}/checkpoint-12")
        assert torch.equal(saved(it.tokens).logits, model.eval()(it.tokens).logits)


def lora_trains_saves_and_merges(it):
    from peft import LoraConfig, PeftModel, get_peft_model

    targets = ["o_proj", "down_proj"]
    with tempfile.TemporaryDirectory() as out:
        model = get_peft_model(it.load(), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        _train(model, it.tokens, out, save_strategy="no")
        model.eval().save_pretrained(f"{out}/adapter")
        tuned = model(it.tokens).logits
        again = PeftModel.from_pretrained(it.load(), f"{out}/adapter").eval()
        assert torch.equal(again(it.tokens).logits, tuned)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(it.tokens).logits, tuned, atol=1e-3, rtol=1e-3)
        merged.save_pretrained(f"{out}/merged")
        assert torch.equal(it.load(folder=f"{out}/merged")(it.tokens).logits, merged(it.tokens).logits)


def bfloat16_runs(it):
    model = it.load(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    found = model(it.tokens).logits.float()
    assert torch.nn.functional.cosine_similarity(found.flatten(), it.logits.flatten(), dim=0) > 0.99


CHECKS = (
    logits_are_equal_bit_for_bit,
    loading_reports_nothing,
    the_future_is_not_seen,
    caches_give_the_same_logits,
    static_generation_equals_dynamic,
    left_padding_changes_nothing,
    hidden_states_and_attentions_are_given,
    saving_and_loading_again_keeps_all_bits,
    the_body_alone_is_loaded,
    a_fresh_model_has_initial_weights,
    trainer_tunes_it_and_its_checkpoint_loads,
    lora_trains_saves_and_merges,
    bfloat16_runs,
)


def main(folders):
    assert importlib.util.find_spec("core") is None, "this package must not be there"
    torch.set_num_threads(1)
    found = {}
    for folder in folders:
        with safe_open(Path(folder, "expected.safetensors"), framework="pt") as held:
            attention = held.metadata()["attention"]
            it = Checkpoint(folder, held.get_tensor("tokens"), held.get_tensor("logits"), attention)
        found[folder] = []
        for check in CHECKS:
            try:
                check(it)
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
                found[folder].append(f"{check.__name__}: {what} ({last.filename}:{last.lineno})")
    print(json.dumps({"transformers": transformers.__version__, "problems": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
