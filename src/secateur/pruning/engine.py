"""`prune`: from a model to a pruned checkpoint and its manifest."""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from secateur.calibration.images import Images
from secateur.collect.gradient_file import GradientFile
from secateur.collect.gradient_parts import other_file
from secateur.collect.gradient_pass import collect
from secateur.collect.model_windows import Samples
from secateur.collect.survey import computing, facts_of
from secateur.core.fingerprint import recorded
from secateur.core.needs import input_statistics
from secateur.errors import PatternError
from secateur.files.scratch import scratch_folder
from secateur.models.flow.memory import return_large
from secateur.plans.allocated import Allocated
from secateur.pruning.block_loop import BlockLoop
from secateur.pruning.forecast_memory import memory_of, shortage
from secateur.pruning.named import resolved
from secateur.pruning.preparation import Prepared, chosen_correction, output_of, prepared
from secateur.pruning.settings import PruneSettings
from secateur.record.manifest import Manifest
from secateur.record.versions import run_facts
from secateur.runs.checkpoint import checkpoint_output
from secateur.runs.conveyor import Conveyor
from secateur.runs.events import Clock, Event, named
from secateur.runs.journal import ALLOCATED, GRADIENTS, Journal, Part, common_facts
from secateur.runs.options import taking, written
from secateur.runs.out_of_memory import BatchSize, with_smaller_batches
from secateur.runs.processes import Processes, shared_run
from secateur.runs.transaction import Transaction

logger = logging.getLogger(__name__)


@taking(PruneSettings)
def prune(settings: PruneSettings) -> Manifest:
    """The manifest of a pruned model, which is written to `output`, or, for a module in memory, pruned in place.

    `model` is a folder, a hub id, a GGUF file or an `nn.Module`. `method` is a `Method`, the function that makes it, or
    its name ("wanda", "wanda+swaps") with its options in `option`, `norm` and `alpha`. `pattern` is one pattern for
    every matrix that `only` and `skip` leave (0.5, "50%", "2:4" or a `Pattern`; default: half the weights), a mapping
    from globs to such patterns, of which the first that matches counts, or a whole `Plan`; `sparsity` and `per` say
    one in two words.

    `samples` (128) windows of `length` (2048) tokens are drawn from `calibration`: corpora by their names, or texts in
    memory (a list, a `datasets.Dataset`, a `DataLoader`); or it is token ids in one of these, or a tensor of shape
    (samples, length). `sampling` is "document", "concat", or None for what the papers do with that corpus, and `bos`
    "papers", "always", "never" or "auto", as for `perplexity`. `gradient` is a file that `gradients` wrote for this
    model and these tokens; without it, a method that needs gradients takes them first.

    `propagate` says whether each block sees the outputs of the pruned blocks before it ("pruned", as published) or of
    the dense ones. With `within` "block" all statistics of a block are taken before any of it is pruned, as published;
    with "site" they are taken input by input, each after the matrices before it were pruned: true sequential order.
    `targets` says which outputs methods that update weights fit: those that a matrix would have on its own inputs
    ("pruned", as published), those that it has in the dense model ("dense"), or its own plus the share `correction`
    (0.5) of the difference between the dense model's residual stream and this one, taken after the matrix ("residual",
    with ``within="site"``).

    `statistics_device` is where statistics are kept. `statistics` is a `Survey` that runs on the same model and tokens
    share, with `propagate="dense"`: the first run fills it, and the others need no forward for it.

    With `progress` True a bar shows how far it is, in a terminal or a notebook; a function is called with the stage,
    how much of it is done and how much there is. `on_event` is told more.

    With `packed` the output holds what `pack` would make of it, and no plain checkpoint is left.

    The source is never written to, and `output` appears under its name only when it is complete. A block that is
    finished is on the disk before the next one is; what a run that was ended leaves, the same call with `resume` goes
    on with, to the same bytes. A run that is not `resumable`, or shares statistics, leaves nothing. Where the device
    has too little memory for `batch_size` samples at once, the run goes on with half as many, and the manifest says so.

    Raises `PatternError`, `CalibrationError`, `ModelStructureError`, `NumericalError` or `CheckpointError`, each of
    which says what to do.
    """
    settings = resolved(settings)
    return with_smaller_batches(settings.batch_size, partial(_prune, settings))


def _prune(settings: PruneSettings, size: BatchSize) -> Manifest:
    started = time.perf_counter()
    return_large()
    with ExitStack() as stack:
        processes = stack.enter_context(shared_run())
        on_event = settings.on_event

        def tell(stage: str, done: int, total: int) -> None:
            on_event(Event(stage, done=done, total=total))

        def begin() -> Transaction | None:
            target = output_of(settings)
            if target is None:
                return None
            resume = settings.resume or size.first is not None
            transaction = stack.enter_context(Transaction(target, settings.overwrite, resume=resume))
            size.go_on(transaction.journal)
            return transaction

        transaction = processes.on_first(begin)
        kept = None if transaction is None else transaction.journal.found.get(ALLOCATED)
        earlier = processes.gather(None if kept is None else kept.record)[0]
        size.first, size.now = processes.gather((size.first, size.now))[0]
        settings = replace(settings, batch_size=size.now)
        if settings.allocation != "uniform" and earlier is None and processes.count > 1:
            raise PatternError(
                f"--allocation {settings.allocation}: is made by one process. Make the plan first, with secateur "
                "allocate, and give it to all: --plan plan.json."
            )
        known = None if earlier is None else Allocated.from_json(earlier)
        clock = Clock(began=started)
        ready = stack.enter_context(prepared(settings, allocated=known, clock=clock, progress=tell))
        opened, windows, evidence, method = ready.opened, ready.windows, ready.evidence, ready.method
        extent = ready.extent
        skeleton = opened.skeleton
        check_shared(ready, processes)
        if (told := shortage(ready, memory_of(ready, trial=False))) and processes.first:
            logger.warning(told)
        pile_bytes = return_large(extent.product_bytes if extent.by_site else 0)
        if transaction is not None and settings.statistics is None:
            # With several processes there is no going on with smaller batches: the others know nothing of it.
            size.begin(min(extent.chosen_batch_size, max(extent.samples, 1)) if processes.count == 1 else 1)
            transaction.goes_on = size.goes_on
        manifest = _manifest(ready, size)
        facts = _facts(ready, manifest, size)
        processes.agree(facts)
        clock.synchronise = skeleton.device.type == "cuda"
        if transaction is not None and settings.resumable and settings.statistics is None:
            transaction.journal.begin("prune", len(skeleton.blocks), facts)
            size.record(transaction.journal)
            if transaction.journal.seconds:
                clock.resume(transaction.journal.seconds)
            if ready.allocated is not None and settings.plan is None and earlier is None:
                transaction.journal.add(Part(ALLOCATED, record=ready.allocated.to_json(), seconds=clock.so_far()))
        output = (
            None if transaction is None else checkpoint_output(transaction, opened, packed_bytes=ready.packed_bytes)
        )
        written = None if output is None else stack.enter_context(output)
        beside = processes.gather(Path.cwd() if transaction is None else transaction.partial)[0]
        if any(own.looks_at_samples and not own.forwards for own in evidence.collectors):
            assert windows is not None
            assert not isinstance(windows, Images)  # which have no labels
            assert method.gradient is not None
            alone = transaction is None and processes.first
            room = processes.gather(stack.enter_context(scratch_folder(beside)) if alone else beside)[0]
            journal = Journal(room / "journal.jsonl") if transaction is None else transaction.journal
            found = processes.gather(journal.found.get(GRADIENTS))[0]
            taken = room / "gradients.safetensors"
            if found is not None:
                evidence.exempt.add(found.record)
            else:
                with clock.timed("gradients"):
                    collect(
                        opened,
                        windows,
                        taken,
                        [method.gradient],
                        extent.matrices,
                        journal=journal,
                        batch_size=extent.batch_size,
                        offload_states=extent.offload,
                        exempt=evidence.exempt,
                        progress=named(tell, "gradients"),
                        processes=processes,
                    )
                journal.add(Part(GRADIENTS, record=evidence.exempt.to_json(), seconds=clock.so_far()))
                other_file(taken).unlink(missing_ok=True)
            evidence = replace(evidence, gradients=GradientFile(taken))
        shared = settings.statistics if method.inputs else None
        if shared is not None:
            assert windows is not None
            facts = facts_of(opened, windows, extent.matrices, extent.chosen_batch_size, evidence.device)
            shared.begin(method.inputs, facts)
        conveyor = Conveyor(skeleton, written, clock, on_event, pile_bytes)
        BlockLoop(ready, evidence, manifest, conveyor, processes.room(beside), processes).run()
        if shared is not None:
            shared.complete = True
        manifest.seconds = clock.so_far()
        manifest.count_totals()
        if written is not None:
            written.seal(manifest)
            written.publish(manifest, tell)
        processes.gather(None)  # what the first one writes is there when any of them returns
    on_event(Event("done"))
    return manifest


def check_shared(ready: Prepared, processes: Processes) -> None:
    """Raise `PatternError` for what several processes cannot share."""
    if processes.count == 1:
        return
    kinds = input_statistics(ready.evidence.needs)
    ordered = [kind.__name__ for kind in kinds if getattr(kind, "one_sample_at_a_time", False)]
    if ordered:
        raise PatternError(f"{ordered[0]}: its sums depend on the order of the samples. Use one process.")
    if ready.settings.statistics is not None:
        raise PatternError("statistics: those that runs share are taken by one process.")


def _manifest(ready: Prepared, size: BatchSize) -> Manifest:
    """The manifest at the start of a run: what was asked, and what that means for this model."""
    settings, method, skeleton = ready.settings, ready.method, ready.opened.skeleton
    return Manifest(
        method=method.name,
        source=ready.opened.origin,
        settings={
            "propagate": settings.propagate,
            **computing(skeleton, ready.extent.chosen_batch_size, ready.evidence.device),
            **({} if size.first is None else {"batch_size_at_first": size.first}),
            "statistics": sorted(kind.__name__ for kind in input_statistics(ready.evidence.needs)),
            "within": settings.within,
            "targets": settings.targets,
            "permute": settings.permute,
            "correction": chosen_correction(settings),
            "on_nonfinite": settings.on_nonfinite,
            "unseen": settings.unseen,
            "allocation": None if ready.allocated is None else dict(ready.allocated.record),
            "preset": settings.preset,
            "options": dict(method.options),
            "fingerprint": recorded(method),
            "gradient": None if method.gradient is None else asdict(method.gradient),
        },
        plan=ready.plan.to_json(),
        left_out=skeleton.left_out_by_reason(),
        calibration=_calibration(ready.windows, ready.evidence.gradients),
        **run_facts(settings.command),
    )


def _facts(ready: Prepared, manifest: Manifest, size: BatchSize) -> dict[str, Any]:
    """What the bytes of the output depend on, besides the weights themselves, which are compared one by one."""
    gradients, asked = ready.evidence.gradients, ready.settings
    # What a run has come down to is a part of its journal, not of what was asked.
    settings = {**manifest.settings, "batch_size": size.asked or "auto"}
    settings.pop("batch_size_at_first", None)
    settings.pop("preset")  # whose options stand there
    return {
        **common_facts(ready.opened),
        "settings": settings,
        "tokens": None if ready.windows is None else ready.windows.digest,
        "file of gradients": None if gradients is None else gradients.digest,
        "packed": ready.settings.packed,
        "plan": manifest.plan,
        # Of an allocation, whose plan a resumed run does not make again.
        "allocation": [asked.allocation, asked.unit, *written(asked.allocation_option)],
        "pattern": None if isinstance(asked.pattern, Mapping) else str(asked.pattern),
    }


def _calibration(windows: Samples | None, gradient: GradientFile | None) -> dict[str, Any] | None:
    """Where the tokens came from: the windows, or, for a method that sees gradients only, those of their file."""
    if windows is not None:
        return dict(windows.provenance) | {"digest": windows.digest}
    if gradient is not None:
        return {**gradient.provenance["calibration"], "digest": gradient.provenance["tokens_digest"]}
    return None
