"""The processes that share a run: one alone, or as many as torchrun (or any launcher like it) has started.

Every process opens the model itself, runs its share of the samples through each block, and solves its share of the
matrices. Between that they exchange sums, solutions and what went wrong: where one cannot go on, none does, and all
know why. The first process alone writes.
"""

import datetime
import functools
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.core.batch import Batch
from secateur.core.exact import Joinable
from secateur.errors import ProcessError, SecateurError
from secateur.launched import launched
from secateur.models.flow.inputs import tokens_in
from secateur.runs.journal import difference

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=30)  # for the slowest process to catch up with the others
_LAST_WORDS = 5.0  # seconds that the others have to say why they ended
_BUCKET_BYTES = 64 << 20  # that are added up across processes at once

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """Which batches of a run a process works on.

    With `probe` the first of them is the first of all, which belongs to another process: it runs along because the
    first batch shows what a block does, and counts in no sum. `before` is how many samples come before the share;
    `samples` and `tokens` are those of all processes.
    """

    batches: Sequence[Batch]
    probe: bool
    before: int
    samples: int
    tokens: int

    @property
    def counted(self) -> range:
        """The batches that count."""
        return range(int(self.probe), len(self.batches))


class Processes:
    """The processes of a run, of which this is number `rank` of `count`."""

    def __init__(self, rank: int = 0, count: int = 1, store: "Store | None" = None) -> None:
        self.rank, self.count = rank, count
        self._store = store

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, and speaks."""
        return self.rank == 0

    def share(self, batches: Sequence[Batch], *, probe: bool = False, length: int = 1) -> Share:
        """The batches of this process: a run of whole ones, as many samples as the others have, as far as that goes.

        With `probe` every process has the first batch as well. `length` is the number of hidden states of an image.
        Raises `ProcessError` for fewer batches than processes.
        """
        samples, tokens = sum(map(len, batches)), tokens_in(batches, length)
        if len(batches) < self.count:
            raise too_few(len(batches), self.count, f"more samples, a smaller --batch-size (now {len(batches[0])})")
        ends = list(itertools.accumulate(map(len, batches)))
        # The batch after which each process ends: the one that brings it closest to its part of all samples.
        cuts = [0]
        for rank in range(1, self.count):
            least, most = cuts[-1] + 1, len(batches) - (self.count - rank)
            wanted = samples * rank / self.count
            cuts.append(min(range(least, most + 1), key=lambda cut: (abs(ends[cut - 1] - wanted), cut)))
        cuts.append(len(batches))
        start, stop = cuts[self.rank], cuts[self.rank + 1]
        with_probe = probe and start > 0
        own = [*(batches[:1] if with_probe else ()), *batches[start:stop]]
        return Share(own, with_probe, ends[start - 1] if start else 0, samples, tokens)

    def deal(self, costs: Mapping[T, float]) -> dict[T, int]:
        """Which process takes each piece of work: the dearest first, to whoever has least to do by then."""
        load = [0.0] * self.count
        taker: dict[T, int] = {}
        for piece in sorted(costs, key=lambda piece: -costs[piece]):
            taker[piece] = min(range(self.count), key=lambda rank: (load[rank], rank))
            load[taker[piece]] += costs[piece]
        return taker

    def gather(self, value: T, error: Exception | None = None) -> list[T]:
        """What every process gives, in their order. Where some give an `error`, all raise the first one."""
        if self.count == 1:
            if error is not None:
                raise error
            return [value]
        found: list[Any] = [None] * self.count
        told = (
            None if error is None else (error if isinstance(error, SecateurError | MemoryError) else None, repr(error))
        )
        with self._exchange():
            dist.all_gather_object(found, (value, told))
        for rank, (_, failure) in enumerate(found):
            if failure is not None and rank == self.rank:
                assert error is not None
                raise error
            if failure is not None:
                raised, spoken = failure
                raise raised if raised is not None else ProcessError(f"process {rank} failed: {spoken}")
        return [value for value, _ in found]

    def on_first(self, make: Callable[[], T]) -> T | None:
        """What the first process makes, there alone. All raise what it raises."""
        if self.count == 1:
            return make()
        value, error = None, None
        if self.first:
            try:
                value = make()
            except Exception as raised:
                error = raised
        self.gather(None, error)
        return value

    def join(self, sums: Iterable[Joinable]) -> None:
        """Make each process's sums the sums over all processes. Every process gives as many, in the same order."""
        if self.count == 1:
            return
        sums = list(sums)
        told = list(zip(*self.gather([own.told() for own in sums]), strict=True))
        shared = [part for own, parts in zip(sums, told, strict=True) for part in own.shared(parts)]
        for bucket in _buckets(shared):
            # Fast: many small ones, such as those of experts, go together.
            flat = bucket[0] if len(bucket) == 1 else torch.cat([own.flatten() for own in bucket])
            with self._exchange():
                dist.all_reduce(flat)
            if len(bucket) > 1:
                for own, part in zip(bucket, torch.split(flat, [own.numel() for own in bucket]), strict=True):
                    own.copy_(part.view(own.shape))

    def send(self, tensor: Tensor, sender: int) -> None:
        """Give a tensor of the sender's to all, who receive it in place."""
        if self.count == 1:
            return
        whole = tensor if tensor.is_contiguous() else tensor.contiguous()
        with self._exchange():
            dist.broadcast(whole.view(-1).view(torch.uint8), sender)
        if whole is not tensor and self.rank != sender:
            tensor.copy_(whole)

    def room(self, folder: Path) -> Path:
        """The first process's folder; on a machine that does not see it, the one for temporary files."""
        first = self.gather(folder)[0]
        return first if first.is_dir() else Path(tempfile.gettempdir())

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise `ProcessError` in every process where one has other facts than the first."""
        first, *others = self.gather(dict(facts))
        for rank, own in enumerate(others, start=1):
            told = f"{{0}} is {{1}} in process 0 and {{2}} in process {rank}"
            if changed := difference(first, own, told=told):
                raise ProcessError(f"The processes of this run differ: {changed}. Start all of them alike.")

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Explains what goes wrong between processes."""
        try:
            yield
        except RuntimeError as error:
            reason = self._reason(str(error))
            if ": KeyboardInterrupt" in reason:  # a terminal's Ctrl-C has reached another one first
                raise KeyboardInterrupt from error
            raise ProcessError(reason) from error

    def _reason(self, symptom: str) -> str:
        """Why an exchange has failed: what another process has said before it ended, or who has said nothing."""
        assert self._store is not None
        until = time.monotonic() + _LAST_WORDS
        with _quiet():
            self._store.set(f"alive/{self.rank}", "")
            while True:
                silent = []
                for rank in range(self.count):
                    if self._store.check([f"failed/{rank}"]):
                        said = self._store.get(f"failed/{rank}").decode()
                        return f"process {rank} of {self.count} ended the run: {said}"
                    if not self._store.check([f"alive/{rank}"]):
                        silent.append(rank)
                if time.monotonic() > until:
                    break
                time.sleep(0.1)
            if silent:
                who = ", ".join(map(str, silent))
                return (
                    f"process {who} of {self.count} ended or hung without a word. Was it killed, or out of memory? Go "
                    f"on with --resume. ({symptom.splitlines()[0][:200]})"
                )
        return f"the processes lost each other. Go on with --resume. ({symptom.splitlines()[0][:200]})"

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends."""
        if self._store is not None and not isinstance(error, ProcessError):
            with _quiet():
                self._store.set(f"failed/{self.rank}", f"{type(error).__name__}: {error}")


ALONE = Processes()


def too_few(batches: int, processes: int, remedy: str) -> ProcessError:
    """Why so many processes cannot share so many batches of samples, and what to use instead of fewer processes."""
    return ProcessError(
        f"{processes} processes cannot share {batches} {'batch' if batches == 1 else 'batches'} of samples: each needs "
        f"one. Use {remedy}, or fewer processes."
    )


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, as many at a time as `_BUCKET_BYTES` hold, on one device; a larger one by itself."""
    bucket: list[Tensor] = []
    room = _BUCKET_BYTES
    for tensor in tensors:
        if bucket and (tensor.nbytes > room or tensor.device != bucket[0].device):
            yield bucket
            bucket, room = [], _BUCKET_BYTES
        bucket.append(tensor)
        room -= tensor.nbytes
    if bucket:
        yield bucket


@contextmanager
def _quiet() -> Iterator[None]:
    """Where nothing can be told any more, nothing is."""
    try:
        yield
    except RuntimeError:
        logger.debug("the store of the processes is gone", exc_info=True)


_RUNS = itertools.count()  # of this process, as many as of the others


@functools.cache
def _launched() -> "tuple[Store, int, int]":
    """Where the processes meet, the number of this one, and how many there are."""
    from torch.distributed.rendezvous import rendezvous  # which a build of torch may lack

    store, rank, count = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    return store, rank, count


@contextmanager
def shared_run() -> Iterator[Processes]:
    """The processes of this run, ready to exchange; where one raises, the others are told why.

    A process group that somebody has made already is used and stays.
    """
    if launched().count == 1 or not dist.is_available():
        yield ALONE
        return
    store, rank, count = _launched()
    # No key is used by two runs.
    store = dist.PrefixStore(f"secateur/{next(_RUNS)}", store)  # type: ignore[attr-defined]
    made = not dist.is_initialized()
    if made:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    processes = Processes(rank, count, store)
    try:
        yield processes
    except BaseException as error:
        processes.fail(error)
        raise
    finally:
        if made:
            with _quiet():
                dist.destroy_process_group()
