"""`prune`: the one loop over the blocks, from a model to a pruned checkpoint and its manifest.

For each block: read it, run the calibration samples through it while statistics of the matrices' inputs are taken,
solve every matrix, write the block, and run the samples through the pruned block to make the next block's inputs.
The next block is read and the last one written while this one is computed.
"""

import datetime
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from secateur.calibration import Windows, calibration_windows, check_length, check_vocabulary
from secateur.core.checks import check_solution, check_weight
from secateur.core.patterns import NM, Pattern, Unstructured, with_group
from secateur.core.problem import Method, Problem, Solution
from secateur.errors import CalibrationError, CheckpointError, PatternError
from secateur.manifest import Manifest, file_digests, tensor_digest
from secateur.models.matrices import Matrix, prunable_parameters
from secateur.models.memory import trim
from secateur.models.opened import OpenedModel, open_model
from secateur.models.skeleton import Skeleton, loaded
from secateur.models.stream import Stream, default_batch_size, states_folder
from secateur.models.structure import Block
from secateur.models.tap import Enough, InputTap
from secateur.models.writer import CheckpointWriter, writing
from secateur.output import Scratch, check_output
from secateur.plan import Plan, uniform


@dataclass(frozen=True)
class Event:
    """Where a run is: a stage (calibrate, record, read, statistics, solve, forward, write, done) of a block."""

    stage: str
    block: int = 0
    blocks: int = 0
    done: int = 0
    total: int = 0
    matrix: str | None = None


OnEvent = Callable[[Event], None]


@dataclass
class _Clock:
    """Seconds by part. Parts that run in the background are counted there and overlap the others."""

    seconds: dict[str, float] = field(default_factory=dict)
    synchronise: bool = False

    def add(self, part: str, started: float) -> float:
        if self.synchronise:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        self.seconds[part] = self.seconds.get(part, 0.0) + elapsed
        return elapsed


def prune(
    model: str | os.PathLike[str] | nn.Module,
    *,
    method: Method,
    pattern: Pattern | Plan | None = None,
    calibration: str | Sequence[str] | Tensor | Windows = "c4",
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    sampling: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    propagate: str = "pruned",
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload_states: str = "auto",
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    tokenizer: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    command: Sequence[str] | None = None,
    on_event: OnEvent = lambda event: None,
) -> Manifest:
    """The manifest of a pruned model, which is written to `output`, or, for a module in memory, pruned in place.

    `model` is a folder, a hub id, a GGUF file or an `nn.Module`. `pattern` is one pattern for every matrix that
    `only` and `skip` leave (default: half the weights), or a whole `Plan`. `samples` (128) windows of `length` (2048)
    tokens are drawn from `calibration`: corpora, or token ids of shape (samples, length); `sampling` is "document",
    "concat", or None for what the papers do with that corpus. `propagate` says whether
    each block sees the outputs of the pruned blocks before it ("pruned", as published) or of the dense ones.
    The source is never written to, and `output` appears under its name only when it is complete.

    Raises `PatternError`, `CalibrationError`, `ModelStructureError`, `NumericalError` or `CheckpointError`, each of
    which says what to do.
    """
    started = time.perf_counter()
    only, skip = ([globs] if isinstance(globs, str) else globs for globs in (only, skip))
    if propagate not in ("pruned", "dense"):
        raise PatternError(f'propagate must be "pruned" or "dense", got "{propagate}".')
    if batch_size is not None and batch_size < 1:
        raise CalibrationError(f"--batch-size: got {batch_size}, expected at least 1.")
    target = check_output(output, model, overwrite)
    opened = open_model(model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    skeleton = opened.skeleton
    plan = make_plan(opened, method, pattern, only=only, skip=skip)
    windows = None
    if method.needs:
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
    manifest = Manifest(
        versions={"secateur": secateur.__version__, "torch": torch.__version__, "python": platform.python_version()}
        | _library_versions(),
        method=method.name,
        source=opened.origin,
        settings={
            "propagate": propagate,
            "device": str(skeleton.device),
            "dtype": str(skeleton.dtype).removeprefix("torch."),
            "batch_size": batch_size or default_batch_size(windows.length if windows else 1, skeleton.device),
            "statistics": sorted(kind.__name__ for kind in method.needs),
            "within": "block",
        },
        plan=plan.to_json(),
        left_out=skeleton.left_out_by_reason(),
        command=list(command) if command is not None else None,
        calibration=dict(windows.provenance) | {"digest": windows.digest} if windows is not None else None,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    with ExitStack() as stack:
        stack.callback(opened.restore)
        writer = None
        if target is not None:
            scratch = stack.enter_context(Scratch(target, overwrite))
            writer = CheckpointWriter(scratch.folder, skeleton.source.layout())
            stack.callback(writer.abandon)
            with writing(scratch.folder):
                opened.write_companions(scratch.folder)
        name = (target or Path.cwd() / "secateur").name
        states = (target or Path.cwd() / name).with_name(f"{name}.states-{os.getpid()}")
        clock = _Clock(synchronise=skeleton.device.type == "cuda")
        _Run(
            skeleton, method, plan, windows, writer, manifest, propagate, offload_states, states, clock, on_event
        ).run()
        manifest.seconds = clock.seconds | {"total": time.perf_counter() - started}
        _totals(manifest)
        if writer is not None:
            writer.close()
            manifest.tensors, manifest.headers = writer.digests, writer.header_digests
            manifest.files = file_digests(scratch.folder)
            manifest.write(scratch.folder)
            with writing(scratch.target):
                scratch.commit()
    on_event(Event("done"))
    return manifest


def make_plan(
    opened: OpenedModel,
    method: Method,
    pattern: Pattern | Plan | None,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Plan:
    """The plan for a model: a given `Plan`, checked, or one pattern for every matrix that the globs leave."""
    shapes = {matrix.name: matrix.shape for matrix in opened.skeleton.matrices}
    if isinstance(pattern, Plan):
        if only or skip:
            raise PatternError("a whole plan already says which matrices to prune; leave out only and skip.")
        if not pattern:
            raise PatternError("the plan is empty: it names no matrix, so nothing is left to prune.")
        pattern.check(shapes)
        return Plan({name: with_group(own, method.per) for name, own in pattern.items()})
    return uniform(shapes, pattern or Unstructured(0.5), only=only, skip=skip, per=method.per)


@dataclass
class _First:
    """What went into a block for the first batch, and what came out of it while it was dense."""

    input: Tensor
    output: Tensor | None = None


@dataclass
class _Run:
    """One pass over the blocks."""

    skeleton: Skeleton
    method: Method
    plan: Plan
    windows: Windows | None
    writer: CheckpointWriter | None
    manifest: Manifest
    propagate: str
    offload: str
    scratch: Path
    clock: _Clock
    on_event: OnEvent

    @torch.no_grad()
    def run(self) -> None:
        skeleton, blocks = self.skeleton, self.skeleton.blocks
        planned: list[list[Matrix]] = [[] for _ in blocks]
        for matrix in skeleton.matrices:
            if matrix.name in self.plan:
                planned[matrix.block].append(matrix)
        last = max(index for index, matrices in enumerate(planned) if matrices)
        stream = self._stream(last) if self.windows is not None else None
        with (
            ThreadPoolExecutor(1, "read") as reader,
            ThreadPoolExecutor(1, "write") as background,
            ExitStack() as stack,
        ):
            if stream is not None:
                stack.callback(stream.close)
            written: Future[None] = background.submit(self._write_outside)
            coming = reader.submit(self._read, blocks[0], planned[0])
            for block in blocks:
                started = time.perf_counter()
                self._tell("read", block)
                tensors = coming.result()
                self.clock.add("wait for read", started)
                if block.index + 1 < len(blocks):
                    coming = reader.submit(self._read, blocks[block.index + 1], planned[block.index + 1])
                matrices = planned[block.index]
                own = {name: tensors[name] for name in skeleton.block_tensors[block.index]}
                changed = self._prune_block(block, tensors, matrices, stream, last) if block.index <= last else {}
                started = time.perf_counter()
                written.result()  # Memory: at most one finished block waits to be written
                self.clock.add("wait for write", started)
                written = background.submit(self._write, own | changed)
                del tensors, own, changed
                trim()
                self._tell("write", block)
            written.result()
        if self.writer is not None and self.writer.missing:
            raise CheckpointError(
                f"{len(self.writer.missing)} tensors were never written, first {self.writer.missing[0]}."
            )

    def _stream(self, last: int) -> Stream:
        assert self.windows is not None
        started = time.perf_counter()
        self.skeleton.load_outside()
        ids = self.windows.input_ids
        needed = ids.numel() * self.skeleton.hidden_size * self.skeleton.dtype.itemsize
        folder = states_folder(self.offload, needed, self.scratch)
        stream = Stream(
            self.skeleton,
            ids,
            batch_size=self.manifest.settings["batch_size"],
            states_folder=folder,
            progress=lambda done, total: self.on_event(Event("record", 0, last + 1, done, total)),
        )
        self.clock.add("record calls", started)
        return stream

    def _read(self, block: Block, matrices: Sequence[Matrix]) -> dict[str, Tensor]:
        """In the background: a block's checkpoint tensors, their planned matrices checked and digested."""
        started = time.perf_counter()
        tensors = self.skeleton.read(block)
        for matrix in matrices:
            check_weight(matrix.name, matrix.view(tensors))
        if self.writer is not None:
            for name in dict.fromkeys(matrix.tensor for matrix in matrices):
                self.manifest.source_tensors[name] = tensor_digest(tensors[name])
        self.clock.seconds["read"] = self.clock.seconds.get("read", 0.0) + time.perf_counter() - started
        return tensors

    def _prune_block(
        self,
        block: Block,
        tensors: dict[str, Tensor],
        matrices: list[Matrix],
        stream: Stream | None,
        last: int,
    ) -> dict[str, Tensor]:
        """The checkpoint tensors of the block that changed; the stream has moved on behind the pruned block."""
        record: dict[str, Any] = {"index": block.index, "path": block.path, "matrices": len(matrices)}
        if stream is None:
            changed = self._solve(block, matrices, tensors, None)
            if self.skeleton.resident:
                self._update(changed, tensors)
        else:
            with loaded(self.skeleton, block, tensors):
                tap, first = self._take_statistics(block, matrices, stream)
                changed = self._solve(block, matrices, tensors, tap)
                self._update(changed, tensors)
                record["output_change"] = self._move_on(block, matrices, stream, first, last)
        self.manifest.blocks.append(record)
        return changed

    def _update(self, changed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Put the changed tensors of a block into its module."""
        names = [name for group in self.skeleton.conversion.of(changed) for name in group.names]
        self.skeleton.update({name: changed.get(name, tensors[name]) for name in names})

    def _take_statistics(self, block: Block, matrices: list[Matrix], stream: Stream) -> tuple[InputTap, "_First"]:
        """The tap with the statistics of a block, and what went into and came out of it for the first batch."""
        started = time.perf_counter()
        experts = {matrix.parameter for matrix in matrices}
        layout, _ = prunable_parameters(block.module, None)
        parameters = dict(block.module.named_parameters())
        prefix = len(block.path) + 1
        tap = InputTap(
            {name: (parameters[name[prefix:]], layout[name[prefix:]]) for name in sorted(experts)}, self.method.needs
        )
        single = self._single_pass(matrices)
        first = _First(stream.states.get(0, stream.device))
        for batch, ids in enumerate(stream.batches):
            tap.begin(len(ids), whole=batch == 0 or single)
            with suppress(Enough), tap:
                output = stream.run(block, batch)
                if batch == 0:
                    first.output = output
                if single:
                    stream.states.put(batch, output)
            tap.end()
            self._tell("statistics", block, batch + 1, len(stream.batches))
        tap.check(matrices, sum(len(ids) for ids in stream.batches))
        self.clock.add("statistics forward", started)
        return tap, first

    def _single_pass(self, matrices: list[Matrix]) -> bool:
        """Whether the outputs of the dense block are the next block's inputs, so that no second pass is needed."""
        return self.propagate == "dense" or not matrices

    def _solve(
        self, block: Block, matrices: list[Matrix], tensors: Mapping[str, Tensor], tap: InputTap | None
    ) -> dict[str, Tensor]:
        changed: dict[str, Tensor] = {}
        for number, matrix in enumerate(matrices):
            started = time.perf_counter()
            self._tell("solve", block, number, len(matrices), matrix.name)
            statistics = tap.statistics(matrix) if tap is not None else {}
            weight = matrix.view(tensors).to(self.skeleton.device)
            problem = Problem(matrix.name, weight, self.plan[matrix.name], statistics)
            solution = self.method.solve(problem)
            check_solution(problem, solution, self.method)
            if matrix.tensor not in changed:
                original = tensors[matrix.tensor]
                pin = self.skeleton.device.type == "cuda"
                changed[matrix.tensor] = torch.empty(original.shape, dtype=original.dtype, pin_memory=pin)
                if matrix.index is not None:
                    changed[matrix.tensor].copy_(original)
            # Exact: `weight * mask` leaves -0.0 where a negative weight was; what is removed is +0.0.
            matrix.view(changed).copy_(solution.weight.masked_fill(~solution.mask, 0))
            tokens = max((statistic.tokens for statistic in statistics.values()), default=None)
            self.manifest.matrices[matrix.name] = _record(matrix, problem, solution) | {
                "tokens": tokens,
                "seconds": round(self.clock.add("solve", started), 6),
            }
        return changed

    def _move_on(
        self, block: Block, matrices: list[Matrix], stream: Stream, first: "_First", last: int
    ) -> float | None:
        """Make the next block's inputs; returns how far the first batch's output moved, relative to its norm."""
        started = time.perf_counter()
        single = self._single_pass(matrices)
        change: float | None = None
        if matrices and first.output is not None:
            pruned = stream.run(block, 0, states=first.input, aside=single)
            change = relative_change(first.output, pruned)
            if not single and block.index < last:
                stream.states.put(0, pruned)
                self._tell("forward", block, 1, len(stream.batches))
        if not single and block.index < last:
            for batch in range(1, len(stream.batches)):
                stream.states.put(batch, stream.run(block, batch))
                self._tell("forward", block, batch + 1, len(stream.batches))
        stream.release(block)
        self.clock.add("propagation forward", started)
        return change

    def _write_outside(self) -> None:
        if self.writer is None:
            return
        inside = {name for names in self.skeleton.block_tensors for name in names}
        for name in self.skeleton.source.names:
            if name not in inside:
                self._write({name: self.skeleton.source.read([name])[name]}, flush=False)

    def _write(self, tensors: Mapping[str, Tensor], flush: bool = True) -> None:
        if self.writer is None:
            return
        started = time.perf_counter()
        for name, tensor in tensors.items():
            self.writer.write(name, tensor)
        if flush:
            self.writer.flush()
        self.clock.seconds["write"] = self.clock.seconds.get("write", 0.0) + time.perf_counter() - started

    def _tell(self, stage: str, block: Block, done: int = 0, total: int = 0, matrix: str | None = None) -> None:
        self.on_event(Event(stage, block.index, len(self.skeleton.blocks), done, total, matrix))


def _record(matrix: Matrix, problem: Problem, solution: Solution) -> dict[str, Any]:
    """The manifest's record of a solved matrix."""
    zeros = solution.weight.numel() - int(solution.weight.count_nonzero())
    return {
        "block": matrix.block,
        "kind": matrix.kind,
        "shape": list(matrix.shape),
        "tensor": matrix.tensor,
        "index": matrix.index,
        "transposed": matrix.transposed,
        "pattern": problem.pattern.to_json(),
        "sparsity": zeros / solution.weight.numel(),
        "zeros": zeros,
        "kept_identical": bool((solution.weight.eq(problem.weight) | ~solution.mask).all()),
        "notes": dict(solution.notes),
    }


def relative_change(dense: Tensor, pruned: Tensor) -> float:
    """``||pruned - dense|| / ||dense||`` in float32: 0 when nothing changed."""
    dense, pruned = dense.float(), pruned.float()
    return float((pruned - dense).norm() / dense.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _totals(manifest: Manifest) -> None:
    weights = sum(entry["shape"][0] * entry["shape"][1] for entry in manifest.matrices.values())
    zeros = sum(entry["zeros"] for entry in manifest.matrices.values())
    manifest.totals = {
        "matrices": len(manifest.matrices),
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / max(weights, 1),
        "asked": sum(
            _asked(manifest.plan[name]) * entry["shape"][0] * entry["shape"][1]
            for name, entry in manifest.matrices.items()
        )
        / max(weights, 1),
    }


def _asked(pattern: Mapping[str, Any]) -> float:
    return NM(**pattern).sparsity if "n" in pattern else float(pattern["sparsity"])


def _library_versions() -> dict[str, str]:
    import accelerate
    import transformers

    return {"transformers": transformers.__version__, "accelerate": accelerate.__version__}
