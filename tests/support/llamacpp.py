"""llama.cpp, by its Python package xllamacpp: what it makes of texts and tokens.

One child process loads all files and keeps them until it ends: a failed assertion in llama.cpp aborts its
process, and taking a server of xllamacpp down sometimes hangs.
"""

import json
import os
import subprocess
import sys
import urllib.request
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def serve():
    """Load each file that standard input names, and answer where it is served; end with the input."""
    for line in sys.stdin:
        try:
            server = _load(json.loads(line))
            answer = {"address": server.listening_address}
            _KEPT.append(server)
        except Exception as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
    os._exit(0)


_KEPT: list = []


def _load(path):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx = path, 1024
    params.n_gpu_layers, params.fit_params = 0, False
    params.warmup, params.ui, params.verbosity = False, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    # Flash attention on a CPU rounds queries to float16.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


@cache
def _child():
    # It ends when its input does, so with this process in any case.
    command = [sys.executable, "-c", "from tests.support.llamacpp import serve; serve()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


class LlamaCpp:
    """A GGUF file, loaded on one CPU thread, all of whose arithmetic is in float32."""

    def __init__(self, path):
        child = _child()
        print(json.dumps(str(path)), file=child.stdin, flush=True)
        answer = json.loads(child.stdout.readline() or '{"error": "the process of llama.cpp has ended"}')
        if "error" in answer:
            _child.cache_clear()
            child.stdin.close()
            child.wait()
            raise RuntimeError(f"{path}: {answer['error']}")
        self._address = answer["address"]

    def tokenize(self, text, *, add_special=True):
        body = {"content": text, "parse_special": True, "add_special": add_special}
        return self._post("/tokenize", body)["tokens"]

    def detokenize(self, tokens):
        return self._post("/detokenize", {"tokens": tokens})["content"]

    def chat_prompt(self, messages):
        return self._post("/apply-template", {"messages": messages})["prompt"]

    def generate(self, prompt, tokens, *, num_probs=0, banned=()):
        """Decode greedily; return the text, the tokens and for each the log-probabilities by token id.

        The first comes out of the prompt's pass, all others out of passes of one token. The server tells no
        probabilities of tokens that are part of a character: they can be banned, which leaves the
        probabilities as they are.
        """
        answer = self._post(
            "/completion",
            {
                "prompt": prompt,
                "n_predict": tokens,
                "temperature": 0.0,
                "n_probs": num_probs,
                "cache_prompt": False,
                "return_tokens": True,
                "logit_bias": [[token, False] for token in banned],
            },
        )
        probabilities = [
            {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}
            for position in answer.get("completion_probabilities", [])
        ]
        return answer["content"], answer["tokens"], probabilities

    def _post(self, path, body):
        request = urllib.request.Request(
            self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)
