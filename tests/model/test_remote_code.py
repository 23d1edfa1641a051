import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, dynamic_module_utils
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.models.llama import modeling_llama

from core.model.build import load_model
from core.model.checkpoint import save_model
from core.model.families import FAMILIES
from core.model.modeling_unequal_layers import build_unequal_layers
from core.model.remote_code import MODULE, stock_classes
from core.model.shape import LayerShape
from tests.support.models import CONFIGS, UNEQUAL, random_tokens, tiny

ROOT = Path(__file__).resolve().parents[2]
MLP_ONLY = tuple(LayerShape(query_heads=6, kv_heads=3, mlp_width=width) for width in (31, 40, 7))
OLDEST = "5.0.0"


def unequal(name, **kwargs):
    return tiny(name, MLP_ONLY if name == "olmo2" else UNEQUAL, **kwargs)


def write(model, folder):
    save_model(model, folder, companions=None, provenance={})
    return folder


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """transformers copies the code that it runs; here, into a folder of the test's own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_transformers_gives_the_same_bits(name, tmp_path, modules_cache):
    model, tokens = unequal(name), random_tokens()
    stock = AutoModelForCausalLM.from_pretrained(write(model, tmp_path / name), trust_remote_code=True)
    assert stock.__module__.endswith(MODULE)
    assert torch.equal(stock(tokens).logits, model(tokens).logits)


def test_layers_of_equal_size_with_output_biases_need_the_code_too(tmp_path, modules_cache):
    model, tokens = tiny("llama-output-biases"), random_tokens()
    folder = write(model, tmp_path / "model")
    trusted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(trusted(tokens).logits, model(tokens).logits)
    plain = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert plain.model.layers[0].mlp.down_proj.bias is None  # transformers warns, and leaves them out


def test_the_code_is_refused_to_those_who_do_not_trust_it(tmp_path):
    folder = write(unequal("llama"), tmp_path / "model")
    with pytest.raises((ValueError, RuntimeError)):  # the stock class expects layers of equal size
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_a_version_that_loses_tied_weights_is_refused(tmp_path, modules_cache, monkeypatch):
    tied = write(unequal("llama-tied"), tmp_path / "tied")
    untied = write(unequal("llama"), tmp_path / "untied")
    # What an import gives now; transformers puts another object in its place while it is first imported.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.3.1")
    with pytest.raises(ImportError, match=r"install 5\.4 or newer"):
        AutoModelForCausalLM.from_pretrained(tied, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(untied, trust_remote_code=True)


def test_this_package_needs_no_flag_and_runs_no_code_of_the_checkpoint(tmp_path):
    model, tokens = unequal("llama"), random_tokens()
    folder = write(model, tmp_path / "model")
    (folder / f"{MODULE}.py").write_text("raise SystemExit('it ran')")
    assert torch.equal(load_model(folder)(tokens).logits, model(tokens).logits)


def test_layers_of_equal_size_make_a_plain_checkpoint(tmp_path):
    same = [LayerShape(query_heads=6, kv_heads=3, mlp_width=33)] * 3
    model, tokens = tiny("llama", same), random_tokens()
    folder = write(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"auto_map", "per_layer_config"} & set(config)
    assert not list(folder.glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(stock(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_no_runtime_takes_unequal_layers_for_a_model_that_it_knows(name, tmp_path):
    config = json.loads((write(unequal(name), tmp_path / "model") / "config.json").read_text())
    (architecture,) = config["architectures"]
    assert not hasattr(transformers, architecture)
    # vLLM looks for all three, and builds the model by the second.
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["auto_map"]["AutoModelForCausalLM"] == f"{MODULE}.{architecture}"


def test_code_that_a_base_model_brought_along_goes(tmp_path):
    folder = write(tiny("phi3"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_phi3.Phi3Config"}
    (folder / "config.json").write_text(json.dumps(config))
    again = write(load_model(folder), tmp_path / "again")
    assert "auto_map" not in json.loads((again / "config.json").read_text())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_stock_classes_are_those_of_transformers(model_type):
    config = CONFIG_MAPPING[model_type]
    assert stock_classes(config()) == {
        "AutoConfig": config.__name__,
        "AutoModel": MODEL_MAPPING_NAMES[model_type],
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type],
    }


def test_the_loader_steps_aside_where_transformers_builds_unequal_layers(monkeypatch):
    model = unequal("llama")

    class Layer(modeling_llama.LlamaDecoderLayer):
        def __init__(self, config, layer_idx):
            own = config.per_layer_config[layer_idx] if config.is_heterogeneous else config
            super().__init__(own, layer_idx)

    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", Layer)
    learned = modeling_llama.LlamaForCausalLM(model.config)
    layers = list(learned.model.layers)
    assert not build_unequal_layers(learned)
    assert all(now is then for now, then in zip(learned.model.layers, layers, strict=True))
    monkeypatch.undo()
    unlearned = modeling_llama.LlamaForCausalLM(model.config)
    assert build_unequal_layers(unlearned)


def environment_without_this_package(folder, version):
    """A virtual environment with a transformers of its own; torch and the like come from this one."""
    venv.create(folder)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    # A folder that is named here is searched, but not what is installed in place there, as this package is.
    (Path(own.stdout.strip()) / "shared.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run(
        [sys.executable, "-m", "pip", f"--python={python}", "install", "-q", f"transformers=={version}"],
        check=True,
    )
    return python


@pytest.mark.slow
@pytest.mark.parametrize("version", [OLDEST, transformers.__version__])
def test_everything_works_without_this_package(version, tmp_path):
    names = [name for name in CONFIGS if (version, name) != (OLDEST, "phi3-longrope")]  # it cannot read that
    folders = [tmp_path / name for name in names]
    for name, folder in zip(names, folders, strict=True):
        model, tokens = unequal(name, dtype=torch.float32), random_tokens()
        write(model, folder)
        save_file(
            {"tokens": tokens, "logits": model(tokens).logits.detach().contiguous()},
            folder / "expected.safetensors",
            metadata={"attention": model.config._attn_implementation},
        )
    python = environment_without_this_package(tmp_path / "venv", version)
    result = subprocess.run(
        [python, ROOT / "tests" / "support" / "stock_transformers.py", *folders],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["transformers"] == version
    assert {Path(folder).name: problems for folder, problems in report["problems"].items()} == {
        name: [] for name in names
    }
