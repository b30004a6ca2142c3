"""The memory that a run will take at its peak: what it holds at once in each of its stages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.filesize import decimal

from secateur.collect.collector import Cost
from secateur.models.flow.memory import available_bytes, pile_limit, trim
from secateur.models.flow.stream import states_folder
from secateur.models.shape.matrices import by_block
from secateur.models.shape.skeleton import Skeleton
from secateur.pruning.preparation import Prepared
from secateur.pruning.trial import usually_waiting, waiting_bytes

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
    sums: int  # of a block, where the model is
    sums_elsewhere: int  # and on another device
    solving: int
    cost: Cost  # of the evidence
    offloaded: bool


def source_bytes(skeleton: Skeleton, names: Sequence[str]) -> int:
    """The size of these tensors as they are stored."""
    source = skeleton.source
    return sum(math.prod(source.shape(name)) * source.dtype(name).itemsize for name in names)


def resident_bytes() -> int:
    """What this process has in memory: the interpreter and the libraries, and the model where it was given as one."""
    trim()
    return int(psutil.Process().memory_info().rss)


def shortage(ready: Prepared, memory: Memory) -> str | None:
    """What is said of a run that needs more memory than is free, or None where it fits."""
    free = available_bytes() + resident_bytes()
    if memory.host > free:
        return (
            f"This needs about {decimal(memory.host)} of host memory, and {decimal(free)} are free: use fewer or "
            "shorter samples, or --batch-size 1."
        )
    device = ready.opened.skeleton.device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        if memory.device > free:
            return (
                f"This needs about {decimal(memory.device)} of the memory of {device}, and {decimal(free)} are "
                "free: use --batch-size 1, or keep Gram matrices on the host with --statistics-device cpu."
            )
    return None


def memory_of(ready: Prepared, *, trial: bool = True) -> Memory:
    """The memory of a run that has been prepared; without a `trial` no forward shows what waits within a block."""
    extent = ready.extent
    cost = ready.evidence.cost(extent)
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
    states = extent.tokens * skeleton.hidden_size * item * (1 + cost.states)
    offloaded = states_folder(extent.offload, states, Path.cwd()) is not None
    activations = _activations(skeleton, extent.batch_tokens)
    sums, elsewhere = cost.held, 0
    if ready.evidence.device is not None and ready.evidence.device.type != skeleton.device.type:
        sums, elsewhere = 0, sums
    solving = _solving(ready, cost)

    copied = computed if converted and not skeleton.resident else 0

    def both(working: int, weights: int, held: int, outside: int = 0) -> tuple[int, int]:
        """(host, device) of a stage: what is computed with, blocks as stored, hidden states, tensors outside blocks."""
        if on_gpu:
            return weights * stored + held, working + 2 * computed + outside
        return working + copied + weights * stored + held + outside, 0

    waiting = 1 if skeleton.resident else min(3, 1 + len(blocks))  # the block at hand, the next one, what has changed
    # A graph holds the activations of its batch too.
    pruning = sums + max(activations, cost.batch, solving + cost.reading)
    in_memory = 0 if offloaded else states
    # Forwards that wait hold more than hidden states, and go to files or to the host's memory by the same rule.
    waits = waiting_bytes(skeleton, extent.matrices) if trial and extent.by_site else usually_waiting(skeleton)
    held = extent.tokens * waits if extent.by_site else 0
    if not on_gpu and states_folder(extent.offload, held, Path.cwd()) is not None:
        held = 0
    held += min(held, pile_limit(extent.product_bytes))  # what forwards of a block have freed is kept for the next
    stages = [both(pruning + held, waiting, in_memory + elsewhere)]
    if extent.tokens and not skeleton.resident:
        # Memory: embeddings are gone again when the calls are recorded; blocks come one at a time until then.
        stages.append(both(activations // 4, 0, in_memory, sum(outside.values()) - head))
    for before in cost.before:
        held = 0 if before.folder is not None else before.saved
        stages.append(both(before.working + activations, min(2, len(blocks)), held))
        stages.append(both(before.head, 0, held, 0 if skeleton.resident else sum(outside.values())))
    base = resident_bytes() + LIBRARY_BYTES
    return Memory(
        host=base + max(host for host, _ in stages),
        device=max(device for _, device in stages),
        block_stored=stored,
        states=max(states, *(before.saved for before in cost.before), 0),
        sums=sums,
        sums_elsewhere=elsewhere,
        solving=solving,
        cost=cost,
        offloaded=offloaded,
    )


def _activations(skeleton: Skeleton, tokens: int) -> int:
    """Of a forward of one batch through a block: the stream and its norm, and what the widest module makes."""
    hidden = skeleton.hidden_size
    widest = max((max(matrix.shape) for matrix in skeleton.matrices if matrix.expert is None), default=hidden)
    return tokens * (6 * hidden + 4 * max(widest, hidden)) * skeleton.dtype.itemsize


def _solving(ready: Prepared, cost: Cost) -> int:
    """While the largest matrix is solved; and dense copies of the block beside."""
    skeleton, evidence = ready.opened.skeleton, ready.evidence
    planned = ready.extent.matrices
    if not any(evidence.solving(matrix.shape[1]) for matrix in planned):
        return SELECTING * max(math.prod(matrix.shape) for matrix in planned)
    item = ready.extent.number_bytes
    # Memory: measured. Iterative methods hold eight copies of the weights, the others about five; libraries buffer.
    copies = 8 if ready.method.products > 10 else 5
    solving = max(item * (evidence.solving(m.shape[1]) + copies * math.prod(m.shape)) for m in planned)
    weights = max(sum(math.prod(m.shape) for m in own) for own in by_block(skeleton.matrices).values())
    return solving + FACTORISING_BYTES + cost.block_copies * weights * skeleton.dtype.itemsize
