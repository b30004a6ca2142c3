"""`bench`: sizes and speeds of models, packed ones beside what they are when they are expanded."""

import copy
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, SecateurError
from secateur.files.folders import locate
from secateur.files.packed import PackedCheckpoint, is_packed
from secateur.models.opening.opened import choose_device, main_dtype, open_model
from secateur.models.opening.whole import positions_of
from secateur.models.shape.causality import check_predicts
from secateur.models.shape.structure import find_blocks
from secateur.models.weights.quantised import open_checkpoint
from secateur.runs.options import taking
from secateur.runtime.dense_calls import faster_by_mv, products_by_mv
from secateur.runtime.linear import PackedLinear
from secateur.runtime.load import load, memory_of, pack_module
from secateur.runtime.semi_structured import Choice, two_four_layers, why_not
from secateur.runtime.settings import BenchSettings
from secateur.runtime.threads import threads

BANDWIDTH_BYTES = 512 << 20  # read at once to measure the memory, far more than any cache

Way = Literal["packed", "packed in memory", "2:4", "dense"]


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

    `backend` is "packed" for a packed checkpoint, "packed in memory" for a plain one whose zeros were left out after
    loading (its `file_bytes` are about what `pack` would write), "2:4" for torch's semi-structured kernels on a GPU,
    and "dense"; `sparse_matrices` counts those that are not dense. `decode_by_mv` is how fast a dense model decodes a
    single prompt when each matrix is multiplied by the faster of F.linear, which transformers calls, and torch.mv; None
    where that is F.linear for all. `read_share` is the share of the machine's read bandwidth at which one prompt is
    decoded, all weights that are multiplied by being read for each token; None where no single prompt was decoded.
    """

    model: str
    backend: Way
    dtype: str
    sparse_matrices: int
    file_bytes: int
    memory_bytes: int
    load_seconds: float
    prefill: list[Speed]
    decode: list[Speed]
    decode_by_mv: Speed | None
    read_share: float | None


@dataclass(frozen=True)
class Bench:
    """What `bench` measured. `bandwidth` is what all threads together read from memory, in bytes per second.

    `choices` are the measurements of 2:4 matrices on a GPU, by model, and `notes` say what was not measured, and why.
    """

    prompt: int
    decoded: int
    repetitions: int
    threads: int
    bandwidth: float
    rows: list[Measured]
    choices: dict[str, list[Choice]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def gain(self, row: Measured, stage: str, number: int) -> float | None:
        """How many times as fast a sparse row is as the fastest dense row of the same model; None within the spread.

        `stage` is "prefill" or "decode", and `number` counts the batch sizes. Below 1 where the sparse row is slower
        than the fastest dense one in every repetition.
        """
        dense = [other for other in self.rows if other.model == row.model and not other.sparse_matrices]
        if not row.sparse_matrices or not dense:
            return None
        own: Speed = getattr(row, stage)[number]
        others: list[Speed] = [getattr(other, stage)[number] for other in dense]
        if stage == "decode" and own.batch == 1:
            others += [other.decode_by_mv for other in dense if other.decode_by_mv is not None]
        best = max(others, key=lambda speed: speed.median)
        return own.median / best.median if own.beats(best) or best.beats(own) else None

    def to_json(self) -> dict[str, Any]:
        """All fields, and the gains of sparse rows."""
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
    """A model in memory, and the seconds that its repetitions took: (prefill, decode) by batch, decode by torch.mv."""

    model: str
    backend: Way
    dtype: str
    module: Any
    file_bytes: int
    seconds: float
    times: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    by_mv: list[nn.Linear] = field(default_factory=list)
    mv_times: list[float] = field(default_factory=list)


@taking(BenchSettings)
def bench(settings: BenchSettings) -> Bench:
    """How large models are, and how fast they read a prompt and write tokens.

    Packed checkpoints are measured packed and expanded, plain ones with zeros as they are and packed in memory, each in
    the dtype of the checkpoint and in float32 unless `dtypes` says otherwise; on a GPU, as they are and with the 2:4
    matrices that torch's kernels make faster, in the dtype of the checkpoint. All are in memory at the same time, and
    their repetitions alternate, so that a machine that slows down does so for all. Prompts are of random tokens, each
    next token is the likeliest.

    Raises `CheckpointError` for what cannot be loaded, and where they do not all fit into memory.
    """
    batches = settings.batches
    device = choose_device(settings.device)
    choices: dict[str, list[Choice]] = {}
    with threads(settings.threads) as count, torch.inference_mode():
        bandwidth = read_bandwidth(device)
        models = list(map(os.fspath, settings.models))  # type: ignore[arg-type]
        loaded = [one for model in models for one in _load(model, device, settings, choices)]
        for one in loaded:
            if 1 in batches and one.backend == "dense" and device.type == "cpu":
                one.by_mv = faster_by_mv(one.module)
        generator = torch.Generator().manual_seed(0)
        total = settings.repetitions * len(batches) * len(loaded)
        done = 0
        for batch in batches:
            for repetition in range(-1, settings.repetitions):  # the first one warms up
                for one in loaded:
                    words = one.module.config.get_text_config().vocab_size
                    ids = torch.randint(words, (batch, settings.prompt), generator=generator).to(device)
                    steps = settings.decode if repetition >= 0 else 1
                    read, written, by_mv = _run(one, ids, steps)
                    if repetition >= 0:
                        one.times.setdefault(batch, []).append((read, written))
                        one.mv_times += [] if by_mv is None else [by_mv]
                        done += 1
                        settings.tell("measuring", done, total)
        notes = _notes(loaded, device, choices)
        rows = [_measured(one, settings, bandwidth) for one in loaded]
    return Bench(settings.prompt, settings.decode, settings.repetitions, count, bandwidth, rows, choices, notes)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that the threads of torch read from memory: the best of ten passes over more than any cache."""
    numbers = torch.ones(BANDWIDTH_BYTES // 4, dtype=torch.int32, device=device)
    best = float("inf")
    for _ in range(10):
        started = _now(numbers)
        numbers.max()
        best = min(best, _now(numbers) - started)
    return BANDWIDTH_BYTES / best


def _now(tensor: Tensor) -> float:
    """The time when everything that was asked of the tensor's device is done."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _load(model: str, device: torch.device, settings: BenchSettings, choices: dict[str, list[Choice]]) -> list[_Loaded]:
    """A model in every way in which it is measured."""
    path = Path(model).expanduser() if model.endswith(".gguf") else locate(model, None)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    size = plain = sum(file.stat().st_size for file in files)
    source = None if path.is_file() else open_checkpoint(path)
    stored = torch.float32 if source is None else main_dtype(source)
    if isinstance(source, PackedCheckpoint):
        plain += source.plain_bytes - source.packed_bytes
    ways: Sequence[Way] = ("packed" if is_packed(path) else "packed in memory", "dense") if source else ("dense",)
    names = settings.dtypes or tuple(dict.fromkeys(map(_name, (stored, torch.float32))))
    if device.type == "cuda":
        ways, names = ("2:4", "dense"), settings.dtypes or (_name(stored),)
    if source is not None:  # what the first load would import is not loading
        open_model(path, device="cpu", trust_remote_code=settings.trust_remote_code)
    loaded = []
    for way in ways:
        for dtype in names:
            _check_memory(model, size if way == "packed" else plain, way, dtype, device)
            started = time.perf_counter()
            module = _in_memory(model, way, dtype, stored, device, settings, choices)
            if module is None:  # it would be the same as dense
                continue
            _check_length(module, model, settings)
            seconds = time.perf_counter() - started
            file_bytes = size if way == "packed" else plain
            if way == "packed in memory":
                file_bytes -= sum(
                    part.in_features * part.out_features * stored.itemsize - part.packed.nbytes
                    for part in module.modules()
                    if isinstance(part, PackedLinear)
                )
            loaded.append(_Loaded(model, way, dtype, module, file_bytes, seconds))
    return loaded


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_memory(
    model: str,
    way: Way,
    dtype: str,
    stored: torch.dtype,
    device: torch.device,
    settings: BenchSettings,
    choices: dict[str, list[Choice]],
) -> Any:
    """The model in one way; None where nothing in it is packed or 2:4."""
    options = {"device": str(device), "trust_remote_code": settings.trust_remote_code}
    if way == "2:4":
        found = choices.setdefault(model, [])
        module = load(model, dtype=dtype, rows=_rows(settings), on_choices=found.extend, **options)  # type: ignore[arg-type]
        return module if any(choice.kernel != "dense" for choice in found) else None
    if way != "packed in memory":
        return load(model, backend=way, dtype=dtype, **options)  # type: ignore[arg-type]
    # Packed values stay as they are stored when the rest becomes float32, as they do in a packed checkpoint.
    widened = dtype == "float32" and stored.itemsize < 4
    module = load(model, backend="dense", dtype=_name(stored) if widened else dtype, **options)  # type: ignore[arg-type]
    if not pack_module(module):
        return None
    return module.float() if widened else module


def _rows(settings: BenchSettings) -> list[int]:
    """Rows of input that matrices get: one for each prompt while decoding, all tokens of the prompts before."""
    return sorted({rows for batch in settings.batches for rows in (batch, batch * settings.prompt)})


def _check_memory(model: str, size: int, way: Way, dtype: str, device: torch.device) -> None:
    """Raise `CheckpointError` unless there is room for another model."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    needed = size * (2 if dtype == "float32" and way != "packed" else 1)
    if needed > free:
        raise CheckpointError(
            f"{model}: to hold it {way} in {dtype} beside the others takes up to {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free. Measure fewer models at once, or only one of --dtypes."
        )


def _check_length(module: Any, model: str, settings: BenchSettings) -> None:
    """Raise for a model that cannot be timed at going on with so much text."""
    check_predicts(module, find_blocks(module), "text that it goes on with")
    positions = positions_of(module)
    if positions is not None and settings.prompt + settings.decode > positions:
        raise SecateurError(
            f"{model}: has {positions} positions, and --prompt {settings.prompt} with --decode {settings.decode} needs "
            f"{settings.prompt + settings.decode}. Lower one of them."
        )


def _run(one: _Loaded, ids: Tensor, steps: int) -> tuple[float, float, float | None]:
    """Seconds for reading the prompts, for one step of decoding after them, and for one by torch.mv."""
    started = _now(ids)
    output = one.module(input_ids=ids, use_cache=True, logits_to_keep=1)
    read = _now(ids) - started
    if len(ids) > 1 or not one.by_mv:
        return read, _decode(one.module, output, steps), None
    again = copy.deepcopy(output)
    written = _decode(one.module, output, steps)
    with products_by_mv(one.by_mv):
        return read, written, _decode(one.module, again, steps)


def _decode(module: Any, output: Any, steps: int) -> float:
    """Seconds for one step of decoding after an output."""
    started = _now(output.logits)
    for _ in range(steps):
        following = output.logits[:, -1:].argmax(dim=-1)
        output = module(input_ids=following, past_key_values=output.past_key_values, use_cache=True)
    return (_now(output.logits) - started) / steps


def _notes(loaded: Sequence[_Loaded], device: torch.device, choices: dict[str, list[Choice]]) -> list[str]:
    """What was not measured, and why."""
    notes = []
    for model in dict.fromkeys(one.model for one in loaded):
        own = [one for one in loaded if one.model == model]
        reason = why_not(device)
        dense = next((one.module for one in own if one.backend == "dense"), None)
        if reason is not None and dense is not None and next(two_four_layers(dense), None) is not None:
            notes.append(f"{model} is 2:4; the kernels of GPUs for that were not measured: {reason}.")
        elif device.type == "cuda" and not any(one.backend == "2:4" for one in own):
            known = choices.get(model)
            notes.append(f"{model}: {'no 2:4 matrix gains' if known else 'no linear layer is 2:4'}; it runs dense.")
        elif device.type == "cpu" and all(one.backend == "dense" for one in own):
            notes.append(f"{model}: has no linear layers with zeros enough to be packed; it runs dense.")
    return notes


def _measured(one: _Loaded, settings: BenchSettings, bandwidth: float) -> Measured:
    memory = memory_of(one.module)
    times = one.times.items()
    prefill = [_speed(batch, [batch * settings.prompt / own for own, _ in taken]) for batch, taken in times]
    decode = [_speed(batch, [batch / own for _, own in taken]) for batch, taken in times]
    single = next((speed for speed in decode if speed.batch == 1), None)
    read = memory - _looked_up(one.module)
    return Measured(
        model=one.model,
        backend=one.backend,
        dtype=one.dtype,
        sparse_matrices=sum(_is_sparse(part) for part in one.module.modules()),
        file_bytes=one.file_bytes,
        memory_bytes=memory,
        load_seconds=one.seconds,
        prefill=prefill,
        decode=decode,
        decode_by_mv=_speed(1, [1 / own for own in one.mv_times]) if one.mv_times else None,
        read_share=None if single is None else single.median * read / bandwidth,
    )


def _is_sparse(part: nn.Module) -> bool:
    return isinstance(part, PackedLinear) or (
        isinstance(part, nn.Linear) and isinstance(part.weight, torch.sparse.SparseSemiStructuredTensor)
    )


def _looked_up(module: Any) -> int:
    """Bytes of input embeddings that are nothing else, of which one row is read for a token."""
    embeddings, head = module.get_input_embeddings(), module.get_output_embeddings()
    if embeddings is None or (head is not None and getattr(head, "weight", None) is embeddings.weight):
        return 0
    return int(embeddings.weight.nbytes)


def _speed(batch: int, rates: Sequence[float]) -> Speed:
    return Speed(batch, statistics.median(rates), min(rates), max(rates))
