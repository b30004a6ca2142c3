"""How fast this machine is at what a run does, tried for about a second: a block of zeros, a solve, a hash."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from secateur.collect.sites import sites
from secateur.core.checks import check_solution
from secateur.core.histogram import histogram
from secateur.core.patterns import Pattern
from secateur.core.problem import Method, Problem, select
from secateur.core.scores import magnitude
from secateur.errors import SecateurError
from secateur.files.checkpoint import Layout
from secateur.models.flow.stream import Stream
from secateur.models.flow.waiting import WaitingForwards
from secateur.models.shape.matrices import Matrix, tapped
from secateur.models.shape.skeleton import Skeleton, Source, loaded
from secateur.models.shape.structure import Block

LONG = 0.3  # seconds after which nothing is tried again
TRIAL_FLOPS = 2e10  # of all forwards that are tried, about
WEIGHTS = 1 << 24  # of the matrix that is solved
SKINNY = 4096  # of the matrix that few rows are multiplied with
WAITING = (1, 32)  # samples and tokens of the forward whose memory is counted while it waits
# What a model's own code may raise on zeros.
NOT_TRIED = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, SecateurError)


# What was tried of a model, for the next estimate of it: of a sweep's other methods.
_tried: WeakKeyDictionary[Skeleton, dict[tuple[int, int], list[tuple[float, float]]]] = WeakKeyDictionary()


def timed(device: torch.device, run: Callable[[], object], *, least: float = 0.0) -> float:
    """Seconds of the fastest of a few runs, or of one that takes long; the first one only warms up."""
    best, spent, rounds = float("inf"), 0.0, 0
    while rounds < 1 or (spent < LONG and rounds < 4) or (spent < least and rounds < 20):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - started
        best, spent, rounds = min(best, took), spent + took, rounds + 1
    return best


def multiplying(skeleton: Skeleton, dtype: torch.dtype) -> float:
    """Seconds of one multiplication and addition of a large product."""
    width = min(max((matrix.shape[1] for matrix in skeleton.matrices), default=1024), 4096)
    left = torch.randn(512, width, device=skeleton.device).to(dtype)
    right = torch.randn(width, 1024, device=skeleton.device).to(dtype)
    return timed(skeleton.device, lambda: left @ right, least=0.1) / (512 * width * 1024)


def skinny(skeleton: Skeleton, rows: int) -> float:
    """Seconds for each weight of a product with so many rows: where text is written, weights are read for few tokens.

    The weights are more than a processor keeps beside it.
    """
    left = torch.randn(rows, SKINNY, device=skeleton.device).to(skeleton.dtype)
    weight = torch.randn(SKINNY, SKINNY, device=skeleton.device).to(skeleton.dtype)
    return timed(skeleton.device, lambda: left @ weight.T, least=0.1) / weight.numel()


def moving(device: torch.device) -> float:
    """Seconds of one byte that an operation on large tensors reads and writes."""
    some = torch.ones(1 << 22, device=device)
    return timed(device, lambda: torch.add(some, some), least=0.05) / (8 * some.numel())


def digesting() -> float:
    """Seconds of one byte of a sha256."""
    data = bytes(1 << 23)
    return timed(torch.device("cpu"), lambda: hashlib.sha256(data).digest()) / len(data)


def choosing(skeleton: Skeleton, method: Method, pattern: Pattern) -> float:
    """Seconds for each weight to choose a mask by one score, check it and record it; a method itself is never run."""
    shape = max((matrix.shape for matrix in skeleton.matrices), key=lambda own: own[0] * own[1])
    rows = max(1, min(shape[0], WEIGHTS // shape[1]))
    weight = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(0)).to(skeleton.device)
    problem = Problem("trial", weight, pattern)
    plain = select("trial", magnitude, per=method.per)

    def solve() -> None:
        solution = plain.solve(problem)
        check_solution(problem, solution, plain)
        assert solution.score is not None
        histogram(solution.score, solution.mask)
        # What the loop and the record do beside: checks of the source, the copy that is written, counts.
        weight.isfinite().all()
        kept = solution.weight.masked_fill(~solution.mask, 0)
        (kept.eq(weight) | ~solution.mask).all()
        kept.count_nonzero()

    return timed(skeleton.device, solve) / weight.numel()


class ZeroSource:
    """A source with zeros in the place of weights: they take no memory until somebody writes to them."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype

    @property
    def names(self) -> Sequence[str]:
        """Those of the source."""
        return self._source.names

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the source."""
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype to compute in, so that nothing is converted."""
        stored = self._source.dtype(name)
        return self._dtype if stored.is_floating_point else stored

    def read(self, names: Sequence[str], *, pin: bool = False) -> dict[str, Tensor]:
        """Zeros."""
        return {name: torch.zeros(self.shape(name), dtype=self.dtype(name)) for name in names}

    def parts(self, name: str) -> Iterator[Tensor]:
        """Zeros, as a whole."""
        yield self.read([name])[name].view(-1)

    def layout(self) -> Layout:
        """That of the source."""
        return self._source.layout()


def forwards(skeleton: Skeleton, length: int, batch_size: int, multiply: float) -> list[tuple[float, float]]:
    """For each block, the seconds of a forward for each token and for each batch; by its products where that fails."""
    known = _tried.setdefault(skeleton, {})
    if (length, batch_size) not in known:
        known[length, batch_size] = _try_forwards(skeleton, length, batch_size, multiply)
    return known[length, batch_size]


@torch.no_grad()
def waiting_bytes(skeleton: Skeleton, matrices: Sequence[Matrix]) -> int:
    """What a forward holds for each token while it waits at the site where it holds most, in one block with zeros."""
    block = skeleton.blocks[matrices[0].block]
    own = [matrix for matrix in matrices if matrix.block == block.index]
    try:
        with _zeros_in(skeleton, block, *WAITING) as stream:
            found, _ = sites(block, own, stream)
            with WaitingForwards(block, stream, tapped(block, own)[0], {}) as forwards:
                held = []
                for site in found:
                    forwards.reach(0, site.parameters)
                    held.append(forwards.held_bytes(0))
                    forwards.waits_at -= site.parameters
        return max(held) // math.prod(stream.states.get(0, stream.device).shape[:-1])
    except NOT_TRIED:
        return usually_waiting(skeleton)


def usually_waiting(skeleton: Skeleton) -> int:
    """The same without a forward: what it is about in blocks of the usual make-up."""
    return 8 * skeleton.hidden_size * skeleton.dtype.itemsize


@torch.no_grad()
def _try_forwards(skeleton: Skeleton, length: int, batch_size: int, multiply: float) -> list[tuple[float, float]]:
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, names in enumerate(skeleton.block_tensors):
        alike.setdefault(tuple(sorted(skeleton.source.shape(name) for name in names)), []).append(index)
    found: dict[int, tuple[float, float]] = {}
    for indices in alike.values():
        block = skeleton.blocks[indices[0]]
        weights = sum(math.prod(skeleton.source.shape(name)) for name in skeleton.block_tensors[block.index])
        # A whole batch where it is quick; else a shorter window, and what attention takes in longer ones.
        fitting = max(16, int(TRIAL_FLOPS / (2 * weights * len(alike))))
        samples, tokens = max(1, min(batch_size, fitting // length)), min(length, fitting)
        try:
            short, long = (_one_forward(skeleton, block, *size) for size in ((1, 2), (samples, tokens)))
            each = max(long - short, 0.1 * long) / (samples * tokens)
            cost = (each + 2 * skeleton.hidden_size * (length - tokens) * multiply, short)
        except NOT_TRIED:
            cost = (weights * multiply, 0.0)
        found |= dict.fromkeys(indices, cost)
    return [found[index] for index in range(len(skeleton.blocks))]


def _one_forward(skeleton: Skeleton, block: Block, samples: int, tokens: int) -> float:
    with _zeros_in(skeleton, block, samples, tokens) as stream:
        return timed(skeleton.device, lambda: stream.run(block, 0, aside=True))


@contextmanager
def _zeros_in(skeleton: Skeleton, block: Block, samples: int, tokens: int) -> Iterator[Stream]:
    """A stream of one batch, at a block that is loaded with zeros in the place of weights."""
    trial = copy(skeleton)
    if not skeleton.resident:
        trial.source = ZeroSource(skeleton.source, skeleton.dtype)
    trial.load_outside(head=False)
    stream = Stream(trial, [trial.trial_batch(samples, tokens)])
    try:
        stream.reach(block)
        with loaded(trial, block, trial.read(block)):
            yield stream
    finally:
        stream.close()
        trial.unload_outside()
