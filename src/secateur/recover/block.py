"""`reconstruct`: block by block, the kept weights of a pruned checkpoint tuned to give what the dense model gives.

For each block: read it twice, run the calibration samples through the dense one to get targets, tune the kept weights
of the pruned one, write it, and run the samples through it as it was written to make the next block's inputs. One block
is in memory; the next one is read and the last one written while this one is tuned.
"""

import datetime
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.block_loop import Clock, Event, OnEvent
from secateur.calibration import Windows, calibration_windows, check_length, check_vocabulary
from secateur.core.checks import check_weight
from secateur.engine import run_versions
from secateur.errors import CalibrationError, CheckpointError, NumericalError
from secateur.manifest import Manifest, file_digests, read_manifest, tensor_digest
from secateur.models.checkpoint import locate
from secateur.models.matrices import Matrix
from secateur.models.memory import trim
from secateur.models.opened import OpenedModel, open_model, open_source
from secateur.models.skeleton import Skeleton, Source, loaded
from secateur.models.stream import HiddenStates, Stream, default_batch_size, states_folder
from secateur.models.structure import Block
from secateur.models.writer import CheckpointWriter, writing
from secateur.output import Scratch, check_output
from secateur.plan import Plan, matching
from secateur.recover.block_tuning import Targets, Tuning, tune

OnBlock = Callable[[Mapping[str, Any]], None]


def reconstruct(
    pruned: str | os.PathLike[str],
    dense: str | os.PathLike[str] | None = None,
    *,
    calibration: str | Sequence[str] | Tensor | Windows = "c4",
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    sampling: str | None = None,
    epochs: int = 10,
    learning_rate: float = 0.03,
    step: int = 8,
    held_out: float = 0.125,
    patience: int = 3,
    targets: str = "dense",
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload_states: str = "auto",
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    command: Sequence[str] | None = None,
    on_event: OnEvent = lambda event: None,
    on_block: OnBlock = lambda record: None,
) -> Manifest:
    """The manifest of a pruned checkpoint whose kept weights were tuned block by block, written to `output`.

    `pruned` is a checkpoint that `prune` wrote, `dense` the model that it was made from (by default where the manifest
    says). `samples` (128) windows of `length` (2048) tokens are drawn as in `prune`; at least the share `held_out` of
    them is never trained on, and judges after each of at most `epochs` epochs whether a block got better. Each step
    of Adam sees `step` samples; `learning_rate` is relative to the root mean square of each parameter's kept weights.
    `targets` says what a block should give: what the dense block gives behind the dense blocks before it ("dense"), or
    what it gives on the inputs that the tuned blocks leave it ("pruned"). `only` and `skip` choose among the pruned
    matrices. At most `batch_size` samples run through a block at once, which changes no result but for rounding.

    Every zero stays zero, and no other weight becomes one. Tensors that were not tuned are byte-identical. A block
    that cannot be made better on the held-out samples stays as it is. The manifest is that of the pruning with a
    section `recovery`. `on_block` gets the record of each block when it is done.

    Raises `CalibrationError`, `PatternError`, `ModelStructureError`, `NumericalError` or `CheckpointError`, each of
    which says what to do.
    """
    started = time.perf_counter()
    only, skip = ([globs] if isinstance(globs, str) else globs for globs in (only, skip))
    check_numbers(epochs, learning_rate, step, held_out, patience, targets, batch_size)
    folder = locate(os.fspath(pruned))
    base = read_manifest(folder)
    target = check_output(output, folder, overwrite)
    assert target is not None
    opened = _open(folder, device, dtype, trust_remote_code)
    skeleton = opened.skeleton
    original = DenseSource(folder, base, dense)
    check_output(output, original.path, overwrite)
    original.check(skeleton)
    matrices = _matrices(skeleton, base, only, skip)
    on_event(Event("calibrate"))
    windows = calibration_windows(
        calibration,
        tokenizer or (None if isinstance(calibration, Tensor | Windows) else opened.load_tokenizer()),
        samples=samples,
        length=length,
        seed=seed,
        sampling=sampling,  # type: ignore[arg-type]  # checked there
        progress=lambda done, total: on_event(Event("calibrate", done=done, total=total)),
    )
    check_vocabulary(windows, skeleton.vocabulary_size)
    check_length(windows, skeleton.positions)
    split = Split.of(windows, held_out, step, batch_size or default_batch_size(windows.length, skeleton.device))
    tuning = Tuning(split.steps, split.held_batches, epochs, learning_rate, patience, seed)
    manifest = replace(base, matrices={name: dict(entry) for name, entry in base.matrices.items()})
    recovery: dict[str, Any] = {
        "method": "block",
        "settings": {
            "targets": targets,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "step": split.step,
            "patience": patience,
            "seed": seed,
            "samples_trained": split.trained,
            "samples_held_out": windows.samples - split.trained,
            "batch_size": split.batch_size,
            "device": str(skeleton.device),
            "dtype": str(skeleton.dtype).removeprefix("torch."),
            "matrices": sum(map(len, matrices.values())),
        },
        "calibration": dict(windows.provenance) | {"digest": windows.digest},
        "base": {"path": str(folder.resolve()), "digest": base.to_json()["digest"]},
        "dense": original.path,
        "versions": run_versions(),
        "command": list(command) if command is not None else None,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "blocks": [],
    }
    if base.recovery is not None:
        recovery["earlier"] = base.recovery
    manifest.recovery = recovery
    clock = Clock(synchronise=skeleton.device.type == "cuda")
    with Scratch(target, overwrite) as scratch, ExitStack() as stack:
        writer = CheckpointWriter(scratch.folder, skeleton.source.layout())
        stack.callback(writer.abandon)
        with writing(scratch.folder):
            opened.write_companions(scratch.folder)
        _Reconstruction(
            skeleton=skeleton,
            original=original,
            matrices=matrices,
            ids=windows.input_ids,
            batch_size=split.batch_size,
            tuning=tuning,
            targets=targets,
            offload=offload_states,
            scratch=target.with_name(f"{target.name}.states-{os.getpid()}"),
            writer=writer,
            manifest=manifest,
            clock=clock,
            on_event=on_event,
            on_block=on_block,
        ).run()
        writer.close()
        recovery["forwards"] = _forwards(recovery["blocks"], split, windows.samples)
        recovery["seconds"] = clock.seconds | {"total": time.perf_counter() - started}
        manifest.tensors, manifest.headers = writer.digests, writer.header_digests
        manifest.files = file_digests(scratch.folder)
        manifest.write(scratch.folder)
        with writing(scratch.target):
            scratch.commit()
    on_event(Event("done"))
    return manifest


def check_numbers(
    epochs: int,
    learning_rate: float,
    step: int,
    held_out: float,
    patience: int,
    targets: str,
    batch_size: int | None,
) -> None:
    """Raise `CalibrationError` for a setting that makes no sense."""
    for option, count in (("epochs", epochs), ("step", step), ("patience", patience), ("batch-size", batch_size)):
        if count is not None and count < 1:
            raise CalibrationError(f"--{option}: got {count}, expected at least 1.")
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise CalibrationError(f"--learning-rate: got {learning_rate}, expected a positive number.")
    if not 0 < held_out < 1:
        raise CalibrationError(f"--held-out: got {held_out}, expected a share between 0 and 1, such as 0.125.")
    if targets not in ("dense", "pruned"):
        raise CalibrationError(f'--targets: got "{targets}", expected dense or pruned.')


@dataclass(frozen=True)
class Split:
    """Which samples are trained on, in steps of whole batches; the rest, which come last, is held out."""

    steps: Sequence[range]  # of batches
    held_batches: range
    trained: int  # samples
    step: int
    batch_size: int

    @classmethod
    def of(cls, windows: Windows, held_out: float, step: int, batch_size: int) -> "Split":
        """Whole steps only: what does not fill one is held out too. A batch is the largest that steps divide into.

        Raises `CalibrationError` when there are too few samples to train on some and hold others out.
        """
        most = windows.samples - max(1, round(windows.samples * held_out))
        if most < 1:
            raise CalibrationError(
                f"{windows.samples} calibration sample{'s' if windows.samples > 1 else ''} with --held-out {held_out}: "
                "none is left to train on. Use more --samples (128 is usual)."
            )
        step = min(step, most)
        size = max(divisor for divisor in range(1, min(step, batch_size) + 1) if step % divisor == 0)
        count, each = most // step, step // size
        steps = [range(number * each, (number + 1) * each) for number in range(count)]
        held = range(count * each, math.ceil(windows.samples / size))
        return cls(steps, held, count * step, step, size)


class DenseSource:
    """The tensors of the dense model, of which each is checked to be what the pruned checkpoint was made from."""

    def __init__(self, folder: Path, manifest: Manifest, dense: str | os.PathLike[str] | None) -> None:
        """`folder` and `manifest` are those of the pruned checkpoint. Raises `CheckpointError` without dense weights."""
        origin = manifest.source
        self.folder, self._manifest = folder, manifest
        if dense is None and not origin.get("path"):
            raise CheckpointError(
                f"{folder}: was pruned from a module in memory, and its manifest names no dense model. Name it: --dense."
            )
        self.path = os.fspath(dense) if dense is not None else str(origin["path"])
        try:
            self.source: Source = (
                # Exact: dequantised to the dtype that pruning saw.
                open_model(self.path, device="cpu", dtype=manifest.settings["dtype"]).skeleton.source
                if self.path.endswith(".gguf")
                else open_source(self.path, origin.get("revision") if dense is None else None)
            )
        except CheckpointError as error:
            if dense is not None:
                raise
            raise CheckpointError(
                f"{error} The manifest of {folder} names it as the dense model. If it is elsewhere now, say so: --dense."
            ) from None

    def check(self, skeleton: Skeleton) -> None:
        """Raise `CheckpointError` for names and shapes that differ, and for other tensors outside the blocks."""
        there = set(self.source.names)
        for name in skeleton.source.names:
            if name not in there:
                raise CheckpointError(f"{self.path}: has no tensor {name}, which {self.folder} has. {self._advice}")
            found = (self.source.shape(name), self.source.dtype(name))
            expected = (skeleton.source.shape(name), skeleton.source.dtype(name))
            if found != expected:
                raise CheckpointError(
                    f"{self.path}: {name} is of shape {found[0]} and {found[1]}, and {self.folder} has {expected[0]} and "
                    f"{expected[1]}. {self._advice}"
                )
        for name in skeleton.outside_tensors:
            self.read([name])

    def read(self, names: Sequence[str], *, pin: bool = False) -> dict[str, Tensor]:
        """The named tensors. Raises `CheckpointError` for one that is not what was pruned."""
        tensors = self.source.read(names, pin=pin)
        for name, tensor in tensors.items():
            expected = self._manifest.source_tensors.get(name) or self._manifest.tensors.get(name, "none")
            found = tensor_digest(tensor)
            if found != expected:
                raise CheckpointError(
                    f"{self.path}: {name} is not what {self.folder} was made from (sha256 {found[:12]}, expected "
                    f"{expected[:12]}). {self._advice}"
                )
        return tensors

    @property
    def _advice(self) -> str:
        return "Give the dense model that was pruned (--dense)."


@dataclass
class _Reconstruction:
    """One pass over the blocks."""

    skeleton: Skeleton  # of the pruned checkpoint; dense blocks are loaded into it too
    original: DenseSource
    matrices: Mapping[int, Sequence[Matrix]]  # what is tuned, by block
    ids: Tensor
    batch_size: int
    tuning: Tuning
    targets: str
    offload: str
    scratch: Path
    writer: CheckpointWriter
    manifest: Manifest
    clock: Clock
    on_event: OnEvent
    on_block: OnBlock

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
        self.skeleton.load_outside()
        each = self.ids.numel() * self.skeleton.hidden_size * self.skeleton.dtype.itemsize
        folder = states_folder(self.offload, (3 if self.targets == "dense" else 2) * each, self.scratch)
        made = []
        for name in ("pruned", "dense")[: 2 if self.targets == "dense" else 1]:
            made.append(
                Stream(
                    self.skeleton,
                    self.ids,
                    batch_size=self.batch_size,
                    states_folder=None if folder is None else folder.with_name(f"{folder.name}-{name}"),
                    progress=lambda done, total: self.on_event(Event("record", 0, 0, done, total)),
                )
            )
            stack.callback(made[-1].close)
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
                    changed = self._tune(block, matrices, tensors, pruned, targets)
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
                for batch in range(len(stream.batches)):
                    targets.add(stream.run(block, batch, aside=streams.dense is None))
                    self._tell("dense", block, batch + 1, len(stream.batches))
            if not math.isfinite(sum(targets.squares)):
                raise NumericalError(
                    f"{block.path}: the dense model's own outputs are not finite. Is it sound? Try --dtype float32."
                )
        except BaseException:
            targets.states.close()
            raise
        self.clock.add("dense forward", began)
        return targets

    def _tune(
        self,
        block: Block,
        matrices: Sequence[Matrix],
        tensors: dict[str, Tensor],
        stream: Stream,
        targets: Targets,
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
            progress=lambda done, total: self._tell("tune", block, done, total),
        )
        names = [name for group in self.skeleton.conversion.of(tuned.changed) for name in group.names]
        self.skeleton.update({name: tuned.changed.get(name, tensors[name]) for name in names})
        for matrix in matrices:
            if matrix.tensor in tuned.changed:
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
            "seconds": round(self.clock.add("tune", began), 6),
        }
        assert self.manifest.recovery is not None
        self.manifest.recovery["blocks"].append(record)
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
                f"{self.original.folder}: {name} was altered since it was pruned. See secateur verify; then prune again."
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


def _open(folder: Path, device: str, dtype: str, trust_remote_code: bool) -> OpenedModel:
    """The pruned checkpoint, to compute in a dtype in which gradients do not underflow."""
    opened = open_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if opened.skeleton.dtype != torch.float16:
        return opened
    if dtype != "auto":
        raise CalibrationError(f"--dtype {dtype}: too narrow for gradients. Use bfloat16, float32 or auto.")
    return open_model(folder, device=device, dtype="float32", trust_remote_code=trust_remote_code)


def _matrices(
    skeleton: Skeleton, manifest: Manifest, only: Sequence[str], skip: Sequence[str]
) -> dict[int, list[Matrix]]:
    """The pruned matrices that the globs leave, by block."""
    shapes = {matrix.name: matrix.shape for matrix in skeleton.matrices}
    plan = Plan.from_json(manifest.plan)
    plan.check(shapes)
    chosen = set(matching({name: shapes[name] for name in plan}, only=only, skip=skip))
    result: dict[int, list[Matrix]] = {}
    for matrix in skeleton.matrices:
        if matrix.name in chosen:
            result.setdefault(matrix.block, []).append(matrix)
    return result


def forwards(epochs: int, trained: float) -> float:
    """The work of one block in forwards of all samples, when `trained` is the share of them that is trained on.

    One for the targets, one for the next block's inputs, three for each epoch's forward and backward on what is trained
    on, and one forward of the rest before the first epoch and after each.
    """
    return 2 + 3 * epochs * trained + (epochs + 1) * (1 - trained)


def _forwards(blocks: Sequence[Mapping[str, Any]], split: Split, samples: int) -> float:
    """The mean over the tuned blocks of what was done."""
    return sum(forwards(block["epochs"], split.trained / samples) for block in blocks) / len(blocks)
