"""The runtimes whose speed is measured; each runs in its own process."""

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from core.errors import CheckpointError
from core.evaluation.speed.workload import Kind, Workload
from core.machine.cores import usable_cores

_SEED = 0


class Torch:
    """A checkpoint's folder in PyTorch, with transformers' own forward pass and cache.

    Attributes:
        device: Where it runs: ``cpu`` or ``cuda``.
        load_s: Seconds that loading took.
    """

    def __init__(self, path: Path, workload: Workload, device: str) -> None:
        """Load the model and note how long that took."""
        import torch

        from core.model.build import dtype_of, load_model
        from core.model.checkpoint import Checkpoint

        torch.set_num_threads(workload.threads or usable_cores())
        checkpoint = Checkpoint(path)  # importing transformers takes seconds, which are not part of loading
        from transformers.modeling_utils import PreTrainedModel  # noqa: F401

        from core.model.decoder import empty_cache

        self._empty_cache = empty_cache
        self._torch, self._workload, self.device = torch, workload, device
        self._empty_bytes = psutil.Process().memory_info().rss
        start = time.perf_counter()
        self._model: Any = load_model(checkpoint, dtype=dtype_of(workload.dtype), device=device)
        self._wait()
        self.load_s = time.perf_counter() - start
        vocabulary = int(self._model.config.vocab_size)
        shape = (max(workload.batches), workload.prompt_tokens)
        generator = torch.Generator().manual_seed(_SEED)
        self._tokens = torch.randint(vocabulary, shape, generator=generator).to(device)

    def time(self, kind: Kind, batch: int) -> float:
        """Return the seconds of one job."""
        cache = self._empty_cache(self._model)
        with self._torch.inference_mode():
            self._wait()
            start = time.perf_counter()
            out = self._model(self._tokens[:batch], use_cache=True, logits_to_keep=1, **cache)
            self._wait()
            if kind == "prompt":
                return time.perf_counter() - start
            start = time.perf_counter()
            for _ in range(self._workload.new_tokens):
                out = self._model(out.logits.argmax(dim=-1), use_cache=True, logits_to_keep=1, **cache)
            self._wait()
            return time.perf_counter() - start

    def peak_bytes(self) -> int:
        """Return the most memory that the model took, of the device or of this process."""
        if self.device == "cuda":
            return int(self._torch.cuda.max_memory_allocated())
        return peak_rss_bytes() - self._empty_bytes

    def _wait(self) -> None:
        if self.device == "cuda":
            self._torch.cuda.synchronize()


class LlamaCpp:
    """A GGUF file in llama.cpp, through the Python package xllamacpp.

    Attributes:
        device: Where it runs: ``cpu``, or the accelerator llama.cpp was built for, such as ``cuda``.
        load_s: Seconds that loading took.
    """

    def __init__(self, path: Path, workload: Workload, device: str) -> None:
        """Load the model and note how long that took."""
        import xllamacpp

        parallel = max(workload.batches)
        # llama.cpp divides the context among the sequences, in whole blocks.
        length = 256 * math.ceil((workload.prompt_tokens + workload.new_tokens + 1) / 256)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel, params.n_ctx = parallel, parallel * length
        threads = workload.threads or usable_cores()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup, params.ui, params.verbosity, params.fit_params = False, False, -1, False
        self.device = "cpu" if device == "cpu" else accelerator_of(xllamacpp.get_device_info())
        if self.device == "cpu":
            params.n_gpu_layers = 0
        self._workload = workload
        self._empty_bytes = psutil.Process().memory_info().rss
        start = time.perf_counter()
        self._server = xllamacpp.Server(params)
        self.load_s = time.perf_counter() - start
        self._pool = ThreadPoolExecutor(parallel)

    def time(self, kind: Kind, batch: int) -> float:
        """Return the seconds of one job: until all prompts are read, or decoding by llama.cpp's own clock.

        Prompts of a batch are not read at the same time, so the sequence that begins first waits for the
        prompts of the others. The last one, whose time is the shortest, decodes beside all others.
        """
        new_tokens = 1 if kind == "prompt" else self._workload.new_tokens + 1
        start = time.perf_counter()
        answers = list(self._pool.map(self._complete, range(batch), [new_tokens] * batch))
        if kind == "prompt":
            return time.perf_counter() - start
        return min(float(answer["timings"]["predicted_ms"]) for answer in answers) / 1000

    def _complete(self, row: int, new_tokens: int) -> Any:
        prompt = [1 + (row * 131 + position * 17) % 199 for position in range(self._workload.prompt_tokens)]
        answer = self._server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": new_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
                "id_slot": row,
            }
        )
        if "timings" not in answer:
            raise CheckpointError(f"llama.cpp answered {answer}. Check the GGUF file.")
        return answer

    def peak_bytes(self) -> int:
        """Return the most memory that the model took of this process, mapped files included."""
        return peak_rss_bytes() - self._empty_bytes


def accelerator_of(devices: Sequence[Mapping[str, Any]]) -> str:
    """Return what llama.cpp runs on by default: ``cpu`` (PyPI's build) or an accelerator such as ``cuda``.

    Args:
        devices: The devices llama.cpp finds, by ``name`` (such as CPU or CUDA0) and ``type``.
    """
    names = [str(device["name"]) for device in devices if device["type"].name.endswith("GPU")]
    return names[0].rstrip("0123456789").lower() if names else "cpu"


def peak_rss_bytes() -> int:
    """Return the most memory that this process ever held.

    Linux's getrusage would include what the parent held when it started this process.
    """
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
