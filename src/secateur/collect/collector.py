"""What all kinds of evidence have in common: what they cost, and how they watch batches run through a block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from secateur.collect.exempt import Exempt
from secateur.collect.sites import Site
from secateur.core.needs import Need
from secateur.models.flow.stream import Stream, default_batch_size
from secateur.models.flow.tap import Enough, InputTap, Product
from secateur.models.flow.waiting import WaitingForwards
from secateur.models.shape.matrices import Matrix, tapped
from secateur.models.shape.skeleton import Skeleton
from secateur.models.shape.structure import Block
from secateur.runs.processes import ALONE, Processes, Share

if TYPE_CHECKING:
    from secateur.collect.dense_twin import DenseTwin

Evidence = Mapping[Need, Any]
"""What was collected of a matrix, by what asked for it."""


@dataclass(frozen=True)
class Extent:
    """How large a run is, for what evidence costs in it.

    `samples` and `length` are the size of the calibration windows (0 where no token is looked at), `batch_size` is what
    was asked for, or what it has to be.
    """

    skeleton: Skeleton
    matrices: Sequence[Matrix]  # the planned ones
    samples: int
    length: int
    batch_size: int | None
    by_site: bool  # evidence is collected site by site
    offload: str  # where hidden states go

    @property
    def chosen_batch_size(self) -> int:
        """Samples that go through a block at once while it is pruned."""
        return self.batch_size or default_batch_size(max(self.length, 1), self.skeleton.device)

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return self.samples * self.length

    @property
    def batch_tokens(self) -> int:
        """Of the largest batch."""
        return min(self.chosen_batch_size, self.samples) * self.length

    @property
    def product_bytes(self) -> int:
        """What the widest matrix makes of a batch takes."""
        widest = max((matrix.shape[0] for matrix in self.matrices), default=0)
        return self.batch_tokens * widest * self.skeleton.dtype.itemsize

    @property
    def number_bytes(self) -> int:
        """Of a sum."""
        return max(4, self.skeleton.dtype.itemsize)


@dataclass(frozen=True)
class Cost:
    """What evidence takes in a run. Bytes are those of the block that takes most, forwards are of all samples."""

    held: int = 0  # by sums, from the first forward until the last matrix of the block is solved
    batch: int = 0  # while a batch runs through the block, where that is more than a forward takes
    reading: int = 0  # while one matrix is solved
    states: int = 0  # further sets of hidden states
    block_copies: int = 0
    file: int = 0  # on disk, until the run ends
    forwards: float = 0.0  # beside the two of every run that looks at tokens
    products: float = 0.0  # multiplications in the dtype of sums
    computing: float = 0.0  # multiplications in the dtype of the model
    moved: float = 0.0  # bytes that pass through memory
    joined: float = 0.0  # bytes of sums that processes join, if several share the run
    hashings: int = 0  # of all tensors of the checkpoint
    before: tuple[PassBefore, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)))


@dataclass(frozen=True)
class PassBefore:
    """What a pass over the dense model that comes before a run holds, in bytes."""

    working: int  # with one block, beside a forward's activations
    head: int  # with the model's head
    saved: int  # of hidden states
    samples: int  # at once
    passes: int  # over the weights
    folder: Path | None  # of hidden states, if not in memory


@dataclass
class Place:
    """Where evidence is collected: some matrices of a loaded block, and the batches that run through it.

    `inputs` hands on what the matrices multiply. Sums are kept on `device`, or where the inputs are. The batches are
    the `share` that one of the `processes` has of all, or all of them.
    """

    block: Block
    matrices: Sequence[Matrix]
    stream: Stream
    twin: DenseTwin | None = None
    device: torch.device | None = None
    processes: Processes = ALONE
    share: Share | None = None

    def __post_init__(self) -> None:
        self.parameters, self.layout = tapped(self.block, self.matrices)
        self.inputs = InputTap(self.parameters)
        self.share = self.share or ALONE.share(self.stream.batches)
        self.samples, self.tokens, self.batches = self.share.samples, self.share.tokens, self.share.counted


class Collector:
    """Collects one kind of evidence. One stands for a whole run; `at` makes those that collect at a place.

    `whole` says that it needs every forward to its end, `ends` that it ends forwards itself with `Enough`, so that
    nothing else may, and `runs` that it runs batches through the block, because a plain forward will not do.
    """

    needs: frozenset[Need]  # of the run, that it answers
    place: Place
    looks_at_samples = True
    forwards = True  # whether the samples run through the blocks for it while they are pruned
    beside_dense = False  # whether the dense model runs beside the pruned one for it
    known = False  # whether all has been collected before
    whole = False
    ends = False
    runs = False
    exempt = Exempt()  # a run that may go on without some matrices gives its own

    def batch_size(self, skeleton: Skeleton, length: int, batch_size: int | None) -> int | None:
        """Samples that have to go through a block at once, or what was asked for; raises where that cannot be."""
        return batch_size

    def cost(self, extent: Extent) -> Cost:
        """What it takes in a run."""
        return Cost()

    def solving(self, in_features: int) -> int:
        """Numbers that are held beside it while a matrix of this width is solved with it."""
        return 0

    @property
    def watched(self) -> Collection[str]:
        """Submodules of the block that was entered, whose inputs have to be kept while forwards wait in it."""
        return ()

    def enter(self, block: Block, matrices: Sequence[Matrix], stream: Stream) -> Mapping[str, Any]:
        """Get to know a loaded block before anything in it changes; returns what the manifest says of it."""
        return {}

    def at(self, place: Place) -> Self:
        """The collector at a place, with nothing collected yet."""
        own = copy(self)
        own.place = place
        own.start()
        return own

    def start(self) -> None:
        """Get ready to collect at the place."""

    def begin(self, batch: int, *, stop: bool) -> None:
        """Expect the forward of a batch; with `stop` it may end early."""

    def run(self, batch: int) -> Tensor:
        """What the block makes of a batch."""
        return self.place.stream.run(self.place.block, batch)

    def watch(self) -> AbstractContextManager[object]:
        """Is active during the forward."""
        return nullcontext()

    def end(self, batch: int, output: Tensor | None) -> None:
        """Add the batch, whose forward is over; `output` is None where it ended early."""

    def takes_while_waiting(self, forwards: WaitingForwards, batch: int) -> bool:
        """Whether a batch that waits at the place knows all that is needed, so that it need not run once more."""
        return not (self.whole or self.ends or self.runs)

    def take(self, forwards: WaitingForwards, batch: int, product: Product) -> None:
        """Take what is needed of a batch that waits before a product."""

    def join(self, processes: Processes) -> None:
        """Have what was collected of the batches of all processes, each of which does this at the same place."""

    def finished(self) -> None:
        """Take notice of the end of all batches. Raises for evidence that cannot be used."""

    def keep(self, matrices: Sequence[Matrix]) -> None:
        """Expect no question but of these matrices from now on."""

    def of(self, matrix: Matrix, device: torch.device) -> Evidence:
        """What is known of a matrix; what has to be read first is read to `device`."""
        return {}


@dataclass(frozen=True)
class Collected:
    """What was collected of some matrices of a block.

    Where batches ran through the whole block: what went into it and came out of it for the first one.
    """

    collectors: Sequence[Collector]
    input: Tensor | None = None
    output: Tensor | None = None


def run_batches(
    place: Place,
    collectors: Sequence[Collector],
    *,
    keep_outputs: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Collected:
    """Run all batches through the block while the collectors watch.

    With `keep_outputs` the block's outputs take the place of the stream's states; without, a forward ends as soon as no
    collector needs more of it.
    """
    stream = place.stream
    run = next((own.run for own in collectors if own.runs), lambda batch: stream.run(place.block, batch))
    first: Collected | None = None
    for batch in place.batches:
        stop = first is not None and not keep_outputs and not any(own.whole for own in collectors)
        for own in collectors:
            own.begin(batch, stop=stop)
        place.inputs.begin(stop=stop and not any(own.ends for own in collectors))
        output: Tensor | None = None
        with suppress(Enough), ExitStack() as stack:
            if place.inputs.takers:
                stack.enter_context(place.inputs)
            for own in collectors:
                stack.enter_context(own.watch())
            output = run(batch)
        if first is None and output is not None:
            before = stream.states.get(batch, stream.device)
            # Exact: states in a mapped file are overwritten in place.
            first = Collected(collectors, before.clone() if keep_outputs else before, output)
        if keep_outputs and output is not None:
            stream.states.put(batch, output)
        place.inputs.end()
        for own in collectors:
            own.end(batch, output)
        progress(batch + 1, len(stream.batches))
    place.inputs.takers.clear()  # Memory: or collectors and what they hold would refer to themselves
    _finish(place, collectors)
    assert first is not None
    return first


def _finish(place: Place, collectors: Sequence[Collector]) -> None:
    """Tell the collectors that all batches have run, here and in the other processes."""
    for own in collectors:
        own.join(place.processes)
    for own in collectors:
        own.finished()


def reach_site(
    place: Place,
    collectors: Sequence[Collector],
    site: Site,
    forwards: WaitingForwards,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Collected:
    """Let the forwards go on until all wait at a site, and collect there. No forward is repeated.

    Where the matrices of the site read several inputs, or a collector needs more than an input, batches run through
    the block once more, beside the forwards that wait.
    """
    again = site.leader is None
    batches = len(place.stream.batches)
    for batch in range(batches):
        product = forwards.reach(batch, site.parameters)
        if batch == 0 and not again:
            again = not all(own.takes_while_waiting(forwards, batch) for own in collectors)
            place.inputs.leader.update({} if again else site.leader or {})
        if not again and batch in place.batches:
            for own in collectors:
                own.begin(batch, stop=True)
            place.inputs.begin(stop=False)
            if product is not None:
                place.inputs.before(product)
                for own in collectors:
                    own.take(forwards, batch, product)
            place.inputs.end()
            for own in collectors:
                own.end(batch, None)
            progress(batch + 1, batches)
        del product
        forwards.set_aside(batch)
    if again:
        return run_batches(place, collectors, progress=progress)
    place.inputs.takers.clear()
    _finish(place, collectors)
    return Collected(collectors)
