import dataclasses
import json
import shutil

import pytest
from hypothesis import given

from core.errors import SettingsError
from core.export.generation import end_ids, generation_config
from core.export.hub_files import checkpoint_files
from core.licence import card_facts, known_facts
from core.model.build import config_with_layers, load_config, load_model, load_tokenizer, model_shape
from core.model.checkpoint import PROVENANCE, read_json
from core.model.remote_code import write_config
from core.model.shape import LayerShape
from core.overview import list_runs
from core.pruning.plan import LayerPlan, Plan
from core.run import Run
from core.steps import run_finalize
from core.storage.entries import FileEntry, Manifest
from core.storage.lease import Lease, read_lease
from core.storage.manifest import publish
from core.storage.owner import Owner
from core.storage.store import open_store
from core.training.packing import tokenize_conversations
from core.training.state import read_state
from tests.evidence import note
from tests.fuzzing import DEEP, FILES, VALUES, as_bytes, changed, examples, fuzzed, outcome, variant
from tests.project import RECIPE

SHAPE = LayerShape(query_heads=6, kv_heads=3, mlp_width=40)


def tell(tried, seen, share=1.0):
    assert any(seen), "something was refused"
    assert len(seen) >= examples(share)
    note("Security", tried, "read, or refused with one line", examples(share))


@pytest.fixture
def base(project, tmp_path):
    return shutil.copytree(project / "base", tmp_path / "base")


@pytest.fixture
def unequal(base):
    """The content of the config of a model whose layers differ, the weights do not fit."""
    config = load_config(base)
    write_config(config_with_layers(config, [SHAPE, dataclasses.replace(SHAPE, mlp_width=31), SHAPE]), base)
    return json.loads((base / "config.json").read_text())


@pytest.mark.parametrize("equal", [True, False])
def test_changed_configs_are_read_or_refused(base, equal, unequal, project):
    document = json.loads((project / "base" / "config.json").read_text()) if equal else unequal
    seen = []

    @fuzzed(2)
    @given(FILES)
    def attempt(how):
        (base / "config.json").write_bytes(variant(document, how))
        seen.append(outcome(lambda: model_shape(load_config(base))))
        seen.append(outcome(lambda: load_model(base)))

    attempt()
    tell("config.json, changed and damaged", seen, 2)


@pytest.mark.parametrize(
    "model_type", ["gemma3_text", "phi3", "smollm3", "olmo2", "mobilellm", "qwen3", "granite"]
)
def test_changed_configs_of_other_families_are_read_or_refused(base, model_type):
    document = json.loads((base / "config.json").read_text()) | {
        "model_type": model_type,
        "sliding_window": 5,
    }
    document |= {"layer_types": ["full_attention"] * 3, "no_rope_layers": [1, 0, 1], "pad_token_id": 0}
    seen = []

    @fuzzed(0.3)
    @given(FILES)
    def attempt(how):
        (base / "config.json").write_bytes(variant(document, how))
        seen.append(outcome(lambda: model_shape(load_config(base))))

    attempt()
    tell("config.json of other families, changed and damaged", seen, 0.3)


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
    document = json.loads((base / "config.json").read_text()) | {name: value}
    (base / "config.json").write_text(json.dumps(document))
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
    document = json.loads((base / "config.json").read_text()) | changes
    (base / "config.json").write_text(json.dumps(document))
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
    seen = []

    def read():
        load_tokenizer(base)
        end_ids(generation_config(base), load_config(base))

    @fuzzed(0.5)
    @given(FILES)
    def attempt(how):
        path.write_bytes(variant(document, how))
        seen.append(outcome(read))

    attempt()
    tell(f"{name}, changed and damaged", seen, 0.5)


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
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


def test_changed_manifests_are_read_or_refused(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_text("a")
    document = json.loads(publish(tmp_path / "files", str(tmp_path / "store")).to_json())
    seen = []

    @fuzzed(3)
    @given(FILES)
    def attempt(how):
        seen.append(outcome(lambda: Manifest.from_json(variant(document, how))))

    attempt()
    tell("MANIFEST.json, changed and damaged", seen, 3)


@pytest.fixture
def run_file(project, tmp_path):
    """A store with a run, and the content of its run.json."""
    from core.recipe import settings_from_dict

    dense = model_shape(load_config(project / "base"))
    Run(
        store=str(tmp_path / "store"),
        key="key",
        settings=settings_from_dict(RECIPE),
        revision="r",
        base_uri="b",
        dense=dense,
        phase_params=(3, 2),
        job="j",
    ).save()
    path = tmp_path / "store" / "runs" / "key" / "run.json"
    return path, json.loads(path.read_text())


def test_changed_run_files_are_read_or_refused(run_file):
    path, document = run_file
    store, seen = str(path.parents[2]), []

    def read():
        list_runs(open_store(store))
        Run.load({"store": store, "key": "key"})

    @fuzzed(3)
    @given(FILES)
    def attempt(how):
        path.write_bytes(variant(document, how))
        seen.append(outcome(read))

    attempt()
    tell("run.json, changed and damaged", seen, 3)


def test_changed_job_files_are_read_or_refused(run_file):
    store, seen = run_file[0].parents[2], []
    path = store / "jobs" / "j.json"
    document = {"store": str(store), "key": "key", "job": "j"}

    @fuzzed()
    @given(FILES)
    def attempt(how):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(variant(document, how))
        seen.append(outcome(lambda: run_finalize(store=str(store), job="j", succeeded=False)))

    attempt()
    tell("the file of an execution, changed and damaged", seen)


def test_changed_plans_are_read_or_refused(tmp_path):
    layer = LayerPlan(query_heads=(0, 1), kv_heads=(0,), mlp_channels=(0, 2, 3))
    plan = Plan(
        layers=(layer, layer),
        before=(SHAPE, SHAPE),
        checkpoint="c",
        statistics="s",
        importance=(0.1, 0.2),
        sparsity=(0.3, 0.4),
        params_before=9,
        params_after=5,
        target_params=5,
    )
    plan.save(tmp_path / "plan.json")
    document, seen = json.loads((tmp_path / "plan.json").read_text()), []

    def read():
        Plan.load(tmp_path / "plan.json").check("c", (SHAPE, SHAPE))

    @fuzzed(3)
    @given(FILES)
    def attempt(how):
        (tmp_path / "plan.json").write_bytes(variant(document, how))
        seen.append(outcome(read))

    attempt()
    tell("plan.json, changed and damaged", seen, 3)


def test_changed_training_states_are_read_or_refused(tmp_path):
    progress = {"losses": [[3, 1.5, 0.1], [4, 1.4, 0.1]], "trained_tokens": 9, "seconds": 0.5}
    document = {"format": 1, "shards": 1, "progress": progress, "belongs_to": {"a": "b"}, "facts": {"c": 1}}
    seen = []

    @fuzzed(3)
    @given(FILES)
    def attempt(how):
        (tmp_path / "state.json").write_bytes(variant(document, how))
        seen.append(outcome(lambda: read_state(tmp_path)))

    attempt()
    tell("state.json of a training, changed and damaged", seen, 3)


def test_changed_leases_expire_or_hold(run_file):
    store = open_store(str(run_file[0].parents[2]))
    lease = Lease(number=1, owner=Owner.of("j"), renewed_s=1e9)
    document = json.loads(lease.to_json())

    @fuzzed(3)
    @given(FILES)
    def attempt(how):
        store.write_bytes("runs/key/_lease/0001.json", variant(document, how))
        assert not outcome(lambda: (read_lease(store, "runs/key").is_live(), list_runs(store)))

    attempt()
    note("Security", "files of a lease, changed and damaged", "the lease counts, or has expired", examples(3))


def test_changed_notes_of_an_upload_do_no_harm(s3_store_uri, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    document = {"a.txt": FileEntry.of(tmp_path, "a.txt").sha256, "b.txt": "0" * 64}
    number = iter(range(10**6))

    @fuzzed(0.3)
    @given(FILES)
    def attempt(how):
        uri = f"{s3_store_uri}/{next(number)}"
        open_store(uri).write_bytes("_UPLOADED.json", variant(document, how))
        assert not outcome(lambda: publish(tmp_path, uri))
        assert open_store(uri).exists("MANIFEST.json")

    attempt()
    note(
        "Security",
        "_UPLOADED.json, changed and damaged",
        "the files were published all the same",
        examples(0.3),
    )


def test_changed_provenance_and_cards_are_read_or_refused(base):
    document = {"base": "b", "phase": 1, "license": "mit", "language": ["en"], "revision": "r"}
    seen = []

    def read():
        known_facts(read_json(base / PROVENANCE))
        card_facts(base / "README.md")
        checkpoint_files(base)

    @fuzzed()
    @given(FILES, VALUES)
    def attempt(how, value):
        (base / PROVENANCE).write_bytes(variant(document, how))
        front = as_bytes(changed(document, [(1, value)]))
        (base / "README.md").write_bytes(b"---\n" + front + b"\n---\n")
        seen.append(outcome(read))

    attempt()
    tell("adapt_pruner.json and the card's front matter, changed and damaged", seen)


@pytest.mark.parametrize(
    "content", [*DEEP, b"a: &a [x]\nb: &b [*a,*a]\n" * 1000, b"? " * 5000], ids=range(len(DEEP) + 2)
)
def test_hostile_cards_say_nothing(tmp_path, content):
    (tmp_path / "README.md").write_bytes(b"---\n" + content + b"\n---\n")
    assert not outcome(lambda: card_facts(tmp_path / "README.md"))


def test_recipes_are_read_or_refused():
    from core.recipe import settings_from_dict

    seen = []

    @fuzzed(3)
    @given(FILES)
    def attempt(how):
        if how[0] != "json":
            return
        data = json.loads(variant(RECIPE, how))
        try:
            settings_from_dict(data)
        except SettingsError as error:
            seen.append(error.problems)

    attempt()
    assert seen
    assert all(problem.isprintable() for problems in seen for problem in problems)
    note("Security", "recipes with changed entries", "read, or refused with one line a problem", examples(3))
