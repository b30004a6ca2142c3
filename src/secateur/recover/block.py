"""`reconstruct`: block by block, the kept weights of a pruned checkpoint tuned to the outputs of the dense model.

For each block: run the calibration samples through the dense one to get targets, tune the kept weights of the pruned
one, write it, and run the samples through it as it was written to make the next block's inputs. The next block is read
and the last one written while this one is tuned; no more are held, whatever the model's size.
"""

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.collect.model_windows import model_windows
from secateur.core.checks import check_weight
from secateur.errors import CalibrationError, NumericalError
from secateur.files.checkpoint import tensor_digest
from secateur.files.folders import locate
from secateur.models.flow.stream import HiddenStates, Stream, default_batch_size, states_folder
from secateur.models.opening.opened import open_model
from secateur.models.shape.matrices import Matrix, by_block
from secateur.models.shape.skeleton import loaded
from secateur.models.shape.structure import Block
from secateur.plans.plan import Plan, matching
from secateur.record.manifest import Manifest, mask_digest, read_manifest
from secateur.record.versions import run_facts
from secateur.recover.block_tuning import Split, Targets, tune
from secateur.recover.dense_source import DenseSource
from secateur.recover.settings import BlockSettings
from secateur.recover.written import check_unchanged
from secateur.runs.checkpoint import checkpoint_output
from secateur.runs.conveyor import Conveyor, Finished
from secateur.runs.events import PLACING, Clock, Event
from secateur.runs.journal import common_facts
from secateur.runs.options import taking
from secateur.runs.output import check_output
from secateur.runs.processes import Processes, shared_run
from secateur.runs.transaction import Transaction

logger = logging.getLogger(__name__)


@taking(BlockSettings)
def reconstruct(settings: BlockSettings) -> Manifest:
    """The manifest of a pruned checkpoint whose kept weights were tuned block by block, written to `output`.

    `pruned` is a checkpoint that `prune` wrote, `dense` the model that it was made from (by default where the manifest
    says). `samples` (128) windows of `length` (2048) tokens are drawn as in `prune`; at least the share `held_out` of
    them is never trained on, and judges after each of at most `epochs` epochs whether a block got better. With
    `minutes` a block is tuned for its share of the time at most, and its learning rate falls with the clock. Each step
    of Adam sees `step` samples; `learning_rate` is relative to the root mean square of each parameter's kept weights.
    `targets` says what a block is fitted to: the dense block's outputs after the dense blocks before it ("dense"), or
    its outputs on the inputs that come from the tuned blocks ("pruned"). `only` and `skip` choose among the pruned
    matrices. At most `batch_size` samples run through a block at once, which changes no result but for rounding.

    Every zero stays zero, and no other weight becomes one. Tensors that were not tuned are byte-identical. A block
    that cannot be made better on the held-out samples stays as it is. What a run that was ended leaves, the same call
    with `resume` goes on with, to the same bytes (but for `minutes`, which make a result depend on the clock). The
    manifest is that of the pruning with a section `recovery`. `on_block` gets the record of each block when it is done.
    Processes that torchrun has started share the samples, and every number of them writes the same bytes; each of them
    calls `on_block`.

    Raises `CalibrationError`, `PatternError`, `ModelStructureError`, `NumericalError`, `CheckpointError` or
    `ProcessError`, each of which says what to do.
    """
    started = time.perf_counter()
    folder, on_event = locate(os.fspath(settings.pruned)), settings.on_event
    with ExitStack() as stack:
        processes = stack.enter_context(shared_run())
        base = read_manifest(folder)
        original = DenseSource(folder, base, settings.dense)

        def begin() -> Transaction:
            check_output(settings.output, original.path, settings.overwrite)
            target = check_output(settings.output, folder, settings.overwrite)
            assert target is not None
            return stack.enter_context(Transaction(target, settings.overwrite, resume=settings.resume))

        transaction = processes.on_first(begin)
        how: dict[str, Any] = {"device": settings.device, "trust_remote_code": settings.trust_remote_code}
        opened = open_model(folder, dtype=settings.dtype, **how)
        if opened.skeleton.dtype == torch.float16:  # in which gradients underflow
            if settings.dtype != "auto":
                raise CalibrationError(
                    f"--dtype {settings.dtype}: too narrow for gradients. Use bfloat16, float32 or auto."
                )
            opened = open_model(folder, dtype="float32", **how)
        skeleton = opened.skeleton
        original.check(skeleton)
        shapes = {matrix.name: matrix.shape for matrix in skeleton.matrices}
        plan = Plan.from_json(base.plan)
        plan.check(shapes)
        chosen = set(matching({name: shapes[name] for name in plan}, only=settings.only, skip=settings.skip))
        matrices = by_block(matrix for matrix in skeleton.matrices if matrix.name in chosen)
        dtype = str(skeleton.dtype).removeprefix("torch.")
        clock = Clock(synchronise=skeleton.device.type == "cuda", began=started)
        on_event(Event("calibrate"))
        with clock.timed("calibrate"):
            windows = model_windows(
                opened,
                settings,
                dense=lambda: open_model(
                    original.path,
                    device=str(skeleton.device),
                    dtype=dtype,
                    revision=base.source.get("revision") if settings.dense is None else None,
                    trust_remote_code=settings.trust_remote_code,
                ),
                progress=lambda done, total: on_event(Event("calibrate", done=done, total=total)),
                placing=lambda done, total: on_event(Event(PLACING, done=done, total=total)),
            )
        most = settings.batch_size or default_batch_size(windows.length, skeleton.device)
        split = Split.of(windows, settings.held_out, settings.step, most)
        manifest = replace(base, matrices={name: dict(entry) for name, entry in base.matrices.items()})
        recovery: dict[str, Any] = {
            "method": "block",
            "settings": {
                **{name: getattr(settings, name) for name in ("targets", "epochs", "minutes", "learning_rate")},
                "step": split.step,
                "patience": settings.patience,
                "seed": settings.seed,
                "samples_trained": split.trained,
                "samples_held_out": windows.samples - split.trained,
                "batch_size": split.batch_size,
                "device": skeleton.device.type,
                "dtype": dtype,
                "matrices": sum(map(len, matrices.values())),
            },
            "calibration": dict(windows.provenance) | {"digest": windows.digest},
            "base": {"path": str(folder.resolve()), "digest": base.digest},
            "dense": original.path,
            **run_facts(settings.command),
            "blocks": [],
            "trained": {},  # sha256 of each changed tensor as it was, and of each tuned matrix's mask, for `verify`
            "masks": {},
            "earlier": base.recovery,
        }
        manifest.recovery = recovery
        facts = {"base": base.digest, "tokens": windows.digest, "settings": recovery["settings"]}
        facts |= common_facts(opened)
        facts |= {"only": list(settings.only), "skip": list(settings.skip)}
        processes.agree(facts)
        own = split.share(processes)
        if (batches := len(split.steps[0])) < processes.count and processes.first:
            logger.warning(
                "A step has %d %s, so that %d of %d processes work on it at a time. Steps of several batches "
                "(--accumulation) keep more of them busy.",
                batches,
                "batch" if batches == 1 else "batches",
                batches,
                processes.count,
            )
        written = None
        if transaction is not None:
            transaction.journal.begin("recover --method block", len(skeleton.blocks), facts)
            clock.resume(transaction.journal.seconds)
            written = stack.enter_context(checkpoint_output(transaction, opened))
        BlockPass(
            settings,
            conveyor=Conveyor(skeleton, written, clock, on_event),
            original=original,
            matrices=matrices,
            split=own,
            started=started - clock.earlier,
            states=processes.room(Path.cwd() if transaction is None else transaction.partial),
            manifest=manifest,
            processes=processes,
        ).run()
        share = split.trained / windows.samples
        recovery["forwards"] = sum(forwards(block["epochs"], share) for block in recovery["blocks"]) / len(
            recovery["blocks"]
        )
        recovery["seconds"] = clock.so_far()
        if written is not None:
            written.seal(manifest)
            written.publish(manifest)
        processes.gather(None)  # what the first one writes is there when any of them returns
    on_event(Event("done"))
    return manifest


def forwards(epochs: float, trained: float) -> float:
    """The work of one block in forwards of all samples, when `trained` is the share of them that is trained on.

    One for the targets, one for the next block's inputs, three for each epoch's forward and backward on what is trained
    on, and one forward of the rest before the first epoch and after each.
    """
    return 2 + 3 * epochs * trained + (math.ceil(epochs) + 1) * (1 - trained)


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
    processes: Processes
    first_tuned: tuple[int, float] | None = None  # its index, and when
    tuning_seconds: float = 0.0  # of all blocks, their shares of --minutes at most

    def __post_init__(self) -> None:
        self.skeleton, self.clock, self.last = self.conveyor.skeleton, self.conveyor.clock, max(self.matrices)
        self.finished = self.processes.gather(self.conveyor.finished())[0]

    @torch.no_grad()
    def run(self) -> None:
        """Record the samples' calls, for dense targets those of the dense blocks too; then tune block by block."""
        skeleton, dense = self.skeleton, self.settings.targets == "dense"
        batches = list(self.split.batches.values())
        each = sum(batch.numel() for batch in batches) * skeleton.hidden_size * skeleton.dtype.itemsize
        self.folder = states_folder(self.settings.offload_states, (2 + dense) * each, self.states)
        made: list[Stream] = []
        with ExitStack() as stack:
            with self.clock.timed("record calls"):
                skeleton.load_outside(head=False)
                for _ in range(1 + dense):
                    stream = Stream(
                        skeleton,
                        batches,
                        states_folder=self.folder,
                        progress=lambda done, total: self.conveyor.on_event(Event("record", 0, 0, done, total)),
                    )
                    made.append(stack.enter_context(closing(stream)))
                skeleton.unload_outside()
            self.pruned, self.dense = made[0], made[1] if dense else None
            self.conveyor.carry(
                self._block,
                read=self._read,
                check=partial(check_unchanged, self.original.folder, self.manifest),
            )

    def _block(self, block: Block, found: "Found") -> Finished | None:
        """The checkpoint tensors of the finished block; the streams have moved on to the next."""
        tensors, original, tuned = found.tensors, found.original, found.tuned
        own = {name: tensors[name] for name in self.skeleton.block_tensors[block.index]}
        part = self.finished.get(block.index)
        for name in sorted(tuned or ()):
            assert tuned is not None
            self.processes.send(tuned[name], 0)
        if block.index > self.last:
            return None if part is not None else Finished(own, {})
        record: dict[str, Any] = {} if part is None else part.record
        matrices, pruned = self.matrices.get(block.index, ()), self.pruned
        for stream in (self.pruned, self.dense):
            if stream is not None:
                stream.reach(block)
        count = len(pruned.batches)
        with ExitStack() as stack:
            targets = Targets(HiddenStates(count, self.folder, pin=pruned.device.type == "cuda"))
            stack.callback(targets.states.close)
            if self.dense is not None or (matrices and tuned is None):
                self._take_targets(targets, block, original)
            with loaded(self.skeleton, block, tensors):
                if tuned is not None:
                    self._update(tuned, tensors)
                elif matrices:
                    changed, record = self._tune(block, matrices, tensors, targets)
                    self._update(changed, tensors)
                    own |= changed
                self._note(record)
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
        return None if tuned is not None else Finished(own, record)

    def _update(self, changed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Put changed tensors, and what makes one parameter with them, into the block's module."""
        names = [name for group in self.skeleton.conversion.of(changed) for name in group.names]
        self.skeleton.update({name: changed.get(name, tensors[name]) for name in names})

    def _note(self, record: Mapping[str, Any]) -> None:
        """Add what was done to a block to the manifest; nothing where it was not tuned."""
        recovery = self.manifest.recovery
        assert recovery is not None
        if not record:
            return
        recovery["blocks"].append(record["block"])
        recovery["masks"] |= record["masks"]
        recovery["trained"] |= record["trained"]
        for name in record["masks"]:
            if self.manifest.matrices[name]["tensor"] in record["trained"]:
                self.manifest.matrices[name]["kept_identical"] = False
        first, after = record["first tuned"]
        self.first_tuned = self.first_tuned or (first, self.started + after)
        self.tuning_seconds = record["tuning seconds"]
        self.settings.on_block(record["block"])

    def _take_targets(self, targets: Targets, block: Block, original: dict[str, Tensor]) -> None:
        """Add the outputs of the dense block: after the dense blocks before it, or on the inputs of the pruned one."""
        stream = self.dense or self.pruned
        with self.clock.timed("dense forward"), loaded(self.skeleton, block, original):
            running = time.perf_counter()
            for batch, number in enumerate(self.split.batches):
                targets.add(number, stream.run(block, batch, aside=self.dense is None))
                self.conveyor.tell("dense", block, batch + 1, len(stream.batches))
            targets.seconds = time.perf_counter() - running
        targets.join(self.processes)
        if not math.isfinite(math.fsum(targets.squares.values())):
            raise NumericalError(
                f"{block.path}: the dense model's own outputs are not finite. Is it sound? Try --dtype float32."
            )

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
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors that tuning changed, and its record."""
        # By the clock of one.
        (seconds, *_) = self.processes.gather(self.processes.on_first(lambda: self._seconds(block, targets.seconds)))
        began = time.perf_counter()
        changed, facts = tune(
            block,
            matrices,
            tensors,
            self.pruned,
            targets,
            self.split,
            self.settings,
            seconds,
            progress=lambda done, total: self.conveyor.tell("tune", block, done, total),
            processes=self.processes,
        )
        self.tuning_seconds += min(time.perf_counter() - began, seconds or 0.0)
        first, when = self.first_tuned or (block.index, began)
        record = {
            "block": {
                "index": block.index,
                "path": block.path,
                "matrices": len(matrices),
                **facts,
                "seconds": round(self.clock.add("tune", began), 6),
            },
            "masks": {matrix.name: mask_digest(matrix.view(tensors) != 0) for matrix in matrices},
            "trained": {name: self.manifest.tensors[name] for name in changed},
            "first tuned": [first, when - self.started],
            "tuning seconds": self.tuning_seconds,
        }
        return changed, self.processes.gather(record)[0]

    def _read(self, block: Block) -> "Found":
        """In the background: the block's tensors, pruned and dense (up to the last tuned block), both checked."""
        tensors = self.skeleton.read(block)
        for name in self.skeleton.block_tensors[block.index]:
            check_unchanged(self.original.folder, self.manifest, name, tensor_digest(tensors[name]))
        for matrix in self.matrices.get(block.index, ()):
            check_weight(matrix.name, matrix.view(tensors))
        wanted = list(tensors) if block.index <= self.last else []
        original = self.original.read(wanted, pin=self.skeleton.device.type == "cuda") if wanted else {}
        if (part := self.finished.get(block.index)) is None:
            return Found(tensors, original, None)
        changed, output = part.record.get("trained", ()), self.conveyor.output
        if output is None:  # what the first process has read comes from there
            return Found(tensors, original, {name: torch.empty_like(tensors[name]) for name in changed})
        return Found(tensors, original, output.read(changed))


@dataclass(frozen=True)
class Found:
    """What is read of a block: its tensors, those of the dense model, and those that an earlier process has tuned."""

    tensors: dict[str, Tensor]
    original: dict[str, Tensor]
    tuned: dict[str, Tensor] | None
