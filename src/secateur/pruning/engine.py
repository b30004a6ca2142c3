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
from secateur.calibration import Windows
from secateur.collect.gradient_file import GradientFile
from secateur.collect.gradient_pass import collect
from secateur.collect.survey import Survey, facts_of
from secateur.core.fingerprint import recorded
from secateur.core.needs import input_statistics
from secateur.core.patterns import NM, Pattern
from secateur.core.problem import Method
from secateur.files.names import unique
from secateur.files.writer import CheckpointWriter, writing
from secateur.models.flow.memory import return_large
from secateur.models.opening.loading import check_loads
from secateur.models.opening.opened import OpenedModel
from secateur.plans.plan import Plan
from secateur.pruning.block_loop import BlockLoop, Clock, Event, OnEvent
from secateur.pruning.preparation import prepared
from secateur.record.card import write_card
from secateur.record.manifest import Manifest, file_digests
from secateur.runs.output import Scratch, check_output


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
    statistics: Survey | None = None,
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
    target = check_output(output, model, overwrite)
    return_large()
    with ExitStack() as stack:
        scratch = None if target is None else stack.enter_context(Scratch(target, overwrite))
        ready = stack.enter_context(
            prepared(
                model,
                method=method,
                pattern=pattern,
                calibration=calibration,
                samples=samples,
                length=length,
                seed=seed,
                sampling=sampling,
                bos=bos,
                only=only,
                skip=skip,
                gradient=gradient,
                propagate=propagate,
                within=within,
                targets=targets,
                correction=correction,
                statistics_device=statistics_device,
                survey=statistics,
                batch_size=batch_size,
                device=device,
                dtype=dtype,
                output=output,
                overwrite=overwrite,
                tokenizer=tokenizer,
                revision=revision,
                trust_remote_code=trust_remote_code,
                progress=lambda done, total: on_event(Event("calibrate", done=done, total=total)),
            )
        )
        opened, plan, windows, evidence = ready.opened, ready.plan, ready.windows, ready.evidence
        skeleton = opened.skeleton
        manifest = Manifest(
            versions=run_versions(),
            method=method.name,
            source=opened.origin,
            settings={
                "propagate": propagate,
                "device": str(skeleton.device),
                "dtype": str(skeleton.dtype).removeprefix("torch."),
                "batch_size": ready.chosen_batch_size,
                "statistics": sorted(kind.__name__ for kind in input_statistics(evidence.needs)),
                "statistics_device": None if evidence.device is None else str(evidence.device),
                "within": within,
                "targets": targets,
                "correction": ready.correction,
                "options": dict(method.options),
                "fingerprint": recorded(method),
                "gradient": None if method.gradient is None else asdict(method.gradient),
            },
            plan=plan.to_json(),
            left_out=skeleton.left_out_by_reason(),
            command=list(command) if command is not None else None,
            calibration=_calibration(windows, evidence.given.gradients),
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
        if ready.takes_gradients:
            assert windows is not None
            assert method.gradient is not None
            began = time.perf_counter()
            taken = place(unique(f"{name}.gradients"))
            stack.callback(taken.unlink, missing_ok=True)
            file = collect(
                opened,
                windows,
                taken,
                [method.gradient],
                ready.matrices,
                batch_size=ready.batch_size,
                offload_states=offload_states,
                progress=lambda stage, done, total: on_event(Event(f"gradients: {stage}", done=done, total=total)),
            )
            evidence = evidence.replaced(gradients=file)
            clock.add("gradients", began)
        shared = statistics if method.inputs else None
        if shared is not None:
            assert windows is not None
            facts = facts_of(opened, windows, ready.matrices, ready.chosen_batch_size, evidence.device)
            shared.begin(method.inputs, facts)
        BlockLoop(
            skeleton=skeleton,
            method=method,
            evidence=evidence,
            plan=plan,
            windows=windows,
            writer=writer,
            manifest=manifest,
            propagate=propagate,
            offload=offload_states,
            scratch=states,
            clock=clock,
            on_event=on_event,
            within=within,
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


def _calibration(windows: Windows | None, gradient: GradientFile | None) -> dict[str, Any] | None:
    """Where the tokens came from: the windows, or, for a method that sees gradients only, those of their file."""
    if windows is not None:
        return dict(windows.provenance) | {"digest": windows.digest}
    if gradient is not None:
        return {**gradient.provenance["calibration"], "digest": gradient.provenance["tokens_digest"]}
    return None


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
