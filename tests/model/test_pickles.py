"""Pickles and code in a checkpoint: whatever is done with it, they never run."""

import ast
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import dynamic_module_utils

from core.bases.importing import import_base
from core.errors import CheckpointError
from core.export.gguf import export_gguf
from core.export.hub_files import checkpoint_files
from core.model.build import load_model, load_tokenizer
from core.model.checkpoint import INDEX
from core.settings import includes
from core.settings.model import ModelSettings
from core.steps.prepare_data import run_prepare_data
from core.storage.publication import open_publication
from pipelines.cli import main
from tests.support.evidence import note
from tests.support.fuzzing import outcome
from tests.support.project import recipe_with, resolve

ROOT = Path(__file__).resolve().parents[2]
PICKLES = (
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "x.ckpt",
    "x.pkl",
)


class Trap:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


CODE = """
import pathlib
pathlib.Path({canary!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
from transformers import PreTrainedTokenizerFast as Tokenizer
"""


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture(autouse=True)
def nothing_runs(canary, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield
    assert not canary.exists(), "code of the checkpoint has run"


def plant_pickles(base, canary):
    for name in PICKLES:
        torch.save({"weight": torch.ones(2), "trap": Trap(canary)}, base / name)
    (base / "old.pickle").write_bytes(pickle.dumps(Trap(canary)))
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    (base / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "auto_mapping": {}}))
    torch.save({"trap": Trap(canary)}, base / "adapter_model.bin")


def plant_code(base, canary):
    for name in ("evil", "modeling_llama", "configuration_llama", "tokenization_llama", "__init__"):
        (base / f"{name}.py").write_text(CODE.format(canary=str(canary)))
    edit(base / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    edit(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    edit(base / "generation_config.json", custom_generate="evil", auto_map={"AutoModel": "evil.Model"})
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text(CODE.format(canary=str(canary)))


def edit(path, **changes):
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | changes))


def plant_both(base, canary):
    plant_pickles(base, canary)
    plant_code(base, canary)


def test_the_traps_work(tmp_path, canary):
    plant_pickles(tmp_path, canary)
    for name in ("pytorch_model.bin", "optimizer.pt"):
        torch.load(tmp_path / name, weights_only=False)
        assert canary.exists()
        canary.unlink()
    plant_code(tmp_path, canary)
    exec((tmp_path / "evil.py").read_text())
    assert canary.exists()
    canary.unlink()


COMMANDS = {
    "inspect": ["inspect", "base"],
    "evaluate a text": ["evaluate", "base", "--text", "held-out.txt"],
    "evaluate a task": ["evaluate", "base", "--recipe", "tasks.yaml"],
    "benchmark": ["benchmark", "base", "--against", "base", "--runtime", "torch", "--rounds", "1"],
    "generate": ["generate", "base", "hello", "--max-new-tokens", "2"],
    "export gguf": ["export", "base", "out.gguf", "--format", "gguf"],
    "export padded": ["export", "base", "out", "--format", "padded"],
    "export decilm": ["export", "base", "out", "--format", "decilm"],
    "export onnx": ["export", "base", "out", "--format", "onnx"],
}


SLOW = ("benchmark", "export onnx")


def commands(*without):
    names = [name for name in COMMANDS if name not in without]
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def write_tasks(folder):
    item = {
        "id": "1",
        "question": "x?",
        "answerKey": "A",
        "choices": {"text": ["y", "z"], "label": ["A", "B"]},
    }
    (folder / "arc" / "validation").mkdir(parents=True)
    (folder / "arc" / "validation" / "data.jsonl").write_text(json.dumps(item) + "\n")
    evaluation = {"tasks": ["arc_easy"], "task_data": {"arc_easy": "arc"}, "precision": "float32"}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(recipe_with({"evaluation": evaluation})))


def call(arguments):
    # If a question comes whether to run the code, the answer is yes.
    return CliRunner().invoke(main, arguments, input="y\n" * 20)


@pytest.mark.parametrize("command", commands())
@pytest.mark.parametrize("plant", [plant_pickles, plant_code])
def test_commands_leave_pickles_and_code_alone(folder, canary, command, plant):
    write_tasks(folder)
    plant(folder / "base", canary)
    done = call(COMMANDS[command])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert "Do you wish to run" not in done.output
    if done.exit_code:
        assert done.stderr.splitlines()[-1].startswith("error: ")
    if command not in ("export decilm", "export onnx") and plant is plant_pickles:
        assert done.exit_code == 0, done.output
    for written in folder.glob("out/**/*"):
        assert written.suffix not in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
        assert "pathlib" not in written.read_text(errors="ignore")
    kind = "pickles" if plant is plant_pickles else "code that its configs name"
    note("Security", f"a checkpoint with {kind} beside its weights, under {command}", "nothing of it ran")


@pytest.mark.parametrize("command", commands("inspect"))
def test_commands_refuse_a_checkpoint_of_pickles_alone(folder, canary, command):
    write_tasks(folder)
    plant_pickles(folder / "base", canary)
    (folder / "base" / "model.safetensors").unlink()
    done = call(COMMANDS[command])
    assert done.exit_code == 1, done.output
    line = done.stderr.splitlines()[-1]
    if command != "export decilm":  # which refuses the sizes of this model first
        assert line.startswith("error: base ")
        assert "base holds only pickles (adapter_model.bin, " in line
        assert "can run code when they are loaded" in line
        assert "convert it where its pickles are trusted" in line
        note("Security", "a checkpoint of pickles alone, under every command", "refused with one line")


def torch_pickle(path, canary):
    torch.save({"trap": Trap(canary)}, path)


def plain_pickle(path, canary):
    path.write_bytes(pickle.dumps(Trap(canary)))


def archive(path, canary):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", pickle.dumps(Trap(canary)))


@pytest.mark.parametrize("disguise", [torch_pickle, plain_pickle, archive])
def test_a_pickle_named_safetensors_is_refused(folder, canary, disguise):
    disguise(folder / "base" / "model.safetensors", canary)
    for read in (lambda: resolve(recipe_with({})), lambda: load_model(folder / "base")):
        assert "model.safetensors is not a valid safetensors file" in outcome(read)
    assert not (folder / "store" / "bases").exists()
    note("Security", "a pickle or zip archive named model.safetensors", "refused with one line")


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "optimizer.pt", "x.pkl"])
def test_an_index_that_names_a_pickle_is_refused(folder, canary, shard):
    plant_pickles(folder / "base", canary)
    weights = {"model.norm.weight": "model.safetensors", "lm_head.weight": shard}
    (folder / "base" / INDEX).write_text(json.dumps({"weight_map": weights}))
    for read in (lambda: resolve(recipe_with({})), lambda: load_model(folder / "base")):
        assert f"names {shard}, which is not a safetensors file (pickles are never read)" in outcome(read)
    note("Security", "an index that names a pickle as a shard", "refused with one line")


def test_a_base_model_is_taken_up_without_its_pickles_and_code(folder, canary):
    plant_both(folder / "base", canary)
    run, uri = resolve(recipe_with({}))
    names = set(open_publication(uri).manifest.paths)
    assert "model.safetensors" in names
    assert not [
        name for name in names if Path(name).suffix in {*map(lambda n: Path(n).suffix, PICKLES), ".py"}
    ]
    said = outcome(lambda: run_prepare_data(run=run, base_uri=uri))
    note("Security", "a base model with pickles and code beside its weights", "taken up without them")
    assert not said or "tokenizer" in said


def test_a_tokenizer_with_code_of_its_own_does_not_run_it(folder, canary):
    plant_code(folder / "base", canary)
    edit(folder / "base" / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    outcome(lambda: load_tokenizer(folder / "base"))
    call(COMMANDS["generate"])
    (folder / "base" / "tokenizer.json").unlink()
    assert "no tokenizer that can be loaded" in outcome(lambda: load_tokenizer(folder / "base"))
    note("Security", "a tokenizer with code of its own", "it did not run")


def test_what_lies_beside_a_gguf_file_is_not_read(folder, canary, tmp_path):
    export_gguf(folder / "base", tmp_path / "model.gguf")
    place = shutil.copytree(folder / "base", tmp_path / "place")
    plant_both(place, canary)
    shutil.copyfile(tmp_path / "model.gguf", place / "model.gguf")
    uri, _ = import_base(ModelSettings(base=str(place / "model.gguf")), str(tmp_path / "store"))
    load_model(open_publication(uri).fetch(tmp_path / "fetched"))
    note("Security", "a GGUF file with pickles, code and an adapter beside it", "taken up alone")


def test_pickles_do_not_go_to_the_hub(folder, canary):
    plant_pickles(folder / "base", canary)
    with pytest.raises(CheckpointError, match="holds pickles, which can run code where they are loaded"):
        checkpoint_files(folder / "base")
    note("Security", "a push of a folder with pickles", "refused with one line")


MODULES = ("pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle", "_pickle")
CALLS = (
    *("torch.load", "numpy.load", "np.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "eval", "exec", "compile", "__import__"),
)


def faults_of(source):
    """What in a Python source could run what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            yield from (name for name in names if name.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in CALLS:
            yield name
        if keywords.get("trust_remote_code", "False") != "False" or keywords.get("shell", "False") != "False":
            yield f"{name}({keywords})"
        loads = name.endswith((".from_pretrained", ".from_config"))
        # None: keywords that stand in a dict, as those for a GGUF file.
        if loads and not {"trust_remote_code", None} & keywords.keys():
            yield f"{name} without trust_remote_code"


def test_no_source_reads_pickles_or_trusts_code():
    assert list(faults_of("import pickle\ntorch.load(x)\neval('1')\nA.from_pretrained(p)")) == [
        "pickle",
        "torch.load",
        "eval",
        "A.from_pretrained without trust_remote_code",
    ]
    assert list(faults_of("f(trust_remote_code=True)"))
    sources = [path for name in ("core", "pipelines", "components") for path in (ROOT / name).rglob("*.py")]
    assert len(sources) > 80
    found = {str(path.relative_to(ROOT)): list(faults_of(path.read_text())) for path in sources}
    assert issubclass(includes._Loader, yaml.SafeLoader)
    allowed = {"core/settings/includes.py": ["yaml.load"]}  # with that loader
    assert {name: faults for name, faults in found.items() if faults} == allowed
    note(
        "Security",
        "a search of all sources for calls that unpickle, evaluate or trust code",
        "none found",
        len(sources),
    )
