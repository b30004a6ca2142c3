"""`prune`: from a model to a pruned checkpoint and its manifest."""

import datetime
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from secateur.block_loop import BlockLoop, Clock, Event, OnEvent
from secateur.calibration import Windows, check_bos
from secateur.card import write_card
from secateur.core.fingerprint import recorded
from secateur.core.gram import CrossGram, Gram
from secateur.core.patterns import NM, Pattern, Unstructured, with_group
from secateur.core.problem import Method
from secateur.errors import CalibrationError, PatternError
from secateur.gradient_file import GradientFile
from secateur.gradient_pass import collect, gradient_batch_size
from secateur.manifest import Manifest, file_digests, tensor_digest
from secateur.model_windows import BOS_WORDS, model_windows
from secateur.models.loading import check_loads
from secateur.models.matrices import Matrix
from secateur.models.opened import OpenedModel, choose_device, open_model
from secateur.models.skeleton import Skeleton
from secateur.models.stream import default_batch_size
from secateur.models.writer import CheckpointWriter, writing
from secateur.names import unique
from secateur.output import Scratch, check_output
from secateur.plan import Plan, uniform
from secateur.shared_statistics import SharedStatistics

CORRECTION = 0.5  # of what the residual stream lacks of the dense model's


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
    bos: str = "auto",
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    gradient: str | os.PathLike[str] | None = None,
    propagate: str = "pruned",
    within: str = "block",
    targets: str = "pruned",
    correction: float | None = None,
    statistics_device: str | None = None,
    statistics: SharedStatistics | None = None,
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
    "concat", or None for what the papers do with that corpus, and `bos` "papers", "always", "never" or "auto", as for
    `perplexity`. `propagate` says whether
    each block sees the outputs of the pruned blocks before it ("pruned", as published) or of the dense ones.
    `within` says whether the statistics of a block are all of the block as it was ("block", as published), or each
    of the block behind its matrices that were pruned already ("site": true sequential order). `targets` says which
    outputs methods that update weights fit: those that a matrix would have on its own inputs ("pruned", as published),
    those that it has in the dense model ("dense"), or its own with `correction` (0.5) of what the residual stream
    behind it lacks of the dense model's ("residual", with ``within="site"``). `statistics_device` is where statistics
    are kept.
    `statistics` are shared with other runs on the same model and tokens, with `propagate="dense"`: the first one takes
    them, and the others need no forward for them.
    `gradient` is a file that `gradients` wrote for this model and these tokens; without it, a method that needs
    gradients takes them first.

    The source is never written to, and `output` appears under its name only when it is complete.

    Raises `PatternError`, `CalibrationError`, `ModelStructureError`, `NumericalError` or `CheckpointError`, each of
    which says what to do.
    """
    started = time.perf_counter()
    only, skip = ([globs] if isinstance(globs, str) else globs for globs in (only, skip))
    correction = chosen_correction(targets, correction)
    check_choices(method, propagate, within, targets)
    check_bos(bos, BOS_WORDS)
    if statistics is not None and propagate != "dense":
        raise PatternError('statistics can be shared with propagate="dense" only: pruned blocks change the inputs.')
    kept_on = None if statistics_device is None else choose_device(statistics_device, "--statistics-device")
    if batch_size is not None and batch_size < 1:
        raise CalibrationError(f"--batch-size: got {batch_size}, expected at least 1.")
    target = check_output(output, model, overwrite)
    with ExitStack() as stack:
        scratch = None if target is None else stack.enter_context(Scratch(target, overwrite))
        opened = open_model(model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
        stack.callback(opened.restore)
        skeleton = opened.skeleton
        plan = make_plan(opened, method, pattern, only=only, skip=skip)
        if targets == "dense":
            check_dense_targets([matrix for matrix in skeleton.matrices if matrix.name in plan])
        given = gradient_file(gradient, method, skeleton, plan)
        windows = None
        if method.needs or (method.gradient is not None and given is None):
            on_event(Event("calibrate"))
            windows = model_windows(
                opened,
                calibration,
                tokenizer,
                samples=samples,
                length=length,
                seed=seed,
                sampling=sampling,
                bos=bos,
                progress=lambda done, total: on_event(Event("calibrate", done=done, total=total)),
            )
            if given is not None:
                given.check_tokens(windows.digest, windows.samples, windows.length)
        needs = method.needs | ({CrossGram} if targets == "dense" else frozenset())
        regional = method.gradient is not None and method.gradient.scope == "block" and given is None
        if regional and statistics is not None:
            raise PatternError(f"{method.name} takes gradients on the way, from all samples: give it their file.")
        if regional and windows is not None:
            assert method.gradient is not None
            batch_size = gradient_batch_size(skeleton, windows.length, method.gradient.granularity, batch_size)
        ordered = next((kind for kind in needs if getattr(kind, "one_sample_at_a_time", False)), None)
        if ordered is not None and batch_size not in (None, 1):
            raise CalibrationError(f"--batch-size: got {batch_size}, expected 1: {ordered.__name__} goes by samples.")
        if ordered is not None:
            batch_size = 1
        manifest = Manifest(
            versions=run_versions(),
            method=method.name,
            source=opened.origin,
            settings={
                "propagate": propagate,
                "device": str(skeleton.device),
                "dtype": str(skeleton.dtype).removeprefix("torch."),
                "batch_size": batch_size or default_batch_size(windows.length if windows else 1, skeleton.device),
                "statistics": sorted(kind.__name__ for kind in needs),
                "statistics_device": None if kept_on is None else str(kept_on),
                "within": within,
                "targets": targets,
                "correction": correction,
                "options": dict(method.options),
                "fingerprint": recorded(method),
                "gradient": None if method.gradient is None else asdict(method.gradient),
            },
            plan=plan.to_json(),
            left_out=skeleton.left_out_by_reason(),
            command=list(command) if command is not None else None,
            calibration=_calibration(windows, given),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        writer = None
        if scratch is not None:
            writer = CheckpointWriter(scratch.folder, skeleton.source.layout())
            stack.callback(writer.abandon)
            with writing(scratch.folder):
                opened.write_companions(scratch.folder)
        place = Path.cwd().joinpath if scratch is None else scratch.place
        name = "secateur" if target is None else target.name
        states = place(unique(f"{name}.states"))
        clock = Clock(synchronise=skeleton.device.type == "cuda")
        if method.gradient is not None and given is None and not regional:
            assert windows is not None
            began = time.perf_counter()
            taken = place(unique(f"{name}.gradients"))
            stack.callback(taken.unlink, missing_ok=True)
            given = collect(
                opened,
                windows,
                taken,
                [method.gradient],
                [matrix for matrix in skeleton.matrices if matrix.name in plan],
                batch_size=batch_size,
                offload_states=offload_states,
                progress=lambda stage, done, total: on_event(Event(f"gradients: {stage}", done=done, total=total)),
            )
            clock.add("gradients", began)
        shared = statistics if needs else None
        if shared is not None:
            assert windows is not None
            shared.begin(needs, _shareable(manifest, opened, windows, plan))
        BlockLoop(
            skeleton=skeleton,
            method=method,
            needs=needs,
            plan=plan,
            windows=windows,
            writer=writer,
            manifest=manifest,
            propagate=propagate,
            offload=offload_states,
            scratch=states,
            clock=clock,
            on_event=on_event,
            gradients=given,
            within=within,
            targets=targets,
            correction=correction,
            statistics_device=kept_on,
            shared=shared,
        ).run()
        if shared is not None:
            shared.complete = True
        manifest.seconds = clock.seconds | {"total": time.perf_counter() - started}
        count_totals(manifest)
        if writer is not None:
            assert scratch is not None
            complete(scratch, opened, writer, manifest)
    on_event(Event("done"))
    return manifest


def complete(scratch: Scratch, opened: OpenedModel, writer: CheckpointWriter, manifest: Manifest) -> None:
    """End a run that wrote a checkpoint: whether it loads, digests, manifest, card, and its name."""
    writer.close()
    check_loads(opened, scratch.folder)
    manifest.tensors, manifest.headers = writer.digests, writer.header_digests
    manifest.files = file_digests(scratch.folder)
    manifest.write(scratch.folder)
    write_card(scratch.folder, manifest, scratch.target.name)
    scratch.commit()


def chosen_correction(targets: str, correction: float | None) -> float | None:
    """The share of what the residual stream lacks that targets make up for; None for targets that do not.

    Raises `PatternError` for one that is no share, or that would not be used.
    """
    if targets != "residual":
        if correction is not None:
            raise PatternError(f"--correction is for --targets residual, and targets are {targets}.")
        return None
    if correction is not None and not 0 < correction <= 1:
        raise PatternError(f"--correction: got {correction:g}, expected a share above 0 and up to 1.")
    return CORRECTION if correction is None else correction


def check_choices(method: Method, propagate: str, within: str, targets: str) -> None:
    """Raise `PatternError` for a word that is none, or choices that contradict each other."""
    for option, found, known in (
        ("propagate", propagate, ("pruned", "dense")),
        ("within", within, ("block", "site")),
        ("targets", targets, ("pruned", "dense", "residual")),
    ):
        if found not in known:
            expected = f"{', '.join(known[:-1])} or {known[-1]}"
            raise PatternError(f'--{option}: got "{found}", expected {expected}.')
    if propagate == "dense" and (within == "site" or targets != "pruned"):
        option = "--within site" if within == "site" else f"--targets {targets}"
        raise PatternError(f"{option} is about what pruning did before; with --propagate dense nothing sees that.")
    if within == "site" and not method.needs:
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
    routed = next((matrix.name for matrix in matrices if matrix.expert is not None or ".experts." in matrix.name), None)
    if routed is not None:
        raise PatternError(
            f"--targets dense: {routed} is an expert, to which the dense model sends other tokens than the pruned one, "
            'so that their inputs cannot be paired. Use --targets pruned, or leave experts out: --skip "*expert*".'
        )


def gradient_file(
    gradient: str | os.PathLike[str] | None, method: Method, skeleton: Skeleton, plan: Plan
) -> GradientFile | None:
    """The given file of gradients, checked against the method and the names and shapes of the planned matrices."""
    if gradient is None:
        return None
    if method.gradient is None:
        raise CalibrationError(f"--gradient {gradient}: the method {method.name} uses no gradients. Leave it out.")
    file = GradientFile(gradient)
    file.check_kind(method.gradient)
    file.check_shapes({matrix.name: matrix.shape for matrix in skeleton.matrices if matrix.name in plan})
    for name in skeleton.outside_tensors:
        file.check_tensor(name, tensor_digest(skeleton.source.read([name])[name]))
    return file


def _calibration(windows: Windows | None, gradient: GradientFile | None) -> dict[str, Any] | None:
    """Where the tokens came from: the windows, or, for a method that sees gradients only, those of their file."""
    if windows is not None:
        return dict(windows.provenance) | {"digest": windows.digest}
    if gradient is not None:
        return {**gradient.provenance["calibration"], "digest": gradient.provenance["tokens_digest"]}
    return None


def _shareable(manifest: Manifest, opened: OpenedModel, windows: Windows, plan: Plan) -> dict[str, Any]:
    """What two runs must have in common to share statistics."""
    settings = {name: manifest.settings[name] for name in ("device", "dtype", "batch_size", "statistics_device")}
    return {"model": opened.origin, "tokens": windows.digest, "matrices": list(plan), **settings}


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


def count_totals(manifest: Manifest) -> None:
    """Count the planned weights and zeros of all matrices again."""
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


def run_versions() -> dict[str, str]:
    """The versions of everything that a result depends on."""
    import accelerate
    import transformers

    return {
        "secateur": secateur.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
