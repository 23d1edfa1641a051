import dataclasses
import json
import shutil

import pytest

from core.bases.licence import card_facts, known_facts
from core.data.packing import tokenize_conversations
from core.export.generation import end_ids
from core.export.hub_files import checkpoint_files
from core.model.build import load_model, load_tokenizer, model_shape
from core.model.checkpoint import PROVENANCE, Checkpoint
from core.model.config import config_with_layers, load_config
from core.model.remote_code import write_config
from core.model.shape import LayerShape
from tests.support.evidence import note
from tests.support.fuzzing import DEEP, FILES, VALUES, as_bytes, changed, fuzz, fuzz_file, outcome, variant

SHAPE = LayerShape(query_heads=6, kv_heads=3, mlp_width=40)


@pytest.fixture
def base(project, tmp_path):
    return shutil.copytree(project / "base", tmp_path / "base")


@pytest.fixture
def unequal(base):
    """The content of the config of a model whose layers differ, the weights do not fit."""
    config = load_config(base)
    write_config(config_with_layers(config, [SHAPE, dataclasses.replace(SHAPE, mlp_width=31), SHAPE]), base)
    return json.loads((base / "config.json").read_text())


def document_of(base, **changes):
    return json.loads((base / "config.json").read_text()) | changes


@pytest.mark.parametrize("equal", [True, False])
def test_changed_configs_are_read_or_refused(base, equal, unequal, project):
    document = document_of(project / "base") if equal else unequal
    shape, model = lambda: model_shape(load_config(base)), lambda: load_model(base)
    fuzz_file("config.json", base / "config.json", document, shape, model, share=2)


@pytest.mark.parametrize(
    "model_type", ["gemma3_text", "phi3", "smollm3", "olmo2", "mobilellm", "qwen3", "granite"]
)
def test_changed_configs_of_other_families_are_read_or_refused(base, model_type):
    document = document_of(base, model_type=model_type, sliding_window=5, pad_token_id=0)
    document |= {"layer_types": ["full_attention"] * 3, "no_rope_layers": [1, 0, 1]}
    read = lambda: model_shape(load_config(base))  # noqa: E731
    fuzz_file("config.json of other families", base / "config.json", document, read, share=0.3)


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "value", [0, -1, 2**62, 10**30, 1.5, "48", True, [48], {"a": 1}, float("nan")], ids=str
)
def test_sizes_must_be_whole_numbers_in_range(base, name, value):
    (base / "config.json").write_text(json.dumps(document_of(base, **{name: value})))
    said = outcome(lambda: load_config(base))
    assert f"{name}=" in said
    assert "must be a whole number from 1 to " in said


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention"]},
        {"layer_types": ["full_attention"] * 10_000},
        {"layer_types": [1, 2, 3]},
        {"num_attention_heads": 5},
        {"num_key_value_heads": 4},
        {"per_layer_config": [1]},
        {"per_layer_config": {"-1": {}}},
        {"per_layer_config": {"7": {"intermediate_size": 8}}},
        {"per_layer_config": {"0": {"intermediate_size": 10**12}}},
        {"per_layer_config": {"0": {"skip": ["mlp"]}}},
        {"rope_parameters": {"rope_type": "nothing"}},
        {"rope_parameters": 3},
        {"rms_norm_eps": "small"},
        {"hidden_act": "os.system"},
        {"torch_dtype": "object"},
        {"dtype": {"a": 1}},
        {"model_type": ["llama"]},
        {"model_type": None},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"vocab_size": 2**23, "hidden_size": 2**18},
        {"num_hidden_layers": 1000, "intermediate_size": 2**21, "hidden_size": 2**18},
    ],
    ids=str,
)
def test_hostile_configs_take_no_memory(base, changes):
    (base / "config.json").write_text(json.dumps(document_of(base, **changes)))
    outcome(lambda: load_config(base))
    outcome(lambda: load_model(base))


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_changed_tokenizers_are_read_or_refused(base, name):
    default = {"eos_token": "<|im_end|>"} if name.startswith("special") else {"eos_token_id": [2, 1]}
    path = base / name
    document = json.loads(path.read_text()) if path.exists() else default

    def read():
        checkpoint = Checkpoint(base)
        load_tokenizer(checkpoint)
        end_ids(checkpoint.generation_config, checkpoint.config)

    fuzz_file(name, path, document, read, share=0.5)


HOSTILE_TEMPLATES = [
    "{% for",
    "{{ messages[0].__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch canary') }}",
    "{{ self.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ 1 // 0 }}",
    "{{ nothing.at.all }}",
    "{{ raise_exception('no') }}",
    "{{ messages.append(1) }}",
    "{{ 'x' * 10 ** 12 }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ strftime_now(3) }}",
    "{{ [1, 2] | tojson(indent='a') }}",
    "{{ messages | map(attribute='__class__') | list }}",
]


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES)
def test_hostile_chat_templates_are_refused_or_do_nothing(tokenizer, template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    outcome(lambda: tokenize_conversations([turns], tokenizer), may_run_out=True)
    assert not list(tmp_path.iterdir())
    note(
        "Security",
        "chat templates that reach for Python, memory or time",
        "they did nothing, or one line said so",
    )


def test_changed_provenance_and_cards_are_read_or_refused(base):
    document = {"base": "b", "phase": 1, "license": "mit", "language": ["en"], "revision": "r"}

    def read():
        known_facts(Checkpoint(base).provenance)
        card_facts(base / "README.md")
        checkpoint_files(base)

    def attempt(how, value):
        (base / PROVENANCE).write_bytes(variant(document, how))
        front = as_bytes(changed(document, [(1, value)]))
        (base / "README.md").write_bytes(b"---\n" + front + b"\n---\n")
        return outcome(read)

    fuzz("adapt_pruner.json and the card's front matter, changed and damaged", attempt, FILES, VALUES)


@pytest.mark.parametrize(
    "content", [*DEEP, b"a: &a [x]\nb: &b [*a,*a]\n" * 1000, b"? " * 5000], ids=range(len(DEEP) + 2)
)
def test_hostile_cards_say_nothing(tmp_path, content):
    (tmp_path / "README.md").write_bytes(b"---\n" + content + b"\n---\n")
    assert not outcome(lambda: card_facts(tmp_path / "README.md"))
