"""One row of where_zeros_pay.py, in a process of its own: `zeros_worker.py ENGINE MODEL REQUEST`, which is JSON.

Engines are `transformers` and `secateur` (folders), and `llama.cpp` (GGUF files), which imports nothing of ours, so
that it runs in the environment of llama-cpp-python. Memory is what the resident set has grown by from before loading
to after the last repetition, mapped files included.
"""

import contextlib
import ctypes
import json
import os
import sys
import time
from typing import Any

import numpy


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def cross_entropy(logits: numpy.ndarray, ids: numpy.ndarray) -> float:
    """The mean over the tokens after the first, in nats."""
    logits = logits[:-1].astype(numpy.float64)
    greatest = logits.max(axis=1)
    sums = numpy.log(numpy.exp(logits - greatest[:, None]).sum(axis=1)) + greatest
    return float((sums - logits[numpy.arange(len(logits)), ids[1:]]).mean())


class Torch:
    """A model of transformers, as transformers loads it or as `secateur.load` does."""

    def __init__(self, engine: str, path: str, request: dict[str, Any]) -> None:
        import torch
        import transformers

        import secateur

        self.torch = torch
        torch.set_num_threads(request["threads"])
        torch.set_grad_enabled(False)
        self.version = transformers.__version__ if engine == "transformers" else secateur.__version__
        torch.ones(64, 64) @ torch.ones(64, 64)  # what the libraries themselves set up is not the model's
        self.before = resident()
        if engine == "transformers":
            loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, request["dtype"]))
            self.model: Any = loaded.eval()
        else:
            self.model = secateur.load(path, device="cpu", dtype=request["dtype"], backend="packed")

    def losses(self, windows: numpy.ndarray) -> list[float]:
        """The cross-entropy of each window."""
        found = []
        for ids in windows:
            logits = self.model(input_ids=self.torch.from_numpy(ids)[None].long(), use_cache=False).logits[0]
            found.append(cross_entropy(logits.float().numpy(), ids))
        return found

    def read(self, ids: numpy.ndarray) -> None:
        """Read a prompt into an empty cache."""
        tokens = self.torch.from_numpy(ids)[None].long()
        self.output = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        self.token = self.output.logits[:, -1:].argmax(dim=-1)

    def write(self) -> None:
        """Decode one token, the likeliest."""
        self.output = self.model(input_ids=self.token, past_key_values=self.output.past_key_values, use_cache=True)
        self.token = self.output.logits[:, -1:].argmax(dim=-1)


class LlamaCpp:
    """A GGUF file in llama.cpp, by its functions in C; the cache is emptied before each prompt."""

    def __init__(self, path: str, request: dict[str, Any]) -> None:
        import llama_cpp

        self.lib, self.version = llama_cpp, f"by llama-cpp-python {llama_cpp.__version__}"
        self.silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silence, None)
        llama_cpp.llama_backend_init()
        self.before = resident()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = 1024
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = request["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            sys.exit(f"llama.cpp cannot load {path}")
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _decode(self, ids: numpy.ndarray, *, all_logits: bool = False) -> numpy.ndarray:
        """Logits (tokens, words), of the last token or of all."""
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = int(token), self.position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = all_logits or i == len(ids) - 1
        failed = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        if failed:
            sys.exit(f"llama_decode returned {failed}")
        self.position += len(ids)
        rows = len(ids) if all_logits else 1
        return numpy.ctypeslib.as_array(self.lib.llama_get_logits(self.context), shape=(rows, self.words))

    def _forget(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.position = 0

    def losses(self, windows: numpy.ndarray) -> list[float]:
        """The cross-entropy of each window."""
        found = []
        for ids in windows:
            self._forget()
            found.append(cross_entropy(self._decode(ids, all_logits=True), ids))
        return found

    def read(self, ids: numpy.ndarray) -> None:
        """Read a prompt into an empty cache."""
        self._forget()
        self.token = self._decode(ids)[-1].argmax()

    def write(self) -> None:
        """Decode one token, the likeliest."""
        self.token = self._decode(numpy.array([self.token]))[-1].argmax()


def quantise(path: str, request: dict[str, Any]) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = request["number"], request["threads"]
    failed = llama_cpp.llama_model_quantize(path.encode(), request["quantise"].encode(), ctypes.byref(parameters))
    if failed:
        sys.exit(f"llama_model_quantize returned {failed}")


def main() -> dict[str, Any]:
    name, path, text = sys.argv[1:]
    request = json.loads(text)
    if "quantise" in request:
        quantise(path, request)
        return {}
    engine = LlamaCpp(path, request) if name == "llama.cpp" else Torch(name, path, request)
    if "windows" in request:
        return {"version": engine.version, "window_nats": engine.losses(numpy.load(request["windows"]))}
    generator = numpy.random.default_rng(0)
    prefill, decode = [], []
    clock = time.process_time if request["processor_time"] else time.perf_counter
    for repetition in range(-1, request["repetitions"]):  # the first one warms up
        started = clock()
        engine.read(generator.integers(3, 49152, request["prompt"]))
        read = clock()
        steps = request["decode"] if repetition >= 0 else 2
        for _ in range(steps):
            engine.write()
        if repetition >= 0:
            prefill.append(request["prompt"] / (read - started))
            decode.append(steps / (clock() - read))
    memory = resident() - engine.before
    return {"version": engine.version, "memory": memory, "prefill_rates": prefill, "decode_rates": decode}


if __name__ == "__main__":
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        answer = main()
    print(json.dumps(answer))
