"""How a result is loaded in each runtime: the part of its model card with code in it."""

from collections.abc import Collection, Iterator

_PROMPT = "The capital of France is"


def usage(*, model_type: str, unequal: bool, formats: Collection[str]) -> str:
    """Return a section for each runtime that can load the checkpoint, with what to type there.

    Args:
        model_type: Of its config.
        unequal: Whether its layers differ in size.
        formats: Formats of ``adapt-pruner export`` that hold such a model.
    """
    layers = (
        "Its layers differ in size. `config.json` says how (`per_layer_config`), and "
        "`modeling_unequal_layers.py`, which lies beside it, builds them out of transformers' own classes."
        if unequal
        else f"Its layers are all alike: it is a plain `{model_type}` checkpoint, and what loads that family "
        "loads it."
    )
    where = (
        "Where the code says `.`, name its folder; in transformers and vLLM also its repository on the hub."
    )
    sections = [_transformers(unequal), _this_package(), *_exports(unequal, formats)]
    return "\n\n".join(["## Use it", f"{layers} {where}", *sections])


def _transformers(unequal: bool) -> str:
    trust = ", trust_remote_code=True" if unequal else ""
    code = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForCausalLM.from_pretrained("."{trust})
prompt = tokenizer("{_PROMPT}", return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=20)
print(tokenizer.decode(answer[0], skip_special_tokens=True))"""
    version = " 5.0 or newer" if unequal else ""
    return f"### transformers{version}\n\n{_block('python', code)}"


def _this_package() -> str:
    code = f"""\
from pathlib import Path

from core.model.build import load_model, load_tokenizer

model, tokenizer = load_model(Path(".")), load_tokenizer(Path("."))
prompt = tokenizer("{_PROMPT}", return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=20)
print(tokenizer.decode(answer[0], skip_special_tokens=True))"""
    return (
        "### adapt-pruner\n\nThe package that made it runs no code of the checkpoint, and has commands for "
        f'it (`adapt-pruner generate . "{_PROMPT}"`):\n\n{_block("python", code)}'
    )


def _exports(unequal: bool, formats: Collection[str]) -> Iterator[str]:
    if "gguf" in formats:
        code = f'adapt-pruner export . model.gguf --format gguf\nllama-cli -m model.gguf -p "{_PROMPT}"'
        yield (
            "### llama.cpp\n\nThe export says so if llama.cpp lacks something that this model needs, such as "
            f"its tokenizer.\n\n{_block('bash', code)}"
        )
    if not unequal:
        yield f"### vLLM\n\n{_block('bash', 'vllm serve .')}"
        return
    yield (
        f"### vLLM\n\n{_block('bash', 'vllm serve . --trust-remote-code')}\n\nThis goes through vLLM's "
        "Transformers backend, which reads the sizes of each layer. A model of this kind, a Llama, ran in "
        "vLLM 0.32 on CPUs with the answers of PyTorch; GPUs were not tried."
    )
    if "decilm" in formats:
        code = "adapt-pruner export . decilm --format decilm\nvllm serve decilm --trust-remote-code"
        yield (
            "### vLLM, SGLang, TensorRT-LLM and MLX by their own kernels\n\nIts widths fit the DeciLM format:"
            f"\n\n{_block('bash', code)}"
        )
    if "padded" in formats:
        code = "adapt-pruner export . padded --format padded"
        yield (
            "### Everything else\n\nZeros make all layers as large as the largest. The answers stay the "
            f"same, at the memory and speed of a larger model.\n\n{_block('bash', code)}"
        )


def _block(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"
