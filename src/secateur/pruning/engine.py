"""`prune`: from a model to a pruned checkpoint and its manifest."""

import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from secateur.calibration import Windows
from secateur.collect.gradient_file import GradientFile
from secateur.collect.gradient_pass import collect
from secateur.collect.survey import facts_of
from secateur.core.fingerprint import recorded
from secateur.core.needs import input_statistics
from secateur.files.names import unique
from secateur.models.flow.memory import return_large
from secateur.pruning.block_loop import BlockLoop
from secateur.pruning.named import resolved
from secateur.pruning.preparation import Prepared, output_of, prepared
from secateur.pruning.settings import PruneSettings
from secateur.record.manifest import Manifest
from secateur.record.versions import run_facts
from secateur.runs.checkpoint import checkpoint_output
from secateur.runs.conveyor import Conveyor
from secateur.runs.events import Clock, Event, OnEvent
from secateur.runs.options import taking
from secateur.runs.transaction import Transaction


@taking(PruneSettings)
def prune(settings: PruneSettings) -> Manifest:
    """The manifest of a pruned model, which is written to `output`, or, for a module in memory, pruned in place.

    `model` is a folder, a hub id, a GGUF file or an `nn.Module`. `method` is a `Method`, the function that makes it, or
    its name ("wanda", "wanda+swaps") with its options in `option`, `norm` and `alpha`. `pattern` is one pattern for
    every matrix that `only` and `skip` leave (0.5, "50%", "2:4" or a `Pattern`; default: half the weights), a mapping
    from globs to such patterns, of which the first that matches counts, or a whole `Plan`; `sparsity` and `per` say
    one in two words. `samples` (128) windows of `length` (2048) tokens are drawn from `calibration`: corpora, or token
    ids of shape (samples, length); `sampling` is "document", "concat", or None for what the papers do with that corpus,
    and `bos` "papers", "always", "never" or "auto", as for `perplexity`. `propagate` says whether each block sees the
    outputs of the pruned blocks before it ("pruned", as published) or of the dense ones. `within` says whether the
    statistics of a block are all of the block as it was ("block", as published), or each of the block behind its
    matrices that were pruned already ("site": true sequential order). `targets` says which outputs methods that update
    weights fit: those that a matrix would have on its own inputs ("pruned", as published), those that it has in the
    dense model ("dense"), or its own with `correction` (0.5) of what the residual stream behind it lacks of the dense
    model's ("residual", with ``within="site"``). `statistics_device` is where statistics are kept. `statistics` are
    shared with other runs on the same model and tokens, with `propagate="dense"`: the first one takes them, and the
    others need no forward for them. `gradient` is a file that `gradients` wrote for this model and these tokens;
    without it, a method that needs gradients takes them first.

    The source is never written to, and `output` appears under its name only when it is complete.

    Raises `PatternError`, `CalibrationError`, `ModelStructureError`, `NumericalError` or `CheckpointError`, each of
    which says what to do.
    """
    return run(settings)


def run(settings: PruneSettings) -> Manifest:
    """What `prune` does, from its settings."""
    started = time.perf_counter()
    settings = resolved(settings)
    on_event = settings.on_event
    target = output_of(settings)
    return_large()
    with ExitStack() as stack:
        transaction = None if target is None else stack.enter_context(Transaction(target, settings.overwrite))
        drawing = partial(_tell, on_event, "calibrate")
        ready = stack.enter_context(prepared(settings, target, progress=drawing))
        opened, windows, evidence, method = ready.opened, ready.windows, ready.evidence, ready.method
        skeleton = opened.skeleton
        manifest = _manifest(ready)
        written = None if transaction is None else stack.enter_context(checkpoint_output(transaction, opened))
        place = Path.cwd().joinpath if transaction is None else transaction.place
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
                offload_states=settings.offload_states,
                progress=lambda stage, done, total: _tell(on_event, f"gradients: {stage}", done, total),
            )
            evidence = evidence.replaced(gradients=file)
            clock.add("gradients", began)
        shared = settings.statistics if method.inputs else None
        if shared is not None:
            assert windows is not None
            facts = facts_of(opened, windows, ready.matrices, ready.chosen_batch_size, evidence.device)
            shared.begin(method.inputs, facts)
        BlockLoop(ready, evidence, manifest, Conveyor(skeleton, written, clock, on_event), states).run()
        if shared is not None:
            shared.complete = True
        manifest.seconds = clock.seconds | {"total": time.perf_counter() - started}
        manifest.count_totals()
        if written is not None:
            written.seal(manifest)
            written.publish(manifest)
    on_event(Event("done"))
    return manifest


def _tell(on_event: OnEvent, stage: str, done: int, total: int) -> None:
    on_event(Event(stage, done=done, total=total))


def _manifest(ready: Prepared) -> Manifest:
    """The manifest at the start of a run: what was asked, and what that means for this model."""
    settings, method, skeleton = ready.settings, ready.method, ready.opened.skeleton
    return Manifest(
        method=method.name,
        source=ready.opened.origin,
        settings={
            "propagate": settings.propagate,
            **_computing(ready),
            "statistics": sorted(kind.__name__ for kind in input_statistics(ready.evidence.needs)),
            "within": settings.within,
            "targets": settings.targets,
            "correction": ready.correction,
            "options": dict(method.options),
            "fingerprint": recorded(method),
            "gradient": None if method.gradient is None else asdict(method.gradient),
        },
        plan=ready.plan.to_json(),
        left_out=skeleton.left_out_by_reason(),
        calibration=_calibration(ready.windows, ready.evidence.given.gradients),
        **run_facts(settings.command),
    )


def _computing(ready: Prepared) -> dict[str, Any]:
    """What sums of statistics depend on besides the tokens, to the last bit."""
    skeleton, kept_on = ready.opened.skeleton, ready.evidence.device
    return {
        "device": str(skeleton.device),
        "dtype": str(skeleton.dtype).removeprefix("torch."),
        "batch_size": ready.chosen_batch_size,
        "statistics_device": None if kept_on is None else str(kept_on),
    }


def _calibration(windows: Windows | None, gradient: GradientFile | None) -> dict[str, Any] | None:
    """Where the tokens came from: the windows, or, for a method that sees gradients only, those of their file."""
    if windows is not None:
        return dict(windows.provenance) | {"digest": windows.digest}
    if gradient is not None:
        return {**gradient.provenance["calibration"], "digest": gradient.provenance["tokens_digest"]}
    return None
