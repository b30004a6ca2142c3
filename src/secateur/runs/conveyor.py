"""The one pass over the blocks: while one is worked on, the next one is read and the previous one written."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from secateur.models.flow.memory import FreedMemory
from secateur.models.shape.skeleton import Skeleton
from secateur.models.shape.structure import Block
from secateur.runs import stopping
from secateur.runs.events import Clock, Event, OnEvent
from secateur.runs.journal import Part, part_of

if TYPE_CHECKING:
    from secateur.runs.checkpoint import CheckpointOutput

Read = TypeVar("Read")


@dataclass(frozen=True)
class Finished:
    """What was made of a block: its tensors, and for the journal what its run knows of it, as JSON."""

    tensors: Mapping[str, Tensor]
    record: dict[str, Any]


@dataclass
class Conveyor:
    """Brings the blocks of a model one by one, and takes away what was made of them.

    `output` takes the finished tensors, where there is one. `clock` counts the waiting, reading and writing, and
    `on_event` is told of every block. Between any two events a run that is asked to stop does so.
    """

    skeleton: Skeleton
    output: "CheckpointOutput | None" = None
    clock: Clock = field(default_factory=Clock)
    on_event: OnEvent = lambda event: None
    pile_bytes: int = 0  # of memory that finished blocks have freed; 0 returns it to the system after each

    def finished(self) -> dict[int, Part]:
        """The blocks that an earlier process has finished, by their index; none where nothing is written here."""
        parts = {} if self.output is None else {b.index: self.output.journal.of_block(b) for b in self.skeleton.blocks}
        return {index: part for index, part in parts.items() if part is not None}

    def carry(
        self,
        work: Callable[[Block, Read], Finished | None],
        *,
        read: Callable[[Block], Read],
        blocks: Sequence[Block] | None = None,
        check: Callable[[str, str], None] = lambda name, digest: None,
    ) -> None:
        """Call `work(block, read(block))` for each block in turn, and write what it returns.

        One thread reads the next block, another writes: first the tensors outside the blocks, of which `check(name,
        sha256)` may refuse one, then what `work` returned for the previous block; None is a block that is written
        already. An exception from any of them ends the pass.
        """
        blocks, freed = self.skeleton.blocks if blocks is None else blocks, FreedMemory(self.pile_bytes)
        with (
            stopping.at_safe_points(),
            ThreadPoolExecutor(1, "read") as reader,
            ThreadPoolExecutor(1, "write") as writer,
        ):
            written = None if self.output is None else writer.submit(self.output.copy_outside, check)
            coming = reader.submit(self._read, read, blocks[0])
            for position, block in enumerate(blocks):
                self.tell("read", block)
                with self.clock.timed("wait for read"):
                    found = coming.result()
                if position + 1 < len(blocks):
                    coming = reader.submit(self._read, read, blocks[position + 1])
                finished = work(block, found)
                if written is not None:
                    with self.clock.timed("wait for write"):
                        written.result()  # Memory: at most one finished block waits to be written
                    written = writer.submit(self._write, block, finished, self.clock.so_far())
                self.tell("replayed" if written is not None and finished is None else "write", block)
                del found, finished
                freed.after_block()
            if written is not None:
                written.result()
        if self.output is not None:
            self.output.check_complete()

    def tell(self, stage: str, block: Block, done: int = 0, total: int = 0, matrix: str | None = None) -> None:
        """Say where in a block the run is; the place to stop at when that was asked for."""
        stopping.safe_point()
        self.on_event(Event(stage, block.index, len(self.skeleton.blocks), done, total, matrix))

    def _read(self, read: Callable[[Block], Read], block: Block) -> Read:
        with self.clock.timed("read", background=True):
            return read(block)

    def _write(self, block: Block, finished: Finished | None, seconds: Mapping[str, float]) -> None:
        assert self.output is not None
        if finished is not None:
            with self.clock.timed("write", background=True):
                self.output.finish(Part(part_of(block), {}, finished.record, dict(seconds)), finished.tensors)
