"""The pass over the blocks of a pruned checkpoint: read twice, targets from the dense block, tune, write, move on.

The next block is read and the last one written while this one is tuned.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core.checks import check_weight
from secateur.errors import CalibrationError, CheckpointError, NumericalError
from secateur.files.writer import CheckpointWriter
from secateur.models.flow.memory import trim
from secateur.models.flow.stream import HiddenStates, Stream, states_folder
from secateur.models.shape.matrices import Matrix
from secateur.models.shape.skeleton import Skeleton, loaded
from secateur.models.shape.structure import Block
from secateur.pruning.block_loop import Clock, Event, OnEvent
from secateur.record.manifest import Manifest, mask_digest, tensor_digest
from secateur.recover.block_tuning import Targets, Tuning, tune
from secateur.recover.dense_source import DenseSource

OnBlock = Callable[[Mapping[str, Any]], None]


@dataclass
class BlockPass:
    """One pass over the blocks."""

    skeleton: Skeleton  # of the pruned checkpoint; dense blocks are loaded into it too
    original: DenseSource
    matrices: Mapping[int, Sequence[Matrix]]  # what is tuned, by block
    batches: Sequence[Tensor]  # of token ids
    tuning: Tuning
    started: float  # by `time.perf_counter`
    minutes: float | None
    targets: str
    offload: str
    scratch: Path
    writer: CheckpointWriter
    manifest: Manifest
    clock: Clock
    on_event: OnEvent
    on_block: OnBlock
    first_tuned: tuple[int, float] | None = None  # its index, and when
    tuning_seconds: float = 0.0  # of all blocks, as far as they were given

    @torch.no_grad()
    def run(self) -> None:
        """Tune block by block, and write everything."""
        blocks, last = self.skeleton.blocks, max(self.matrices)
        with (
            ThreadPoolExecutor(1, "read") as reader,
            ThreadPoolExecutor(1, "write") as background,
            ExitStack() as stack,
        ):
            streams = self._streams(stack)
            written: Future[None] = background.submit(self._write_outside)
            coming = reader.submit(self._read, blocks[0], last)
            for block in blocks:
                began = time.perf_counter()
                self._tell("read", block)
                tensors, original = coming.result()
                self.clock.add("wait for read", began)
                if block.index + 1 < len(blocks):
                    coming = reader.submit(self._read, blocks[block.index + 1], last)
                own = {name: tensors[name] for name in self.skeleton.block_tensors[block.index]}
                if block.index <= last:
                    own |= self._block(block, tensors, original, streams, block.index < last)
                began = time.perf_counter()
                written.result()  # Memory: at most one finished block waits to be written
                self.clock.add("wait for write", began)
                written = background.submit(self._write, own)
                del tensors, original, own
                trim()
                self._tell("write", block)
            written.result()
        if self.writer.missing:
            raise CheckpointError(f"{len(self.writer.missing)} tensors were never written, {self.writer.missing[0]}.")

    def _streams(self, stack: ExitStack) -> "_Streams":
        began = time.perf_counter()
        self.skeleton.load_outside(head=False)
        each = sum(batch.numel() for batch in self.batches) * self.skeleton.hidden_size * self.skeleton.dtype.itemsize
        folder = states_folder(self.offload, (3 if self.targets == "dense" else 2) * each, self.scratch)
        made = []
        for name in ("pruned", "dense")[: 2 if self.targets == "dense" else 1]:
            made.append(
                Stream(
                    self.skeleton,
                    self.batches,
                    states_folder=None if folder is None else folder.with_name(f"{folder.name}-{name}"),
                    progress=lambda done, total: self.on_event(Event("record", 0, 0, done, total)),
                )
            )
            stack.callback(made[-1].close)
        self.skeleton.unload_outside()
        self.clock.add("record calls", began)
        return _Streams(made[0], made[1] if self.targets == "dense" else None, folder)

    def _block(
        self,
        block: Block,
        tensors: dict[str, Tensor],
        original: dict[str, Tensor],
        streams: "_Streams",
        move_on: bool,
    ) -> dict[str, Tensor]:
        """The checkpoint tensors of the block that changed; the streams have moved on behind it."""
        matrices = self.matrices.get(block.index, ())
        pruned, changed = streams.pruned, dict[str, Tensor]()
        with ExitStack() as stack:
            targets = None
            if matrices or streams.dense is not None:
                targets = self._targets(block, original, streams)
                stack.callback(targets.states.close)
            with loaded(self.skeleton, block, tensors):
                if matrices:
                    assert targets is not None
                    seconds = self._seconds(block, targets.seconds)
                    changed = self._tune(block, matrices, tensors, pruned, targets, seconds)
                began = time.perf_counter()
                for batch in range(len(pruned.batches) if move_on else 0):
                    pruned.states.put(batch, pruned.run(block, batch))
                    self._tell("forward", block, batch + 1, len(pruned.batches))
                self.clock.add("propagation forward", began)
            pruned.release(block)
            if streams.dense is not None:
                assert targets is not None
                stack.pop_all()
                streams.dense.states.close()
                streams.dense.states = targets.states
                streams.dense.release(block)
        return changed

    def _targets(self, block: Block, original: dict[str, Tensor], streams: "_Streams") -> Targets:
        """What the dense block gives: behind the dense blocks, or on the inputs of the pruned one."""
        began = time.perf_counter()
        stream = streams.dense or streams.pruned
        folder = None if streams.folder is None else streams.folder.with_name(f"{streams.folder.name}-{block.index}")
        targets = Targets(HiddenStates(len(stream.batches), folder, pin=stream.device.type == "cuda"))
        try:
            with loaded(self.skeleton, block, original):
                running = time.perf_counter()
                for batch in range(len(stream.batches)):
                    targets.add(stream.run(block, batch, aside=streams.dense is None))
                    self._tell("dense", block, batch + 1, len(stream.batches))
                targets.seconds = time.perf_counter() - running
            if not math.isfinite(sum(targets.squares)):
                raise NumericalError(
                    f"{block.path}: the dense model's own outputs are not finite. Is it sound? Try --dtype float32."
                )
        except BaseException:
            targets.states.close()
            raise
        self.clock.add("dense forward", began)
        return targets

    def _seconds(self, block: Block, forward: float) -> float | None:
        """How long to tune this block, when a forward of all samples through one takes `forward` seconds.

        Blocks that are tuned have the same share of the time that is left, less what else each block up to the last of
        them takes: as measured until now, and two forwards for the first. Raises `CalibrationError` when nothing is
        left from the beginning; where that is so later on, a block stays as it was.
        """
        if self.minutes is None:
            return None
        now, last = time.perf_counter(), max(self.matrices)
        first, began = self.first_tuned or (block.index, now)
        self.first_tuned = (first, began)
        passed = block.index - first
        beside = (now - began - self.tuning_seconds) / passed if passed else 2 * forward
        left = 60 * self.minutes - (now - self.started) - beside * (last - block.index + 1)
        if left <= 0 and not passed:
            raise CalibrationError(
                f"--minutes: got {self.minutes:g}. {(now - self.started) / 60:.1f} have passed, and forwards of all "
                f"samples take about {beside * (last - block.index + 1) / 60:.1f} more, so that none are left to tune "
                f"{block.path} and what follows. Use more minutes or fewer --samples."
            )
        return max(left / sum(index >= block.index for index in self.matrices), 0.0)

    def _tune(
        self,
        block: Block,
        matrices: Sequence[Matrix],
        tensors: dict[str, Tensor],
        stream: Stream,
        targets: Targets,
        seconds: float | None,
    ) -> dict[str, Tensor]:
        """The tensors that tuning changed; they are in the block's module, and the record is made."""
        began = time.perf_counter()
        tuned = tune(
            block,
            matrices,
            tensors,
            stream,
            targets,
            self.tuning,
            seconds,
            progress=lambda done, total: self._tell("tune", block, done, total),
        )
        self.tuning_seconds += min(time.perf_counter() - began, seconds or 0.0)
        names = [name for group in self.skeleton.conversion.of(tuned.changed) for name in group.names]
        self.skeleton.update({name: tuned.changed.get(name, tensors[name]) for name in names})
        recovery = self.manifest.recovery
        assert recovery is not None
        for matrix in matrices:
            recovery["masks"][matrix.name] = mask_digest(matrix.view(tensors) != 0)
            if matrix.tensor in tuned.changed:
                recovery["trained"][matrix.tensor] = self.manifest.tensors[matrix.tensor]
                self.manifest.matrices[matrix.name]["kept_identical"] = False
        record = {
            "index": block.index,
            "path": block.path,
            "matrices": len(matrices),
            "before": tuned.before,
            "after": tuned.after,
            "epochs": tuned.epochs,
            "best_epoch": tuned.best,
            "nudged": tuned.nudged,
            "diverged": tuned.diverged,
            "seconds": round(self.clock.add("tune", began), 6),
        }
        recovery["blocks"].append(record)
        self.on_block(record)
        return tuned.changed

    def _read(self, block: Block, last: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """In the background: the block's tensors, pruned and dense (up to the last tuned block), both checked."""
        began = time.perf_counter()
        tensors = self.skeleton.read(block)
        for name in self.skeleton.block_tensors[block.index]:
            self._check(name, tensors[name])
        for matrix in self.matrices.get(block.index, ()):
            check_weight(matrix.name, matrix.view(tensors))
        wanted = list(tensors) if block.index <= last else []
        original = self.original.read(wanted, pin=self.skeleton.device.type == "cuda") if wanted else {}
        self.clock.seconds["read"] = self.clock.seconds.get("read", 0.0) + time.perf_counter() - began
        return tensors, original

    def _check(self, name: str, tensor: Tensor) -> None:
        if tensor_digest(tensor) != self.manifest.tensors.get(name):
            raise CheckpointError(
                f"{self.original.folder}: {name} was altered after pruning; see secateur verify. Prune again."
            )

    def _write_outside(self) -> None:
        inside = {name for names in self.skeleton.block_tensors for name in names}
        for name in self.skeleton.source.names:
            if name not in inside:
                tensor = self.skeleton.source.read([name])[name]
                self._check(name, tensor)
                self.writer.write(name, tensor)

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        began = time.perf_counter()
        for name, tensor in tensors.items():
            self.writer.write(name, tensor)
        self.writer.flush()
        self.clock.seconds["write"] = self.clock.seconds.get("write", 0.0) + time.perf_counter() - began

    def _tell(self, stage: str, block: Block, done: int = 0, total: int = 0) -> None:
        self.on_event(Event(stage, block.index, len(self.skeleton.blocks), done, total))


@dataclass
class _Streams:
    """The samples behind the tuned blocks, and, where targets are dense, behind the dense ones."""

    pruned: Stream
    dense: Stream | None
    folder: Path | None
