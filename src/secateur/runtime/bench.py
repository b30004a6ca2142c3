"""`bench`: sizes and speeds of models, packed ones beside what they are when they are expanded."""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from secateur.errors import CheckpointError, SecateurError
from secateur.files.folders import locate
from secateur.files.packed import is_packed
from secateur.models.opening.opened import main_dtype
from secateur.models.opening.whole import positions_of
from secateur.models.weights.quantised import open_checkpoint
from secateur.runs.options import taking
from secateur.runtime.linear import PackedLinear
from secateur.runtime.load import load, memory_of
from secateur.runtime.settings import Backend, BenchSettings
from secateur.runtime.threads import threads

BANDWIDTH_BYTES = 512 << 20  # read at once to measure the memory, far more than any cache


@dataclass(frozen=True)
class Speed:
    """Tokens per second over some repetitions: the median, the lowest and the highest."""

    batch: int
    median: float
    lowest: float
    highest: float

    def beats(self, other: "Speed") -> bool:
        """Whether every repetition was faster than each of the other's."""
        return self.lowest > other.highest


@dataclass(frozen=True)
class Measured:
    """One way to run a model: bytes on disk and in memory, seconds to load it, and how fast it is by batch.

    `read_share` is the share of the machine's read bandwidth at which it decodes one prompt, all of its weights being
    read for each token; None where no single prompt was decoded.
    """

    model: str
    backend: str
    dtype: str
    packed_matrices: int
    file_bytes: int
    memory_bytes: int
    load_seconds: float
    prefill: list[Speed]
    decode: list[Speed]
    read_share: float | None


@dataclass(frozen=True)
class Bench:
    """What `bench` measured. `bandwidth` is what all threads together read from memory, in bytes per second."""

    prompt: int
    decoded: int
    repetitions: int
    threads: int
    bandwidth: float
    rows: list[Measured]

    def gain(self, row: Measured, stage: str, number: int) -> float | None:
        """How many times as fast a packed row is as the fastest dense row of the same model; None within the spread.

        `stage` is "prefill" or "decode", and `number` counts the batch sizes. Below 1 where the packed row is slower
        than the fastest dense one in every repetition.
        """
        dense = [other for other in self.rows if other.model == row.model and not other.packed_matrices]
        if not row.packed_matrices or not dense:
            return None
        own: Speed = getattr(row, stage)[number]
        best: Speed = max((getattr(other, stage)[number] for other in dense), key=lambda speed: speed.median)
        return own.median / best.median if own.beats(best) or best.beats(own) else None

    def to_json(self) -> dict[str, Any]:
        """All fields, and the gains of packed rows."""
        rows = [
            {
                **asdict(row),
                "gain": {
                    stage: [self.gain(row, stage, number) for number in range(len(row.prefill))]
                    for stage in ("prefill", "decode")
                },
            }
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows}


@dataclass
class _Loaded:
    """A model in memory, and the seconds that its repetitions took: (prefill, decode) by batch."""

    model: str
    backend: Backend
    dtype: str
    module: Any
    file_bytes: int
    seconds: float
    times: dict[int, list[tuple[float, float]]]


@taking(BenchSettings)
def bench(settings: BenchSettings) -> Bench:
    """How large models are, and how fast they read a prompt and write tokens.

    Packed checkpoints are measured packed and expanded, each in the dtype of the checkpoint and in float32 unless
    `dtypes` says otherwise. All are in memory at the same time, and their repetitions alternate, so that a machine that
    slows down does so for all. Prompts are of random tokens, each next token is the likeliest.

    Raises `CheckpointError` for what cannot be loaded, and where they do not all fit into memory.
    """
    batches = settings.batches
    with threads(settings.threads) as count, torch.inference_mode():
        bandwidth = read_bandwidth()
        loaded = [one for model in settings.models for one in _load(os.fspath(model), settings)]  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(0)
        total = settings.repetitions * len(batches) * len(loaded)
        done = 0
        for batch in batches:
            for repetition in range(-1, settings.repetitions):  # the first one warms up
                for one in loaded:
                    words = one.module.config.get_text_config().vocab_size
                    ids = torch.randint(words, (batch, settings.prompt), generator=generator)
                    taken = _run(one.module, ids, settings.decode if repetition >= 0 else 1)
                    if repetition >= 0:
                        one.times.setdefault(batch, []).append(taken)
                        done += 1
                        settings.progress("measuring", done, total)
        rows = [_measured(one, settings, bandwidth) for one in loaded]
    return Bench(settings.prompt, settings.decode, settings.repetitions, count, bandwidth, rows)


def read_bandwidth() -> float:
    """Bytes per second that the threads of torch read from memory: the best of five sums of far more than a cache."""
    numbers = torch.ones(BANDWIDTH_BYTES // 4)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - started)
    return BANDWIDTH_BYTES / best


def _load(model: str, settings: BenchSettings) -> list[_Loaded]:
    """A model in every way in which it is measured."""
    path = Path(model).expanduser() if model.endswith(".gguf") else locate(model, None)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    stored = torch.float32 if path.is_file() else main_dtype(open_checkpoint(path))
    backends: Sequence[Backend] = ("packed", "dense") if path.is_dir() and is_packed(path) else ("dense",)
    names = settings.dtypes or dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (stored, torch.float32))
    loaded = []
    for backend in backends:
        for dtype in names:
            _check_memory(model, size, backend, dtype)
            started = time.perf_counter()
            module = load(
                model, backend=backend, device="cpu", dtype=dtype, trust_remote_code=settings.trust_remote_code
            )
            _check_length(module, model, settings)
            loaded.append(_Loaded(model, backend, dtype, module, size, time.perf_counter() - started, {}))
    return loaded


def _check_memory(model: str, size: int, backend: Backend, dtype: str) -> None:
    """Raise `CheckpointError` unless there is room for another model; its file is at least half of what it takes."""
    free = psutil.virtual_memory().available
    needed = size * (1 if backend == "packed" else 2) * (2 if dtype == "float32" else 1)
    if needed > free:
        raise CheckpointError(
            f"{model}: to hold it {backend} in {dtype} beside the others takes up to {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free. Measure fewer models at once, or only one of --dtypes."
        )


def _check_length(module: Any, model: str, settings: BenchSettings) -> None:
    positions = positions_of(module)
    if positions is not None and settings.prompt + settings.decode > positions:
        raise SecateurError(
            f"{model}: has {positions} positions, and --prompt {settings.prompt} with --decode {settings.decode} needs "
            f"{settings.prompt + settings.decode}. Lower one of them."
        )


def _run(module: Any, ids: torch.Tensor, steps: int) -> tuple[float, float]:
    """Seconds for reading the prompts, and for one step of decoding after it."""
    started = time.perf_counter()
    output = module(input_ids=ids, use_cache=True, logits_to_keep=1)
    read = time.perf_counter()
    for _ in range(steps):
        following = output.logits[:, -1:].argmax(dim=-1)
        output = module(input_ids=following, past_key_values=output.past_key_values, use_cache=True)
    return read - started, (time.perf_counter() - read) / steps


def _measured(one: _Loaded, settings: BenchSettings, bandwidth: float) -> Measured:
    memory = memory_of(one.module)
    times = one.times.items()
    prefill = [_speed(batch, [batch * settings.prompt / own for own, _ in taken]) for batch, taken in times]
    decode = [_speed(batch, [batch / own for _, own in taken]) for batch, taken in times]
    single = next((speed for speed in decode if speed.batch == 1), None)
    return Measured(
        model=one.model,
        backend=one.backend,
        dtype=one.dtype,
        packed_matrices=sum(isinstance(part, PackedLinear) for part in one.module.modules()),
        file_bytes=one.file_bytes,
        memory_bytes=memory,
        load_seconds=one.seconds,
        prefill=prefill,
        decode=decode,
        read_share=None if single is None else single.median * memory / bandwidth,
    )


def _speed(batch: int, rates: Sequence[float]) -> Speed:
    return Speed(batch, statistics.median(rates), min(rates), max(rates))
