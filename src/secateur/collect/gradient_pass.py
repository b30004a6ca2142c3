"""`gradients`: the norms of every weight's gradient over calibration samples, in the memory of one block, as a file."""

import datetime
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secateur
from secateur.calibration.images import Images
from secateur.calibration.named import NamedSamples, are_labelled
from secateur.calibration.windows import Windows, check_predictions
from secateur.collect.block_gradients import GradientPass
from secateur.collect.exempt import Exempt
from secateur.collect.gradient_file import GradientFile, GradientWriter, model_digest
from secateur.collect.gradient_parts import GradientParts, Sums
from secateur.collect.model_windows import model_samples
from secateur.collect.settings import File, GradientSettings, Model, ModelSettings
from secateur.core.batch import LABELS
from secateur.core.checks import check_weight, first_nonfinite
from secateur.core.choices import Granularity, Norm, Scope
from secateur.core.gradients import GradientKind
from secateur.errors import CalibrationError, CheckpointError, ModelStructureError, NumericalError
from secateur.files.checkpoint import tensor_digest
from secateur.models.flow.backward import GradientTap, next_tokens
from secateur.models.flow.inputs import PIXELS, input_name, takes_labels
from secateur.models.flow.memory import available_bytes, return_large
from secateur.models.flow.stream import default_batch_size
from secateur.models.opening.opened import OpenedModel, open_model
from secateur.models.shape.causality import check_predicts
from secateur.models.shape.matrices import Matrix, by_block, numbered_experts, tapped
from secateur.models.shape.skeleton import Skeleton
from secateur.models.shape.structure import Block, has_two_towers
from secateur.plans.plan import matching
from secateur.record.manifest import source_digest
from secateur.runs.events import PLACING, Progress
from secateur.runs.journal import TAKING, AnotherRunError, Journal, Part, common_facts
from secateur.runs.options import shared, taking
from secateur.runs.out_of_memory import BatchSize, with_smaller_batches
from secateur.runs.output import check_writable, resolved
from secateur.runs.processes import ALONE, Processes, shared_run
from secateur.runs.transaction import Transaction, flush_names

# Of the provenance, what the process that began has written.
_OF_THE_FIRST = ("model", "model_digest", "calibration", "created")


@taking(GradientSettings)
def gradients(settings: GradientSettings) -> GradientFile:
    """The file of gradient norms that is written to `output`, for methods that take one (`prune(gradient=...)`).

    `norms` are "l1" and "l2" (one pass makes both), `granularity` is "sample" or "token", `scope` "model" or "block";
    see `GradientKind`. The calibration options are those of `prune`: gradients and pruning have to see the same tokens.

    The sums of a block are on the disk before those of the next one are taken; what a run that was ended leaves, the
    same call with `resume` goes on with, to the same sums.

    With `on_nonfinite` or `unseen` other than "error", the file also holds gradients that are not finite, or zero
    throughout; what becomes of such matrices is decided again where they are pruned.

    Raises what `prune` raises.
    """
    norms = [settings.norms] if isinstance(settings.norms, str) else settings.norms
    if not norms:
        raise CalibrationError("norm: got none, expected l1, l2 or both.")
    kinds = [GradientKind(norm, settings.granularity, settings.scope) for norm in norms]  # type: ignore[arg-type]
    target = _check_file(settings.output, settings.model, settings.overwrite)
    return with_smaller_batches(settings.batch_size, partial(_gradients, settings, kinds, target))


def _gradients(
    settings: GradientSettings, kinds: Sequence[GradientKind], target: Path, size: BatchSize
) -> GradientFile:
    return_large()
    with ExitStack() as stack:
        processes = stack.enter_context(shared_run())
        resume = settings.resume or size.first is not None
        new = Transaction(target, settings.overwrite, file=True, resume=resume)
        transaction = processes.on_first(lambda: stack.enter_context(new))
        if transaction is not None:
            size.go_on(transaction.journal)
        size.first, size.now = processes.gather((size.first, size.now))[0]
        opened = open_model(**shared(settings, ModelSettings))
        stack.callback(opened.restore)
        if settings.scope == "model":
            check_has_loss(opened.skeleton, settings.calibration, "the loss whose gradients are asked for")
        shapes = {matrix.name: matrix.shape for matrix in opened.skeleton.matrices}
        names = set(matching(shapes, only=settings.only, skip=settings.skip))
        windows = model_samples(
            opened, settings, progress=partial(settings.tell, "calibrate"), placing=partial(settings.tell, PLACING)
        )
        if isinstance(windows, Images):
            raise CalibrationError(
                f"images alone have no loss. Give them with labels, calibration={{{PIXELS!r}: ..., {LABELS!r}: ...}}."
            )
        chosen = gradient_batch_size(opened.skeleton, windows.length, settings.granularity, size.now)
        facts = _facts(settings, opened, windows, kinds, names)
        processes.agree(facts)
        if transaction is not None:
            size.begin(min(chosen, windows.samples) if processes.count == 1 else 1)
            transaction.goes_on = size.goes_on
            transaction.journal.begin("gradients", len(opened.skeleton.blocks), facts)
            size.record(transaction.journal)
        collect(
            opened,
            windows,
            new.folder,
            kinds,
            [matrix for matrix in opened.skeleton.matrices if matrix.name in names],
            journal=new.journal if transaction is not None else Journal(new.folder.with_name("no journal")),
            batch_size=size.now,
            exempt=Exempt(settings.on_nonfinite, settings.unseen),
            offload_states=settings.offload_states,
            progress=settings.tell,
            processes=processes,
        )
        if transaction is not None:
            transaction.commit()
        processes.gather(None)  # the file has its name when any process returns
    return GradientFile(target)


def check_has_loss(skeleton: Skeleton, calibration: Any, wanted: str) -> None:
    """Raise `ModelStructureError` for a model without a loss on these calibration samples, which `wanted` needs.

    That is the loss of the next token, or of the labels that are among the samples' inputs.
    """
    model, name = skeleton.model, type(skeleton.model).__name__
    if has_two_towers(model):
        raise ModelStructureError(
            f"{name}: its loss compares samples with each other, so that no sample has one of its own, and {wanted} "
            "does not exist. Use a method without gradients, or --scope block."
        )
    if not are_labelled(calibration):
        try:
            check_predicts(model, skeleton.blocks, wanted, alone=False)
        except ModelStructureError as error:
            if not takes_labels(model):
                raise
            names = f"{input_name(model)!r}: ..., 'labels': ..."
            raise ModelStructureError(
                f"{error} Its own loss is that of labels, which Python can give: calibration={{{names}}}."
            ) from None
    elif not takes_labels(model):
        raise ModelStructureError(
            f"{name}: its forward takes no labels, so that {wanted} does not exist. Open it with a head that has a "
            "loss, or use a method without gradients."
        )
    if len(skeleton.stacks) > 1 and skeleton.dtype == torch.float16:
        raise ModelStructureError(
            f"{name}: has several stacks of blocks, whose gradients are not taken in float16. Use --dtype bfloat16 or "
            "float32."
        )


def _facts(
    settings: GradientSettings,
    opened: OpenedModel,
    windows: Windows | NamedSamples,
    kinds: Sequence[GradientKind],
    names: set[str],
) -> dict[str, Any]:
    """What the bytes of the file depend on, besides the weights themselves, whose digest is compared."""
    return {
        **common_facts(opened),
        "dtype": str(opened.skeleton.dtype),
        "batch size": settings.batch_size or "auto",
        "on_nonfinite": settings.on_nonfinite,
        "unseen": settings.unseen,
        "gradients": [asdict(kind) for kind in kinds],
        "tokens": windows.digest,
        "matrices": sorted(names),
    }


def _check_file(output: File, model: Model, overwrite: bool) -> Path:
    """The absolute path of the file to write, links resolved. Raises `CheckpointError` when it is not safe to write.

    What is overwritten must be a file of gradients.
    """
    target = resolved(output)
    if target.exists() and not overwrite:
        raise CheckpointError(f"{output}: exists already. Choose another name, or pass --overwrite.")
    if target.is_dir():
        raise CheckpointError(
            f"{output}: is a folder; gradients are one file. Choose a name such as gradients.safetensors."
        )
    if isinstance(model, str | os.PathLike) and Path(model).expanduser().resolve() in target.parents:
        raise CheckpointError(f"{output}: lies inside the model, which is never written to. Choose another folder.")
    if target.exists():
        try:
            GradientFile(target)
        except CheckpointError:
            raise CheckpointError(
                f"{output}: exists and holds no gradients, so Secateur did not write it and will not overwrite it. "
                "Choose another name, or remove it yourself."
            ) from None
    check_writable(output)
    return target


def collect(
    opened: OpenedModel,
    windows: Windows | NamedSamples,
    target: Path,
    kinds: Sequence[GradientKind],
    matrices: Sequence[Matrix],
    *,
    journal: Journal,
    batch_size: int | None = None,
    offload_states: str = "auto",
    progress: Progress = lambda stage, done, total: None,
    exempt: Exempt | None = None,
    processes: Processes = ALONE,
) -> GradientFile:
    """The file `target` with gradient norms of these matrices of an opened model.

    `kinds` differ in their norms only. The `journal` gets each block whose sums are on the disk; those that it has from
    an earlier process are not taken again. Several `processes` share the samples; the first one writes.

    Raises `CalibrationError` for a matrix whose gradient is zero throughout, `AnotherRunError` where the earlier
    process saw another model.
    """
    skeleton = opened.skeleton
    granularity, scope = kinds[0].granularity, kinds[0].scope
    norms: list[Norm] = list(dict.fromkeys(kind.norm for kind in kinds))
    if scope == "model" and isinstance(windows, Windows):
        check_predictions(windows)
    batch_size = gradient_batch_size(skeleton, windows.length, granularity, batch_size)
    of_block = by_block(matrices)
    first = min(of_block)
    exempt = exempt or Exempt()
    source_tensors = _digests(skeleton, of_block, exempt)
    provenance = {
        "norms": norms,
        "granularity": granularity,
        "scope": scope,
        **windows.shape,
        "tokens_digest": windows.digest,
        "calibration": dict(windows.provenance),
        "model": opened.origin,
        "model_digest": model_digest(source_tensors),
        "source_tensors": source_tensors,
        "dtype": str(skeleton.dtype).removeprefix("torch."),
        "versions": {"secateur": secateur.__version__, "torch": torch.__version__},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    sizes = chunk_sizes(skeleton, windows.samples, windows.length, batch_size, scope, offload_states, first)
    sizes = min(processes.gather(sizes), key=lambda own: own.samples)
    begun = TAKING in journal.found
    at_once = min(sizes.samples * processes.count, windows.samples)
    if begun:
        provenance, at_once = _go_on(journal, provenance)
    at_once = processes.gather(at_once)[0]
    # Exact: parts are cut by samples, so that they are the same for batches of any size.
    starts = range(0, windows.samples, at_once)
    parts = [windows.part(start, min(start + at_once, windows.samples)).batches(batch_size) for start in starts]
    shapes = {matrix.name: matrix.shape for matrix in matrices}
    wide = torch.float64 if skeleton.dtype == torch.float64 else torch.float32

    def open_file(path: Path, found: Mapping[str, str] | None) -> GradientWriter:
        return GradientWriter(path, shapes, norms, provenance, wide, found=found)

    written = GradientParts(target, len(parts), of_block, open_file, journal, begun=begun) if processes.first else None
    try:
        if written is not None and not begun:
            flush_names(target.parent)
            record = {key: provenance[key] for key in _OF_THE_FIRST} | {"samples at once": at_once}
            journal.add(Part(TAKING, record=record))
        for number, part in enumerate(parts):
            finished = processes.gather(written.finished(number, exempt) if written is not None else set())[0]
            if len(finished) == len(of_block):
                continue

            def take_block(block: Block, tap: GradientTap, number: int = number) -> None:
                totals: Sums = tap.totals()
                if written is None:  # the first process has the same sums
                    return
                own = of_block.get(block.index, [])
                _, layout = tapped(block, own)
                sums: dict[tuple[str, Norm], Tensor] = {}
                for matrix, norm in product(own, norms):
                    total = matrix.of_parameter(totals[matrix.parameter, norm], layout[matrix.parameter])
                    before = written.before(number, matrix.name, norm)
                    sums[matrix.name, norm] = total if before is None else total.cpu() + before
                    if number + 1 == len(parts):
                        check_gradient(matrix.name, sums[matrix.name, norm], windows.samples, exempt)
                if own:
                    written.add(number, block.index, sums, exempt.to_json([matrix.name for matrix in own]))

            one = GradientPass(
                skeleton,
                lambda block: tapped(block, of_block.get(block.index, []))[0],
                take_block,
                partial(GradientTap, norms=norms, granularity=granularity),
                None if are_labelled(windows) else next_tokens,
                first,
                finished,
                _in_part(progress, number, len(parts)),
                processes,
            )
            (one.of_model if scope == "model" else one.of_blocks)(processes.share(part).batches, sizes.folder)
        if written is not None:
            progress("write", 1, 1)
            written.complete()
    finally:
        if written is not None:
            written.abandon()
    exempt.add(processes.gather(exempt.to_json())[0])
    file, unseen = None, None
    try:
        file = GradientFile(target)
    except CheckpointError as error:
        unseen = CheckpointError(
            f"process {processes.rank} does not see what process 0 has written there. All processes need a file system "
            f"in common for the output. ({error})"
        )
    processes.gather(None, unseen)  # the first process moves the file away when all have looked
    assert file is not None
    return file


def _go_on(journal: Journal, provenance: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Provenance as an earlier process has begun it, and how many samples it took at once."""
    begun = journal.found[TAKING].record
    if begun["model_digest"] != provenance["model_digest"]:
        raise AnotherRunError(
            f"{provenance['model'].get('path')}: has changed since its gradients were begun: the digest of its tensors "
            f"was {begun['model_digest'][:12]} and is {provenance['model_digest'][:12]}. Go on with the same model, or "
            "start anew with --overwrite."
        )
    # Exact: samples are added up in the same parts, whatever memory is free now.
    return provenance | {key: begun[key] for key in _OF_THE_FIRST}, begun["samples at once"]


def _digests(skeleton: Skeleton, of_block: Mapping[int, Sequence[Matrix]], exempt: Exempt) -> dict[str, str]:
    """sha256 of every tensor that a forward reads, for gradients depend on all; each matrix is checked on the way."""
    result: dict[str, str] = {}
    for index, names in enumerate(skeleton.block_tensors):
        for name in names:
            tensors = skeleton.source.read([name])  # Memory: one tensor at a time
            result[name] = tensor_digest(tensors[name])
            for matrix in of_block.get(index, []):
                if matrix.tensor == name:
                    try:
                        check_weight(matrix.name, matrix.view(tensors))
                    except NumericalError as error:
                        exempt.nonfinite(matrix.name, error)
    result.update({name: source_digest(skeleton.source, name) for name in skeleton.outside_tensors})
    return result


def check_gradient(name: str, total: Tensor, samples: int, exempt: Exempt) -> None:
    """Raise `CalibrationError` for gradients that are zero throughout, or not finite, unless the matrix is exempt."""
    bad = first_nonfinite(total)
    if bad is not None:
        error = CalibrationError(
            f"{name}: its gradients on the {samples} calibration samples contain NaN or infinity, first for the weight "
            f"in row {bad[0]}, column {bad[1]}. Is the model itself sound? Try --dtype float32, and check the dense "
            "model with secateur eval."
        )
        exempt.nonfinite(name, error)
    elif not bool(total.any()):
        error = CalibrationError(
            f"{name}: its gradient is zero on all {samples} calibration samples, so nothing is known of its weights. "
            f'Calibrate on more samples (--samples), or leave it dense with --skip "{name}".'
        )
        exempt.no_token([name], error)


def gradient_batch_size(skeleton: Skeleton, length: int, granularity: Granularity, asked: int | None) -> int:
    """Samples that go through a block at once: one in models that route tokens to experts, where samples mix.

    Raises `CalibrationError` when more are asked for there.
    """
    experts = numbered_experts(skeleton.text_config)
    routes = any(matrix.expert is not None for matrix in skeleton.matrices) or (
        experts is not None and "router" in skeleton.left_out.values()
    )
    if not routes or granularity == "token":
        return asked or default_batch_size(length, skeleton.device)
    if asked is not None and asked > 1:
        raise CalibrationError(
            f"--batch-size: got {asked}, expected 1: this model routes tokens to experts, which sees the tokens of all "
            "samples of a batch as one, and gradients are taken sample by sample. Leave --batch-size out, or use "
            "--granularity token."
        )
    return 1


def accumulator_bytes(matrices: Sequence[Matrix]) -> int:
    """Of the sums of gradients of a block, the largest one: whole numbers of 8 bytes."""
    return 8 * max(sum(math.prod(matrix.shape) for matrix in own) for own in by_block(matrices).values())


def graph_bytes(matrices: Sequence[Matrix], tokens: int, itemsize: int) -> int:
    """What a backward through a block keeps of so many tokens: inputs and outputs of all products, twice."""
    seen = [matrix for matrix in matrices if matrix.expert in (None, 0)]
    return 2 * tokens * itemsize * max(sum(sum(matrix.shape) for matrix in own) for own in by_block(seen).values())


@dataclass(frozen=True)
class ChunkSizes:
    """How the saved inputs of all blocks are held: so many samples at once, in memory or in files of a folder."""

    samples: int
    bytes: int
    folder: Path | None


def chunk_sizes(
    skeleton: Skeleton,
    samples: int,
    length: int,
    batch_size: int,
    scope: Scope,
    offload: str,
    first: int,
) -> ChunkSizes:
    """As many samples at once as fit: inputs of every block, and one set of gradients, for each of them.

    Memory: half of what is free now may be used, of the host's memory or, with a folder, of its disk. What does not
    fit is done in several passes over the weights, whose sums are added up. Never less than one batch at once.
    """
    saved = 2 if scope == "block" else len(skeleton.blocks) - first + 3
    each = saved * length * skeleton.hidden_size * skeleton.dtype.itemsize
    folder = None if offload in ("auto", "never") else Path(offload).expanduser()
    if folder is None:
        free = available_bytes()
    else:
        existing = next(parent for parent in (folder.absolute() / "in").parents if parent.exists())
        free = shutil.disk_usage(existing).free
    batches = math.ceil(samples / batch_size)
    fitting = max(1, free // 2 // (each * batch_size))
    at_once = min(samples, batch_size * math.ceil(batches / math.ceil(batches / fitting)))  # parts of equal size
    return ChunkSizes(at_once, at_once * each, folder)


def _in_part(progress: Progress, number: int, parts: int) -> Progress:
    if parts == 1:
        return progress
    return lambda stage, done, total: progress(f"{stage} {number + 1}/{parts}", done, total)
