"""Raw logits and llama.cpp's own quantizer, by llama-cpp-python, in whichever interpreter has it.

It takes ten minutes to build, so it may live in an environment of its own: LLAMA_CPP_PYTHON names its python.
This file imports nothing of the project, since that interpreter has nothing of it.
"""

import ctypes
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np


def interpreter():
    """Return the command that has llama-cpp-python, or None."""
    return os.environ.get("LLAMA_CPP_PYTHON") or (sys.executable if find_spec("llama_cpp") else None)


def run(command, **arguments):
    """Call ``logits`` or ``quantize`` of this file in that interpreter."""
    call = json.dumps([command, {name: _plain(value) for name, value in arguments.items()}])
    done = subprocess.run([interpreter(), __file__, call], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def _plain(value):
    return value if isinstance(value, int | list) else str(value)


def logits(path, tokens, out):
    """Save the logits of all positions: of one pass over all tokens, and of passes of one token each."""
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    at_once = _decode(model, [tokens], vocab_size)
    one_by_one = _decode(model, [[token] for token in tokens], vocab_size)
    np.savez(out, at_once=at_once, one_by_one=one_by_one)


def _decode(model, passes, vocab_size):
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, 512
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    rows, position = [], 0
    for tokens in passes:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        assert llama_cpp.llama_decode(context, batch) == 0
        for i in range(len(tokens)):
            row = llama_cpp.llama_get_logits_ith(context, i)
            rows.append(np.ctypeslib.as_array(row, shape=(vocab_size,)).copy())
        position += len(tokens)
        llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return np.stack(rows)


def quantize(path, out, kind):
    """Let llama.cpp quantize a file, as its llama-quantize does."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    assert llama_cpp.llama_model_quantize(path.encode(), out.encode(), ctypes.byref(params)) == 0


if __name__ == "__main__":
    name, keywords = json.loads(sys.argv[1])
    {"logits": logits, "quantize": quantize}[name](**keywords)
