"""What we use of libraries beyond what they document: each name is there, and each library is capped."""

import ast
import importlib
import inspect
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for package in ("core", "components", "pipelines") for path in (ROOT / package).rglob("*.py")]

INSIDES = {
    "boto3": ["boto3.s3.transfer.create_transfer_manager"],
    "gguf": ["gguf.utility.size_label", "gguf.gguf_writer.GGUFWriter: fout"],
    "kfp": [
        "kfp.client.client.Client._load_context_setting_or_default",
        "kfp.client.client.Client: _context_setting",
        "kfp.dsl.base_component.BaseComponent",
    ],
    "lm-eval": [
        "lm_eval.api.model.CacheHook.add_partial",
        "lm_eval.api.task.tqdm",
        "lm_eval.models.huggingface.HFLM._loglikelihood_tokens",
        "lm_eval.tasks.TaskManager.task_index",
    ],
    "torch": [
        "torch._dynamo",
        "torch._subclasses.fake_tensor.FakeTensorMode",
        "torch.fx.experimental._config",
        "torch.utils._python_dispatch.TorchDispatchMode",
        "torch.utils._pytree.tree_leaves",
    ],
    "transformers": [
        "transformers.PreTrainedConfig._attn_implementation",
        "transformers.PreTrainedConfig.is_heterogeneous",
        "transformers.PreTrainedModel._supports_flash_attn",
        "transformers.initialization.no_init_weights",
        "transformers.modeling_utils.local_torch_dtype",
    ],
}
"""``module.name``; after a colon, an attribute of the class's instances."""


def resolve(dotted):
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(dotted)


@pytest.mark.parametrize("name", [name for names in INSIDES.values() for name in names])
def test_what_we_use_of_a_librarys_insides_is_there(name):
    dotted, _, attribute = name.partition(": ")
    found = resolve(dotted)
    assert not attribute or f"self.{attribute} = " in inspect.getsource(found)


def test_libraries_whose_insides_we_use_are_capped():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    capped = {r.name for r in map(Requirement, declared) if any(s.operator == "<" for s in r.specifier)}
    assert set(INSIDES) <= capped


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def test_every_private_name_that_we_use_and_do_not_define_is_named_here():
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and is_private(node.attr)]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    defined |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    foreign = {node.attr for node in attributes if node.attr not in defined}
    foreign |= {  # we override it, and call what we have overridden
        node.attr
        for node in attributes
        if isinstance(node.value, ast.Call) and "super" in ast.dump(node.value)
    }
    foreign |= {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if is_private(alias.name)
    }
    named = {name.replace(": ", ".").rpartition(".")[2] for names in INSIDES.values() for name in names}
    documented = {"_exit", "_asdict", "_replace"}  # of os, and of named tuples
    assert foreign - named - documented - {"_shared"} == set()  # our own, set through __dict__
