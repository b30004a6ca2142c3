"""What a run is made of before the work starts: everything checked, the same for `prune` and for its dry run."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.windows import Windows
from secateur.collect.collector import Extent
from secateur.collect.evidence import RunEvidence
from secateur.collect.exempt import Exempt
from secateur.collect.gradient_file import GradientFile
from secateur.collect.gradient_pass import check_has_loss
from secateur.collect.model_windows import Foreseen, Samples, foreseen_windows, model_samples
from secateur.collect.settings import ModelSettings
from secateur.core.batch import Batch
from secateur.core.gram import CrossGram, Gram
from secateur.core.needs import Drift
from secateur.core.patterns import NM, with_group
from secateur.core.permutation import check_assignment
from secateur.core.problem import Method
from secateur.errors import CalibrationError, CheckpointError, ModelStructureError, PatternError
from secateur.models.flow.inputs import reads_tokens
from secateur.models.flow.residual import residual_writers
from secateur.models.flow.stream import Stream
from secateur.models.opening.opened import OpenedModel, choose_device, open_model
from secateur.models.shape.causality import check_predicts
from secateur.models.shape.matrices import Matrix, by_block
from secateur.models.shape.skeleton import Skeleton, loaded
from secateur.plans.allocated import Allocated
from secateur.plans.plan import Plan
from secateur.plans.uniform import by_glob, uniform
from secateur.pruning.allocating import allocated as make_allocation
from secateur.pruning.allocating import check_divisible
from secateur.pruning.named import resolved
from secateur.pruning.settings import PropagationSettings, PruneSettings
from secateur.record.manifest import source_digest
from secateur.runs.events import PLACING, Clock, Progress, named
from secateur.runs.options import shared
from secateur.runs.output import check_output
from secateur.runs.packing import expected_bytes

CORRECTION = 0.5  # of the difference between the dense model's residual stream and this one's
TRIAL_TOKENS = 8  # that residual targets look for writers with


@dataclass(frozen=True)
class Prepared:
    """A run that nothing speaks against.

    `windows` are None where the method looks at no token, and where a dry run has not drawn them; `foreseen` says what
    it left open.
    """

    settings: PruneSettings
    opened: OpenedModel
    method: Method
    plan: Plan
    evidence: RunEvidence
    windows: Samples | None
    extent: Extent
    packed_bytes: int | None  # of all tensors of the output, where that will be packed
    allocated: Allocated | None  # how the plan came about, where it is not uniform
    foreseen: Foreseen


def output_of(settings: PruneSettings) -> Path | None:
    """Where the output will be, or None without one; raises `CheckpointError` when it is not safe to write."""
    model = settings.model
    source = str(model.origin.get("path")) if isinstance(model, OpenedModel) else model
    if settings.packed and settings.output is None and isinstance(source, nn.Module):
        raise CheckpointError("packed: needs an output folder. secateur.pack_module packs a module in memory.")
    return check_output(settings.output, source, settings.overwrite)


@contextmanager
def prepared(
    settings: PruneSettings,
    *,
    dry: bool = False,
    allocated: Allocated | None = None,
    clock: Clock | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Iterator[Prepared]:
    """The run that settings ask for; a module in memory is put back at the end as it was.

    A `dry` run reads no weights but the few that a check asks for, and draws its windows only where that is quick;
    without `calibration` it takes their size from `samples` and `length`, and no allocation is made. A plan that was
    `allocated` before is not made again. Raises everything that `prune` raises before its work starts.
    """
    settings = resolved(settings)
    allocated = settings.plan if isinstance(settings.plan, Allocated) else allocated
    method = settings.method
    assert isinstance(method, Method)
    correction = chosen_correction(settings)
    check_choices(method, settings)
    check_divisible(settings, settings.pattern)
    survey = settings.statistics
    if survey is not None and settings.propagate != "dense":
        raise PatternError('statistics can be shared with propagate="dense" only: pruned blocks change the inputs.')
    if settings.resume and not (settings.resumable and survey is None):
        raise PatternError("--resume: a run that shares statistics, or was not to be resumable, has left nothing.")
    kept_on = settings.statistics_device
    statistics_device = None if kept_on is None else choose_device(kept_on, "--statistics-device")
    clock = clock or Clock()
    with clock.timed("open the model"):
        opened = open_model(**shared(settings, ModelSettings))
    try:
        skeleton = opened.skeleton
        plan = make_plan(skeleton, method, settings)
        planned = [matrix for matrix in skeleton.matrices if matrix.name in plan]
        check_permutation(settings, plan)
        needs = method.needs
        if settings.targets == "dense":
            check_dense_targets(planned)
            needs |= {CrossGram}
        if correction is not None:
            if reads_tokens(skeleton.model):
                check_residual_targets(skeleton, planned, skeleton.trial_batch(1, TRIAL_TOKENS))
            needs |= {Drift(correction)}
        check_losses_needed(skeleton, method, settings)
        given = gradient_file(settings.gradient, method, skeleton, planned)
        exempt = Exempt(settings.on_nonfinite, settings.unseen)
        evidence = RunEvidence(needs, given, survey, statistics_device, exempt)
        if survey is not None and given is None and method.gradient is not None and method.gradient.scope == "block":
            raise PatternError(f"{method.name}: runs that share statistics need its gradients as a file.")
        seen = Foreseen(None, 0, 0, ())
        to_allocate = settings.allocation != "uniform" and allocated is None
        if (evidence.looks_at_samples or to_allocate) and dry:
            seen = foreseen_windows(opened, settings)
        elif evidence.looks_at_samples or to_allocate:
            progress("calibrate", 0, 0)
            with clock.timed("draw calibration samples"):
                windows = model_samples(
                    opened, settings, progress=partial(progress, "calibrate"), placing=partial(progress, PLACING)
                )
            seen = Foreseen(windows, windows.samples, windows.length, ())
        if correction is not None and not reads_tokens(skeleton.model):  # of what else it reads, a sample is needed
            assert seen.windows is not None
            check_residual_targets(skeleton, planned, seen.windows.batches(1)[0])
        if to_allocate and not dry:
            assert isinstance(seen.windows, Windows)  # whatever has a loss reads tokens
            with clock.timed("allocation"):
                stages = named(progress, "allocation")
                allocated = make_allocation(opened, seen.windows, settings, plan, progress=stages)
        if allocated is not None:
            plan = allocated.plan
        run = seen if evidence.looks_at_samples else Foreseen(None, 0, 0, ())
        if given is not None and run.windows is not None:
            given.check_tokens(run.windows.digest, run.samples, run.length)
        yield Prepared(
            settings=settings,
            opened=opened,
            method=method,
            plan=plan,
            evidence=evidence,
            windows=run.windows,
            extent=Extent(
                skeleton,
                planned,
                run.samples,
                run.length,
                batch_size=evidence.batch_size(skeleton, run.length, settings.batch_size),
                by_site=settings.within == "site",
                offload=settings.offload_states,
            ),
            packed_bytes=packed_bytes(skeleton, planned, plan) if settings.packed else None,
            allocated=allocated,
            foreseen=seen,
        )
    finally:
        opened.restore()


def check_permutation(settings: PruneSettings, plan: Plan) -> None:
    """Raise `PatternError` where channels are to change places for no pattern that gains, or cannot be assigned."""
    if not settings.permute:
        return
    if not any(isinstance(pattern, NM) for pattern in plan.values()):
        raise PatternError(
            f"--permute: is for N:M patterns, and the plan has {next(iter(plan.values()))}. Give one, such as "
            "--pattern 2:4, or leave --permute out."
        )
    check_assignment()


def check_losses_needed(skeleton: Skeleton, method: Method, settings: PruneSettings) -> None:
    """Raise `ModelStructureError` where a run asks for losses that the model does not have."""
    if method.gradient is not None and method.gradient.scope == "model" and settings.gradient is None:
        check_has_loss(skeleton, settings.calibration, f"the loss whose gradients {method.name} takes")
    if settings.allocation != "uniform":
        judged = f"the loss by which --allocation {settings.allocation} is judged"
        check_predicts(skeleton.model, skeleton.blocks, judged)


def check_residual_targets(skeleton: Skeleton, planned: Sequence[Matrix], batch: Batch) -> None:
    """Raise where no planned matrix writes to the residual stream, as far as a block of each make-up shows.

    A few tokens show it, or any one sample: derivatives do not depend on them.
    """
    kinds = {index: frozenset(matrix.kind for matrix in own) for index, own in by_block(planned).items()}
    alike = {found: skeleton.blocks[index] for index, found in reversed(kinds.items())}
    tried = {block.index for block in alike.values()}
    # What a block makes of an image can have another shape, which the next one needs.
    images = isinstance(batch, Tensor) and batch.ndim == 4
    skeleton.load_outside(head=False)
    stream = Stream(skeleton, [batch])
    some = False
    try:
        for block in skeleton.blocks[: max(tried) + 1]:
            if not images and block.index not in tried:
                continue
            stream.reach(block)
            with loaded(skeleton, block, skeleton.read(block)):
                writers = {}
                if block.index in tried:
                    writers = residual_writers(block, by_block(skeleton.matrices)[block.index], stream)
                if images:
                    with torch.no_grad():
                        stream.states.put(0, stream.run(block, 0))
            some = some or bool(writers)
            if any(matrix.name in writers for matrix in planned):
                return
    finally:
        stream.close()
        skeleton.unload_outside()
    if some:
        raise PatternError(
            "--targets residual: none of the planned matrices writes to the residual stream. Plan those that do (such "
            "as o_proj and down_proj), or use --targets pruned."
        )
    raise ModelStructureError(
        f"--targets residual: no matrix of {next(iter(alike.values())).path} adds its outputs to the residual stream "
        "as it is (in some architectures a norm, or a factor for each channel, comes between). Use --targets pruned "
        "for this model."
    )


def packed_bytes(skeleton: Skeleton, planned: Sequence[Matrix], plan: Plan) -> int:
    """The bytes of all tensors of a packed output. Raises `PatternError` where no matrix would become smaller."""
    zeros: dict[str, int] = {}
    for matrix in planned:
        own = int(math.prod(matrix.shape) * plan[matrix.name].sparsity)
        zeros[matrix.tensor] = zeros.get(matrix.tensor, 0) + own
    packed, total = expected_bytes(skeleton.source, zeros)
    if not packed:
        raise PatternError(
            "--packed: no matrix would become smaller: a mask costs a bit for each weight, more than zeros save. "
            "Remove more weights, or leave --packed out."
        )
    return total


def chosen_correction(settings: PropagationSettings) -> float | None:
    """The share of its distance from the dense residual stream that targets make up for; None where they do not.

    Raises `PatternError` for one that is no share, or that would not be used.
    """
    targets, correction = settings.targets, settings.correction
    if targets != "residual" and correction is None:
        return None
    if targets != "residual":
        raise PatternError(f"--correction is for --targets residual, and targets are {targets}.")
    if correction is not None and not 0 < correction <= 1:
        raise PatternError(f"--correction: got {correction:g}, expected a share above 0 and up to 1.")
    return CORRECTION if correction is None else correction


def check_choices(method: Method, settings: PropagationSettings) -> None:
    """Raise `PatternError` for choices that contradict each other."""
    within, targets = settings.within, settings.targets
    if settings.propagate == "dense" and (within == "site" or targets != "pruned"):
        option = "--within site" if within == "site" else f"--targets {targets}"
        raise PatternError(f"{option} is about what pruning did before; with --propagate dense nothing sees that.")
    if within == "site" and not method.inputs:
        raise PatternError(f"--within site: {method.name} takes no statistics of inputs, in any order.")
    if within == "site" and method.gradient is not None and method.gradient.scope == "block":
        raise PatternError(f"--within site: {method.name} takes gradients of whole blocks; use --within block.")
    if targets != "dense" and CrossGram in method.needs:
        raise PatternError(f"--targets {targets}: {method.name} needs the dense model's inputs; use --targets dense.")
    if targets != "pruned" and not method.needs & {Gram, CrossGram}:
        raise PatternError(
            f"--targets {targets}: {method.name} changes no weights, so nothing can be fitted. Use a method that does, "
            f"or refine it: --method {method.name}+least_squares."
        )
    if targets == "residual" and within != "site":
        raise PatternError(
            "--targets residual makes up for what pruning did before, also within the block: add --within site."
        )


def check_dense_targets(matrices: Sequence[Matrix]) -> None:
    """Raise `PatternError` where an expert is to be fitted to the dense model, which may send it other tokens."""
    routed = next((matrix.name for matrix in matrices if matrix.routed), None)
    if routed is not None:
        raise PatternError(
            f"--targets dense: {routed} is an expert, to which the dense model sends other tokens than the pruned one, "
            'so that their inputs cannot be paired. Use --targets pruned, or leave experts out: --skip "*expert*".'
        )


def gradient_file(
    gradient: str | os.PathLike[str] | None, method: Method, skeleton: Skeleton, planned: Sequence[Matrix]
) -> GradientFile | None:
    """The given file of gradients, checked against the method and the model: the names and shapes of the planned
    matrices, what lies outside the blocks, and one block.
    """
    if gradient is None:
        return None
    if method.gradient is None:
        raise CalibrationError(f"--gradient {gradient}: the method {method.name} uses no gradients. Leave it out.")
    file = GradientFile(gradient)
    file.check_kind(method.gradient)
    file.check_shapes({matrix.name: matrix.shape for matrix in planned})
    first = min(matrix.block for matrix in planned)
    for name in (*skeleton.outside_tensors, *skeleton.block_tensors[first]):
        file.check_tensor(name, source_digest(skeleton.source, name))
    return file


def make_plan(skeleton: Skeleton, method: Method, settings: PruneSettings) -> Plan:
    """The plan for a model: a given `Plan`, checked, or a pattern for every matrix that the globs leave."""
    shapes = {matrix.name: matrix.shape for matrix in skeleton.matrices}
    pattern: Any = settings.pattern
    if isinstance(pattern, Plan):
        if settings.only or settings.skip:
            raise PatternError("a whole plan already says which matrices to prune; leave out only and skip.")
        if not pattern:
            raise PatternError("the plan is empty: it names no matrix, so nothing is left to prune.")
        pattern.check(shapes)
        return Plan({name: with_group(own, method.per) for name, own in pattern.items()})
    make = by_glob if isinstance(pattern, Mapping) else uniform
    return make(shapes, pattern, only=settings.only, skip=settings.skip, per=method.per)


def solving_cost(method: Method, matrix: Matrix) -> float:
    """Of solving a matrix beside other ones, for dealing them out to processes."""
    rows, width = matrix.shape
    if method.needs & {Gram, CrossGram}:
        return float(3 * width**3 + (method.products or 2) * rows * width**2)
    return float(rows * width)
