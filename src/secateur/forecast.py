"""What a run would prune and cost, before it starts: memory, disk and time, from headers and a short measurement."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from secateur.core.gradients import GradientKind, Scope
from secateur.core.gram import Gram
from secateur.core.patterns import Pattern
from secateur.core.problem import Method
from secateur.gradient_pass import chunk_sizes, gradient_batch_size
from secateur.models.matrices import numbered_experts
from secateur.models.opened import OpenedModel, choose_device, open_model
from secateur.models.skeleton import Skeleton
from secateur.models.stream import default_batch_size
from secateur.plan import Plan
from secateur.preparation import check_choices, check_dense_targets, chosen_correction, gradient_file, make_plan

DISK_BYTES_PER_SECOND = 500e6  # a plain SSD; no disk is measured, since that would take writing to it
LIBRARY_BYTES = 40_000_000  # kernels and buffers that torch loads when it first computes
MAPPED_BYTES = 32 << 20  # glibc maps allocations from this size on, and gives them back whole


@dataclass(frozen=True)
class KindRow:
    """All matrices of one kind: `model.layers.*.mlp.up_proj.weight`."""

    kind: str
    pattern: str | None  # None where nothing of the kind is planned
    matrices: int
    planned: int
    shape: tuple[int, int]
    weights: int


@dataclass(frozen=True)
class LeftOutRow:
    """Tensors that are not pruned, for one reason."""

    reason: str
    tensors: int
    weights: int
    example: str


@dataclass(frozen=True)
class Estimate:
    """The dry run. Bytes are totals at the peak; seconds are a rough forecast from a measured matrix product."""

    model: str
    architecture: str
    blocks: int
    method: str
    kinds: list[KindRow]
    left_out: list[LeftOutRow]
    plan: Plan
    planned_weights: int
    zeros: int
    all_weights: int
    tokens: int
    device: str
    dtype: str
    block_bytes: int
    states_bytes: int
    host_bytes: int
    device_bytes: int
    disk_bytes: int
    seconds: float
    available_host_bytes: int
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """All fields; the plan as one object per matrix."""
        return {**asdict(self), "plan": self.plan.to_json()}


def estimate(
    model: str | os.PathLike[str] | nn.Module | OpenedModel,
    *,
    method: Method,
    pattern: Pattern | Plan | None = None,
    samples: int | None = None,
    length: int | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    gradient: str | os.PathLike[str] | None = None,
    propagate: str = "pruned",
    within: str = "block",
    targets: str = "pruned",
    correction: float | None = None,
    statistics_device: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload_states: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Estimate:
    """What `prune` with the same options would do, without reading a weight (a GGUF file has to be read).

    Raises the same errors as `prune` for a model, pattern or glob that cannot work.
    """
    opened = open_model(model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    skeleton = opened.skeleton
    chosen_correction(targets, correction)
    check_choices(method, propagate, within, targets)
    plan = make_plan(opened, method, pattern, only=only, skip=skip)
    if targets == "dense":
        check_dense_targets([matrix for matrix in skeleton.matrices if matrix.name in plan])
    kept_on = None if statistics_device is None else choose_device(statistics_device, "--statistics-device")
    file = gradient_file(gradient, method, skeleton, plan)
    kind = method.gradient if file is None else None  # the gradients that are still to be taken
    samples, length = samples or 128, length or 2048
    tokens = samples * length if method.needs or kind is not None else 0
    if kind is None:
        batch_size = batch_size or default_batch_size(length, skeleton.device)
    else:
        batch_size = gradient_batch_size(skeleton, length, kind.granularity, batch_size)
    sizes = _Sizes(skeleton, tokens, min(batch_size * length, tokens))
    if kind is not None:
        first = min(matrix.block for matrix in skeleton.matrices if matrix.name in plan)
        scratch = Path.cwd() / "secateur"
        chunk = chunk_sizes(skeleton, samples, length, batch_size, kind.scope, offload_states, first, scratch)
        sizes.take_gradients(plan, kind.scope, 0 if chunk.folder is not None else chunk.bytes)
    if Gram in method.needs:
        sizes.take_grams(plan, targets, kept_on)
    on_gpu = skeleton.device.type != "cpu"
    host, on_device = sizes.host(on_gpu), sizes.device() if on_gpu else 0
    notes = []
    if method.needs and skeleton.positions is not None and length > skeleton.positions:
        notes.append(
            f"Windows of {length} tokens do not fit in the model's {skeleton.positions} positions, and prune "
            f"will refuse them. Use --length {skeleton.positions} or less."
        )
    if kind is not None and kind.scope == "model":
        passes = math.ceil(samples / chunk.samples)
        notes.append(
            f"Gradients first: the inputs of all blocks take {bytes_text(chunk.bytes)} "
            f"{'in memory' if chunk.folder is None else f'in {chunk.folder.parent}'}"
            + (f", for {chunk.samples} samples at a time in {passes} passes over the weights" if passes > 1 else "")
            + f", and their norms {bytes_text(sizes.gradients)} in a temporary file beside the output."
        )
    if Gram in method.needs:
        notes.append(
            f"The Gram matrices of a block take at most {bytes_text(sizes.grams + sizes.grams_elsewhere)}"
            f"{f' on {kept_on}' if sizes.grams_elsewhere else ''}, and solving the largest matrix "
            f"{bytes_text(sizes.solving)}."
        )
    if skeleton.resident:
        notes.append("The whole model is in memory: it was given as a module, or dequantised from GGUF.")
    if sizes.states > psutil.virtual_memory().available // 2:
        notes.append("The hidden states would not fit in half of the free memory; they go to a memory-mapped file.")
    if host > psutil.virtual_memory().available:
        notes.append("This needs more host memory than is free now: use fewer or shorter samples, or --batch-size 1.")
    left_out = [LeftOutRow(**row) for row in skeleton.left_out_by_reason()]
    all_weights = sum(_count(skeleton.source.shape(name)) for name in skeleton.source.names)
    for row in left_out:
        if row.reason.startswith("not a linear matrix") and row.weights > all_weights / 100:
            notes.append(
                f"{row.weights / all_weights:.0%} of all weights stay dense because Secateur does not know how they "
                f"are multiplied: {row.reason}, such as {row.example}."
            )
    sizes_by_name = {matrix.name: matrix.shape[0] * matrix.shape[1] for matrix in skeleton.matrices}
    return Estimate(
        model=str(opened.origin.get("path")),
        architecture=str(opened.origin["architecture"]),
        blocks=len(skeleton.blocks),
        method=method.name,
        kinds=_kinds(skeleton, plan),
        left_out=left_out,
        plan=plan,
        planned_weights=sum(sizes_by_name[name] for name in plan),
        zeros=round(sum(sizes_by_name[name] * pattern.sparsity for name, pattern in plan.items())),
        all_weights=all_weights,
        tokens=tokens,
        device=str(skeleton.device),
        dtype=str(skeleton.dtype).removeprefix("torch."),
        block_bytes=sizes.block_stored,
        states_bytes=sizes.states,
        host_bytes=host,
        device_bytes=on_device,
        disk_bytes=sizes.total + sizes.gradients,
        seconds=_seconds(skeleton, plan, tokens, sizes, method, kind, _further_forwards(within, targets)),
        available_host_bytes=psutil.virtual_memory().available,
        notes=notes,
    )


class _Sizes:
    """Bytes of the parts of a run."""

    def __init__(self, skeleton: Skeleton, tokens: int, batch_tokens: int) -> None:
        source = skeleton.source
        self.skeleton = skeleton
        self.batch_tokens = batch_tokens
        hidden = skeleton.hidden_size
        item = skeleton.dtype.itemsize
        stored = [_bytes(skeleton, names) for names in skeleton.block_tensors]
        computed = [sum(_count(source.shape(name)) for name in names) * item for names in skeleton.block_tensors]
        self.block_stored = max(stored)
        self.block_computed = max(computed)
        self.outside = sum(_count(source.shape(name)) for name in skeleton.outside_tensors) * item
        self.total = _bytes(skeleton, source.names)
        self.states = tokens * hidden * item
        widths = max((matrix.shape[0] + matrix.shape[1] for matrix in skeleton.matrices), default=0)
        self.activations = batch_tokens * (4 * hidden + 3 * widths) * item
        self.gradients = 0  # of the file that they are kept in
        self.accumulators = 0
        self.grams = 0
        self.grams_elsewhere = 0
        self.solving = 0
        self.in_heap = batch_tokens * max(hidden, widths - hidden) * item < MAPPED_BYTES

    def take_gradients(self, plan: Plan, scope: Scope, states: int) -> None:
        """Count what gradients add: sums in float32, the graph of a batch, and the inputs of all blocks."""
        planned = [matrix for matrix in self.skeleton.matrices if matrix.name in plan]
        by_block: dict[int, int] = {}
        graph: dict[int, int] = {}
        for matrix in planned:
            by_block[matrix.block] = by_block.get(matrix.block, 0) + math.prod(matrix.shape)
            graph[matrix.block] = graph.get(matrix.block, 0) + sum(matrix.shape)
        self.accumulators = 4 * max(by_block.values())
        if scope == "model":
            self.gradients = 4 * sum(by_block.values())
        self.activations += 2 * self.batch_tokens * max(graph.values()) * self.skeleton.dtype.itemsize
        self.states = max(self.states, states)

    def take_grams(self, plan: Plan, targets: str, kept_on: torch.device | None) -> None:
        """Count Gram matrices, one for each matrix as if none shared its input, and the copies that solvers make."""
        by_block: dict[int, int] = {}
        drifts: dict[int, int] = {}  # of what may write to the residual stream
        item = max(4, self.skeleton.dtype.itemsize)
        for matrix in self.skeleton.matrices:
            if matrix.name in plan:
                by_block[matrix.block] = by_block.get(matrix.block, 0) + item * matrix.shape[1] ** 2
                # Memory: what ALPS, the hungriest, was measured to hold: its matrices and what masks are chosen with.
                solving = item * (4 * matrix.shape[1] ** 2 + 12 * math.prod(matrix.shape))
                self.solving = max(self.solving, solving)
                if matrix.shape[0] == self.skeleton.hidden_size and matrix.expert is None:
                    drifts[matrix.block] = drifts.get(matrix.block, 0) + item * math.prod(matrix.shape)
        grams = max(by_block.values()) * (2 if targets == "dense" else 1)
        if targets == "residual":
            grams += max(drifts.values(), default=0)
        elsewhere = kept_on is not None and kept_on.type != self.skeleton.device.type
        self.grams, self.grams_elsewhere = (0, grams) if elsewhere else (grams, 0)
        if targets != "pruned":
            self.states *= 3
            self.solving += self.block_computed

    def host(self, on_gpu: bool) -> int:
        """Interpreter and libraries as they are now, blocks read, changed and being written, and the states."""
        now = psutil.Process().memory_info().rss + LIBRARY_BYTES
        weights = self.total if self.skeleton.resident else 3 * self.block_stored
        computing = self.grams_elsewhere
        computing += 0 if on_gpu else self.activations + self.accumulators + self.grams + self.solving
        if self.in_heap and not on_gpu:
            # Memory: what is freed between tensors that live leaves holes; measured, on models of 5 to 40 MB a block.
            computing += 3 * self.activations // 2 + self.states // 2
        if not self.skeleton.resident and not on_gpu:
            copied = self.block_computed if self.block_computed != self.block_stored else 0
            computing += self.outside + copied
        return now + weights + self.block_stored + self.states + computing

    def device(self) -> int:
        """What lies on the GPU: the parts outside the blocks, one block, its solution, one batch."""
        working = self.activations + self.accumulators + self.grams + self.solving
        return self.outside + 2 * self.block_computed + working


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _bytes(skeleton: Skeleton, names: Sequence[str]) -> int:
    source = skeleton.source
    return sum(_count(source.shape(name)) * source.dtype(name).itemsize for name in names)


def _kinds(skeleton: Skeleton, plan: Plan) -> list[KindRow]:
    rows: dict[str, KindRow] = {}
    for matrix in skeleton.matrices:
        known = rows.get(matrix.kind)
        pattern = str(plan[matrix.name]) if matrix.name in plan else None
        rows[matrix.kind] = KindRow(
            matrix.kind,
            (known.pattern if known and known.pattern else pattern),
            (known.matrices if known else 0) + 1,
            (known.planned if known else 0) + (pattern is not None),
            matrix.shape,
            (known.weights if known else 0) + matrix.shape[0] * matrix.shape[1],
        )
    return list(rows.values())


def _seconds(
    skeleton: Skeleton,
    plan: Plan,
    tokens: int,
    sizes: _Sizes,
    method: Method,
    kind: GradientKind | None,
    further: int,
) -> float:
    """The forwards of the blocks up to the last planned one, Gram matrices, and solving; or reading and writing.

    Two forwards for statistics of inputs, four for gradients of the loss, two more than before for regional ones, and
    what `_further_forwards` says. Reading and writing overlap all of it.
    """
    last = max(matrix.block for matrix in skeleton.matrices if matrix.name in plan)
    forwards = 2 + further if method.needs or (kind is not None and kind.scope == "block") else 0
    if kind is not None:
        forwards += 4 if kind.scope == "model" else 2
    work = 2 * forwards * tokens * _weights_of_a_token(skeleton, last)
    computing = work / _multiplication_rate(skeleton, skeleton.dtype) if tokens else 0.0
    planned = [matrix for matrix in skeleton.matrices if matrix.name in plan]
    products = sum(method.products * math.prod(matrix.shape) * matrix.shape[1] for matrix in planned)
    if Gram in method.needs:
        # Matrices of one module and width mostly read the same input: q, k and v; gate and up.
        share = _share_of_experts(skeleton)
        inputs = {(_module(matrix.name), matrix.expert, matrix.shape[1]) for matrix in planned}
        products += sum(tokens * width**2 * (share if expert is not None else 1) for _, expert, width in inputs)
    if products:
        wide = torch.promote_types(skeleton.dtype, torch.float32)
        computing += 2 * products / _multiplication_rate(skeleton, wide)
    moving = (0 if skeleton.resident else sizes.total) / DISK_BYTES_PER_SECOND + sizes.total / DISK_BYTES_PER_SECOND
    return max(computing, moving) + 1


def _further_forwards(within: str, targets: str) -> int:
    """The forwards that sites add, which end early and make about one, and those of the dense model beside it."""
    beside = {"pruned": 0, "residual": 2, "dense": 4 if within == "site" else 1}
    return (within == "site") + beside[targets]


def forward_seconds(opened: OpenedModel, tokens: int) -> float:
    """About how long one forward of a whole opened model takes, its head included."""
    skeleton = opened.skeleton
    weights = _weights_of_a_token(skeleton, len(skeleton.blocks)) + skeleton.vocabulary_size * skeleton.hidden_size
    return 2 * tokens * weights / _multiplication_rate(skeleton, skeleton.dtype)


def _weights_of_a_token(skeleton: Skeleton, last: int) -> float:
    """How many weights of the blocks up to the last one a token is multiplied with."""
    share = _share_of_experts(skeleton)
    return sum(
        matrix.shape[0] * matrix.shape[1] * (share if matrix.expert is not None else 1)
        for matrix in skeleton.matrices
        if matrix.block <= last
    )


def _module(name: str) -> str:
    """The module around the module of a weight: model.layers.0.mlp of model.layers.0.mlp.up_proj.weight."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _share_of_experts(skeleton: Skeleton) -> float:
    """The share of a layer's experts that a token is routed to; 1 without experts."""
    experts = numbered_experts(skeleton.text_config) or 1
    return (getattr(skeleton.text_config, "num_experts_per_tok", None) or 1) / experts


def _multiplication_rate(skeleton: Skeleton, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product of the model's width, measured for a moment."""
    width = max((matrix.shape[1] for matrix in skeleton.matrices), default=1024)
    left = torch.randn(1024, width, device=skeleton.device).to(dtype)
    right = torch.randn(width, 1024, device=skeleton.device).to(dtype)
    _ = left @ right
    if skeleton.device.type == "cuda":
        torch.cuda.synchronize()
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        _ = left @ right
        products += 1
        if skeleton.device.type == "cuda":
            torch.cuda.synchronize()
    return products * 2 * 1024 * width * 1024 / (time.perf_counter() - started)


def bytes_text(count: float) -> str:
    """A size with a decimal unit: 1.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
