"""The pass over the blocks of a pruned checkpoint: read twice, targets from the dense block, tune, write, move on.

The next block is read and the last one written while this one is tuned.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core.checks import check_weight
from secateur.errors import CalibrationError, CheckpointError, NumericalError
from secateur.models.flow.stream import HiddenStates, Stream, states_folder
from secateur.models.shape.matrices import Matrix
from secateur.models.shape.skeleton import Skeleton, loaded
from secateur.models.shape.structure import Block
from secateur.record.manifest import Manifest, mask_digest, tensor_digest
from secateur.recover.block_tuning import Targets, Tuning, tune
from secateur.recover.dense_source import DenseSource
from secateur.runs.conveyor import Conveyor
from secateur.runs.events import Clock, Event

OnBlock = Callable[[Mapping[str, Any]], None]


@dataclass
class BlockPass:
    """One pass over the blocks."""

    conveyor: Conveyor  # through the pruned checkpoint; dense blocks are loaded into its skeleton too
    original: DenseSource
    matrices: Mapping[int, Sequence[Matrix]]  # what is tuned, by block
    batches: Sequence[Tensor]  # of token ids
    tuning: Tuning
    started: float  # by `time.perf_counter`
    minutes: float | None
    targets: str
    offload: str
    states_place: Path
    manifest: Manifest
    on_block: OnBlock
    first_tuned: tuple[int, float] | None = None  # its index, and when
    tuning_seconds: float = 0.0  # of all blocks, as far as they were given

    @property
    def skeleton(self) -> Skeleton:
        """The model."""
        return self.conveyor.skeleton

    @property
    def clock(self) -> Clock:
        """The run's."""
        return self.conveyor.clock

    @torch.no_grad()
    def run(self) -> None:
        """Tune block by block, and write everything."""
        last = max(self.matrices)
        with ExitStack() as stack:
            streams = self._streams(stack)
            self.conveyor.carry(
                lambda block, found: self._block(block, *found, streams, last),
                read=lambda block: self._read(block, last),
                check=self._check,
            )

    def _streams(self, stack: ExitStack) -> "_Streams":
        began = time.perf_counter()
        self.skeleton.load_outside(head=False)
        each = sum(batch.numel() for batch in self.batches) * self.skeleton.hidden_size * self.skeleton.dtype.itemsize
        folder = states_folder(self.offload, (3 if self.targets == "dense" else 2) * each, self.states_place)
        made = []
        for name in ("pruned", "dense")[: 2 if self.targets == "dense" else 1]:
            made.append(
                Stream(
                    self.skeleton,
                    self.batches,
                    states_folder=None if folder is None else folder.with_name(f"{folder.name}-{name}"),
                    progress=lambda done, total: self.conveyor.on_event(Event("record", 0, 0, done, total)),
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
        last: int,
    ) -> dict[str, Tensor]:
        """The checkpoint tensors of the finished block; the streams have moved on to the next."""
        own = {name: tensors[name] for name in self.skeleton.block_tensors[block.index]}
        if block.index > last:
            return own
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
                for batch in range(len(pruned.batches) if block.index < last else 0):
                    pruned.states.put(batch, pruned.run(block, batch))
                    self.conveyor.tell("forward", block, batch + 1, len(pruned.batches))
                self.clock.add("propagation forward", began)
            pruned.release(block)
            if streams.dense is not None:
                assert targets is not None
                stack.pop_all()
                streams.dense.states.close()
                streams.dense.states = targets.states
                streams.dense.release(block)
        return own | changed

    def _targets(self, block: Block, original: dict[str, Tensor], streams: "_Streams") -> Targets:
        """The outputs of the dense block: after the dense blocks before it, or on the inputs of the pruned one."""
        began = time.perf_counter()
        stream = streams.dense or streams.pruned
        folder = None if streams.folder is None else streams.folder.with_name(f"{streams.folder.name}-{block.index}")
        targets = Targets(HiddenStates(len(stream.batches), folder, pin=stream.device.type == "cuda"))
        try:
            with loaded(self.skeleton, block, original):
                running = time.perf_counter()
                for batch in range(len(stream.batches)):
                    targets.add(stream.run(block, batch, aside=streams.dense is None))
                    self.conveyor.tell("dense", block, batch + 1, len(stream.batches))
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
            progress=lambda done, total: self.conveyor.tell("tune", block, done, total),
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
        tensors = self.skeleton.read(block)
        for name in self.skeleton.block_tensors[block.index]:
            self._check(name, tensor_digest(tensors[name]))
        for matrix in self.matrices.get(block.index, ()):
            check_weight(matrix.name, matrix.view(tensors))
        wanted = list(tensors) if block.index <= last else []
        original = self.original.read(wanted, pin=self.skeleton.device.type == "cuda") if wanted else {}
        return tensors, original

    def _check(self, name: str, digest: str) -> None:
        if digest != self.manifest.tensors.get(name):
            raise CheckpointError(
                f"{self.original.folder}: {name} was altered after pruning; see secateur verify. Prune again."
            )


@dataclass
class _Streams:
    """The samples between two blocks of the tuned model, and, where targets are dense, of the dense one."""

    pruned: Stream
    dense: Stream | None
    folder: Path | None
