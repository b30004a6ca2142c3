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
from secateur.models.shape.skeleton import loaded
from secateur.models.shape.structure import Block
from secateur.record.manifest import Manifest, mask_digest, tensor_digest
from secateur.recover.block_tuning import Split, Targets, tune
from secateur.recover.dense_source import DenseSource
from secateur.recover.settings import BlockSettings
from secateur.runs.conveyor import Conveyor
from secateur.runs.events import Event

OnBlock = Callable[[Mapping[str, Any]], None]


@dataclass
class BlockPass:
    """One pass over the blocks."""

    settings: BlockSettings
    conveyor: Conveyor  # through the pruned checkpoint; dense blocks are loaded into its skeleton too
    original: DenseSource
    matrices: Mapping[int, Sequence[Matrix]]  # what is tuned, by block
    split: Split
    started: float  # by `time.perf_counter`
    states: Path  # where hidden states may go
    manifest: Manifest
    first_tuned: tuple[int, float] | None = None  # its index, and when
    tuning_seconds: float = 0.0  # of all blocks, as far as they were given

    def __post_init__(self) -> None:
        self.skeleton, self.clock, self.last = self.conveyor.skeleton, self.conveyor.clock, max(self.matrices)

    @torch.no_grad()
    def run(self) -> None:
        """Tune block by block, and write everything."""
        with ExitStack() as stack:
            self._record(stack)
            self.conveyor.carry(lambda block, found: self._block(block, *found), read=self._read, check=self._check)

    def _record(self, stack: ExitStack) -> None:
        """Record the samples for the tuned blocks and, where targets are dense, once more for the dense ones."""
        began = time.perf_counter()
        self.skeleton.load_outside(head=False)
        batches, dense = self.split.batches, self.settings.targets == "dense"
        each = sum(batch.numel() for batch in batches) * self.skeleton.hidden_size * self.skeleton.dtype.itemsize
        self.folder = states_folder(self.settings.offload_states, (2 + dense) * each, self.states)
        made = []
        for name in ("pruned", "dense")[: 1 + dense]:
            made.append(
                Stream(
                    self.skeleton,
                    batches,
                    states_folder=self._place(name),
                    progress=lambda done, total: self.conveyor.on_event(Event("record", 0, 0, done, total)),
                )
            )
            stack.callback(made[-1].close)
        self.pruned, self.dense = made[0], made[1] if dense else None
        self.skeleton.unload_outside()
        self.clock.add("record calls", began)

    def _place(self, name: str | int) -> Path | None:
        return None if self.folder is None else self.folder.with_name(f"{self.folder.name}-{name}")

    def _block(self, block: Block, tensors: dict[str, Tensor], original: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint tensors of the finished block; the streams have moved on to the next."""
        own = {name: tensors[name] for name in self.skeleton.block_tensors[block.index]}
        if block.index > self.last:
            return own
        matrices, pruned = self.matrices.get(block.index, ()), self.pruned
        count = len(pruned.batches)
        with ExitStack() as stack:
            targets = Targets(HiddenStates(count, self._place(block.index), pin=pruned.device.type == "cuda"))
            stack.callback(targets.states.close)
            if matrices or self.dense is not None:
                self._take_targets(targets, block, original)
            with loaded(self.skeleton, block, tensors):
                if matrices:
                    own |= self._tune(block, matrices, tensors, targets)
                with self.clock.timed("propagation forward"):
                    for batch in range(count if block.index < self.last else 0):
                        pruned.states.put(batch, pruned.run(block, batch))
                        self.conveyor.tell("forward", block, batch + 1, count)
            pruned.release(block)
            if self.dense is not None:
                stack.pop_all()
                self.dense.states.close()
                self.dense.states = targets.states
                self.dense.release(block)
        return own

    def _take_targets(self, targets: Targets, block: Block, original: dict[str, Tensor]) -> None:
        """Add the outputs of the dense block: after the dense blocks before it, or on the inputs of the pruned one."""
        began = time.perf_counter()
        stream = self.dense or self.pruned
        with loaded(self.skeleton, block, original):
            running = time.perf_counter()
            for batch in range(len(stream.batches)):
                targets.add(stream.run(block, batch, aside=self.dense is None))
                self.conveyor.tell("dense", block, batch + 1, len(stream.batches))
            targets.seconds = time.perf_counter() - running
        if not math.isfinite(sum(targets.squares)):
            raise NumericalError(
                f"{block.path}: the dense model's own outputs are not finite. Is it sound? Try --dtype float32."
            )
        self.clock.add("dense forward", began)

    def _seconds(self, block: Block, forward: float) -> float | None:
        """How long to tune this block, when a forward of all samples through one takes `forward` seconds.

        Blocks that are tuned have the same share of the time that is left, less what else each block up to the last of
        them takes: as measured until now, and two forwards for the first. Raises `CalibrationError` when nothing is
        left from the beginning; where that is so later on, a block stays as it was.
        """
        minutes, now = self.settings.minutes, time.perf_counter()
        if minutes is None:
            return None
        first, began = self.first_tuned or (block.index, now)
        self.first_tuned = (first, began)
        passed = block.index - first
        beside = (now - began - self.tuning_seconds) / passed if passed else 2 * forward
        left = 60 * minutes - (now - self.started) - beside * (self.last - block.index + 1)
        if left <= 0 and not passed:
            raise CalibrationError(
                f"--minutes: got {minutes:g}. {(now - self.started) / 60:.1f} have passed, and forwards of all "
                f"samples take about {beside * (self.last - block.index + 1) / 60:.1f} more, so that none are left to "
                f"tune {block.path} and what follows. Use more minutes or fewer --samples."
            )
        return max(left / sum(index >= block.index for index in self.matrices), 0.0)

    def _tune(
        self, block: Block, matrices: Sequence[Matrix], tensors: dict[str, Tensor], targets: Targets
    ) -> dict[str, Tensor]:
        """The tensors that tuning changed; they are in the block's module, and the record is made."""
        seconds = self._seconds(block, targets.seconds)
        began = time.perf_counter()
        tuned = tune(
            block,
            matrices,
            tensors,
            self.pruned,
            targets,
            self.split,
            self.settings,
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
        self.settings.on_block(record)
        return tuned.changed

    def _read(self, block: Block) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """In the background: the block's tensors, pruned and dense (up to the last tuned block), both checked."""
        tensors = self.skeleton.read(block)
        for name in self.skeleton.block_tensors[block.index]:
            self._check(name, tensor_digest(tensors[name]))
        for matrix in self.matrices.get(block.index, ()):
            check_weight(matrix.name, matrix.view(tensors))
        wanted = list(tensors) if block.index <= self.last else []
        original = self.original.read(wanted, pin=self.skeleton.device.type == "cuda") if wanted else {}
        return tensors, original

    def _check(self, name: str, digest: str) -> None:
        if digest != self.manifest.tensors.get(name):
            raise CheckpointError(
                f"{self.original.folder}: {name} was altered after pruning; see secateur verify. Prune again."
            )
