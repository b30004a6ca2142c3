"""The memory that a run will take at its peak: what it holds at once in each of its stages."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from secateur.collect.gradient_pass import chunk_sizes, gradient_batch_size
from secateur.core.gram import Gram
from secateur.models.flow.memory import LARGE_BYTES, trim
from secateur.models.flow.stream import LOGITS_BYTES, states_folder
from secateur.models.shape.matrices import Matrix
from secateur.models.shape.skeleton import Skeleton
from secateur.pruning.preparation import Prepared

LIBRARY_BYTES = 40_000_000  # kernels and buffers that torch loads when it first computes
FACTORISING_BYTES = 40_000_000  # buffers of the linear algebra library, once something was factorised
SELECTING = 16  # bytes for each weight of the matrix at hand while its mask is chosen and checked


@dataclass(frozen=True)
class Memory:
    """Bytes. `host` and `device` are totals at the peak, the rest is what they are made of."""

    host: int
    device: int
    block_stored: int
    states: int
    grams: int
    grams_elsewhere: int
    solving: int
    saved: int  # the inputs of all blocks, for gradients
    gradient_file: int
    gradient_folder: Path | None
    samples_at_once: int  # that gradients are taken of
    passes: int
    offloaded: bool


def source_bytes(skeleton: Skeleton, names: Sequence[str]) -> int:
    """The size of these tensors as they are stored."""
    source = skeleton.source
    return sum(math.prod(source.shape(name)) * source.dtype(name).itemsize for name in names)


def resident_bytes() -> int:
    """What this process has in memory: the interpreter and the libraries, and the model where it was given as one."""
    trim()
    return int(psutil.Process().memory_info().rss)


def memory_of(ready: Prepared) -> Memory:
    """The memory of a run that has been prepared."""
    targets, offload = ready.settings.targets, ready.settings.offload_states
    skeleton, source = ready.opened.skeleton, ready.opened.skeleton.source
    on_gpu = skeleton.device.type != "cpu"
    item = skeleton.dtype.itemsize
    blocks = skeleton.block_tensors
    stored = max(source_bytes(skeleton, names) for names in blocks)
    computed = max(sum(math.prod(source.shape(name)) for name in names) for names in blocks) * item
    converted = any(source.dtype(name) != skeleton.dtype for names in blocks for name in names)
    outside = {name: math.prod(source.shape(name)) * item for name in skeleton.outside_tensors}
    head = sum(
        outside[name]
        for group in skeleton.conversion.making(skeleton.own_head)
        for name in group.names
        if name in outside
    )
    tokens = ready.samples * ready.length
    state = tokens * skeleton.hidden_size * item
    batch = min(ready.chosen_batch_size * ready.length, tokens)
    states = state * (1 if targets == "pruned" else 3)
    offloaded = states_folder(offload, states, Path.cwd()) is not None
    activations = _activations(skeleton, batch) if tokens else 0
    grams, elsewhere = _grams(ready, targets)
    solving = _solving(ready, targets)
    largest = max((math.prod(matrix.shape) for matrix in ready.matrices), default=0)
    regional = _accumulators(ready) + _graph(ready, batch) if ready.regional else 0

    def both(working: int, weights: int, held: int) -> tuple[int, int]:
        """(host, device) of a stage: what is computed with, blocks as stored, and hidden states."""
        copied = (computed if converted and not skeleton.resident else 0) if not on_gpu else 0
        if not on_gpu:
            return working + copied + weights * stored + held, 0
        return weights * stored + held, working + 2 * computed

    waiting = 0 if skeleton.resident else min(3, 1 + len(blocks))  # the block at hand, the next one, what has changed
    pruning = grams + max(
        # A graph holds the activations of its batch too; gradients from a file are read matrix by matrix.
        activations,
        regional,
        solving + (4 * largest if ready.gradients or ready.takes_gradients else 0),
    )
    in_memory = 0 if offloaded else states
    stages = [both(pruning, waiting + (1 if skeleton.resident else 0), in_memory + elsewhere)]
    if tokens and not skeleton.resident:
        # Memory: embeddings are gone again when the calls are recorded; blocks come one at a time until then.
        embeddings = sum(outside.values()) - head
        host, device = both(max(activations // 4, 0), 0, in_memory)
        stages.append((host + (0 if on_gpu else embeddings), device + (embeddings if on_gpu else 0)))
    saved, at_once, passes, folder = 0, ready.samples, 1, None
    if ready.takes_gradients:
        saved, at_once, passes, folder = _saved(ready, offload)
        held = 0 if folder is not None else saved
        backward = _accumulators(ready) + 4 * largest + _graph(ready, min(batch, at_once * ready.length)) + activations
        stages.append(both(backward, min(2, len(blocks)), held))
        host, device = both(3 * LOGITS_BYTES, 0, held)
        whole = 0 if skeleton.resident else sum(outside.values())
        stages.append((host + (0 if on_gpu else whole), device + (whole if on_gpu else 0)))
    base = resident_bytes() + LIBRARY_BYTES
    return Memory(
        host=base + max(host for host, _ in stages),
        device=max(device for _, device in stages),
        block_stored=stored,
        states=max(states, saved),
        grams=grams,
        grams_elsewhere=elsewhere,
        solving=solving,
        saved=saved,
        gradient_file=4 * sum(math.prod(matrix.shape) for matrix in ready.matrices) if ready.takes_gradients else 0,
        gradient_folder=folder,
        samples_at_once=at_once,
        passes=passes,
        offloaded=offloaded,
    )


def _activations(skeleton: Skeleton, tokens: int) -> int:
    """Of a forward of one batch through a block: the stream and its norm, and what the widest module makes."""
    hidden = skeleton.hidden_size
    widest = max((max(matrix.shape) for matrix in skeleton.matrices if matrix.expert is None), default=hidden)
    return tokens * (6 * hidden + 4 * max(widest, hidden)) * skeleton.dtype.itemsize


def _graph(ready: Prepared, tokens: int) -> int:
    """What a backward through one block keeps of a batch: the inputs and outputs of its products, twice."""
    sums: dict[int, int] = {}
    for matrix in ready.matrices:
        if matrix.expert in (None, 0):
            sums[matrix.block] = sums.get(matrix.block, 0) + sum(matrix.shape)
    return 2 * tokens * max(sums.values()) * ready.opened.skeleton.dtype.itemsize


def _accumulators(ready: Prepared) -> int:
    """Sums of gradients of a block in float32."""
    return 4 * max(_by_block(ready.matrices, lambda matrix: math.prod(matrix.shape)).values())


def _by_block(matrices: Sequence[Matrix], size: Callable[[Matrix], int]) -> dict[int, int]:
    sums: dict[int, int] = {}
    for matrix in matrices:
        sums[matrix.block] = sums.get(matrix.block, 0) + size(matrix)
    return sums


def inputs_of(matrices: Sequence[Matrix]) -> list[tuple[Matrix, int]]:
    """One matrix for all that read the same input, and how many such inputs of its width its module has.

    Matrices of a module that are equally wide read the same one (q, k and v; gate and up), but for the last of four or
    more (o).
    """
    alike: dict[tuple[int, str, int | None, int], list[Matrix]] = {}
    for matrix in matrices:
        module = matrix.name.removesuffix(".weight").rpartition(".")[0]
        alike.setdefault((matrix.block, module, matrix.expert, matrix.shape[1]), []).append(matrix)
    return [(found[0], 2 if len(found) > 3 else 1) for found in alike.values()]


def _grams(ready: Prepared, targets: str) -> tuple[int, int]:
    """Of one block: where the model is, and on another device."""
    if Gram not in ready.method.needs:
        return 0, 0
    skeleton = ready.opened.skeleton
    item = max(4, skeleton.dtype.itemsize)
    sums: dict[int, int] = {}
    for matrix, inputs in inputs_of(ready.matrices):
        own = inputs * item * matrix.shape[1] ** 2
        # Memory: measured. Many buffers that are too small to be given back at once leave holes of their own size.
        holes = own if matrix.expert is not None and own < LARGE_BYTES else 0
        sums[matrix.block] = sums.get(matrix.block, 0) + own + holes
    grams = max(sums.values()) * (2 if targets == "dense" else 1)
    if targets == "residual":
        writers = [m for m in ready.matrices if m.shape[0] == skeleton.hidden_size and m.expert is None]
        grams += max(_by_block(writers, lambda m: item * math.prod(m.shape)).values(), default=0)
    kept_on = ready.statistics_device
    elsewhere = kept_on is not None and kept_on.type != skeleton.device.type
    return (0, grams) if elsewhere else (grams, 0)


def _solving(ready: Prepared, targets: str) -> int:
    """While the largest matrix is solved; and the dense copy of the block that some targets want beside."""
    skeleton = ready.opened.skeleton
    if Gram not in ready.method.needs:
        return SELECTING * max(math.prod(matrix.shape) for matrix in ready.matrices)
    item = max(4, skeleton.dtype.itemsize)
    # Memory: measured. Factorising and inverting takes six of the Gram matrix, buffers of the library included;
    # iterative methods hold eight copies of the weights, the others about five.
    copies = 8 if ready.method.products > 10 else 5
    solving = max(item * (6 * m.shape[1] ** 2 + copies * math.prod(m.shape)) for m in ready.matrices)
    solving += FACTORISING_BYTES
    if targets == "pruned":
        return solving
    return solving + max(_by_block(skeleton.matrices, lambda m: math.prod(m.shape)).values()) * skeleton.dtype.itemsize


def _saved(ready: Prepared, offload: str) -> tuple[int, int, int, Path | None]:
    """What gradients of the loss keep: bytes, samples at once, passes over them, and their folder."""
    kind = ready.method.gradient
    assert kind is not None
    skeleton = ready.opened.skeleton
    batch = gradient_batch_size(skeleton, ready.length, kind.granularity, ready.batch_size)
    first = min(matrix.block for matrix in ready.matrices)
    beside = Path.cwd() / "secateur" if ready.target is None else ready.target
    chunk = chunk_sizes(skeleton, ready.samples, ready.length, batch, kind.scope, offload, first, beside)
    return chunk.bytes, chunk.samples, math.ceil(ready.samples / chunk.samples), chunk.folder
