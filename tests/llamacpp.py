"""llama.cpp in this process, by its Python package xllamacpp: what it makes of texts and tokens."""

import json
import urllib.request

import xllamacpp


class LlamaCpp:
    """A GGUF file, loaded on one CPU thread, all of whose arithmetic is in float32."""

    def __init__(self, path, *, context=512):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_gpu_layers, params.fit_params = 0, False
        params.warmup, params.ui, params.verbosity = False, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Flash attention on a CPU rounds queries to float16.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # A server that a failed test's traceback keeps alive can hold up the end of the process.
        self._server = None

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
            self._server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)
