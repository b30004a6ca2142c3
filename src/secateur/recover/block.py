"""`reconstruct`: block by block, the kept weights of a pruned checkpoint tuned to give what the dense model gives.

For each block: run the calibration samples through the dense one to get targets, tune the kept weights of the pruned
one, write it, and run the samples through it as it was written to make the next block's inputs. No more than one block
is held at a time, whatever the model's size.
"""

import math
import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from secateur.collect.model_windows import model_windows
from secateur.errors import CalibrationError
from secateur.files.folders import locate
from secateur.files.names import unique
from secateur.models.flow.stream import default_batch_size
from secateur.models.opening.opened import OpenedModel, open_model
from secateur.models.shape.matrices import Matrix, by_block
from secateur.models.shape.skeleton import Skeleton
from secateur.plans.plan import Plan, matching
from secateur.record.manifest import Manifest, read_manifest
from secateur.record.versions import run_facts
from secateur.recover.block_pass import BlockPass
from secateur.recover.block_tuning import Split
from secateur.recover.dense_source import DenseSource
from secateur.recover.settings import BlockSettings, require_one_process
from secateur.runs.checkpoint import checkpoint_output
from secateur.runs.conveyor import Conveyor
from secateur.runs.events import Clock, Event
from secateur.runs.options import taking
from secateur.runs.output import check_output
from secateur.runs.transaction import Transaction


@taking(BlockSettings)
def reconstruct(settings: BlockSettings) -> Manifest:
    """The manifest of a pruned checkpoint whose kept weights were tuned block by block, written to `output`.

    `pruned` is a checkpoint that `prune` wrote, `dense` the model that it was made from (by default where the manifest
    says). `samples` (128) windows of `length` (2048) tokens are drawn as in `prune`; at least the share `held_out` of
    them is never trained on, and judges after each of at most `epochs` epochs whether a block got better. With
    `minutes` a block is tuned for its share of the time at most, and its learning rate falls with the clock. Each step
    of Adam sees `step` samples; `learning_rate` is relative to the root mean square of each parameter's kept weights.
    `targets` says what a block should give: the dense block's outputs after the dense blocks before it ("dense"), or
    what it gives on the inputs that the tuned blocks leave it ("pruned"). `only` and `skip` choose among the pruned
    matrices. At most `batch_size` samples run through a block at once, which changes no result but for rounding.

    Every zero stays zero, and no other weight becomes one. Tensors that were not tuned are byte-identical. A block
    that cannot be made better on the held-out samples stays as it is. The manifest is that of the pruning with a
    section `recovery`. `on_block` gets the record of each block when it is done.

    Raises `CalibrationError`, `PatternError`, `ModelStructureError`, `NumericalError` or `CheckpointError`, each of
    which says what to do.
    """
    started = time.perf_counter()
    require_one_process()
    folder, on_event = locate(os.fspath(settings.pruned)), settings.on_event
    base = read_manifest(folder)
    target = check_output(settings.output, folder, settings.overwrite)
    assert target is not None
    with Transaction(target, settings.overwrite) as transaction, ExitStack() as stack:
        opened = _open(folder, settings)
        skeleton = opened.skeleton
        original = DenseSource(folder, base, settings.dense)
        check_output(settings.output, original.path, settings.overwrite)
        original.check(skeleton)
        matrices = _matrices(skeleton, base, settings)
        dtype = str(skeleton.dtype).removeprefix("torch.")
        clock = Clock(synchronise=skeleton.device.type == "cuda")
        began = time.perf_counter()
        on_event(Event("calibrate"))
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
        )
        clock.add("calibrate", began)
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
                "device": str(skeleton.device),
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
        written = stack.enter_context(checkpoint_output(transaction, opened))
        BlockPass(
            settings,
            conveyor=Conveyor(skeleton, written, clock, on_event),
            original=original,
            matrices=matrices,
            split=split,
            started=started,
            states=transaction.place(unique(f"{target.name}.states")),
            manifest=manifest,
        ).run()
        share = split.trained / windows.samples
        recovery["forwards"] = sum(forwards(block["epochs"], share) for block in recovery["blocks"]) / len(
            recovery["blocks"]
        )
        recovery["seconds"] = clock.seconds | {"total": time.perf_counter() - started}
        written.seal(manifest)
        written.publish(manifest)
    on_event(Event("done"))
    return manifest


def _open(folder: Path, settings: BlockSettings) -> OpenedModel:
    """The pruned checkpoint, to compute in a dtype in which gradients do not underflow."""
    how: dict[str, Any] = {"device": settings.device, "trust_remote_code": settings.trust_remote_code}
    opened = open_model(folder, dtype=settings.dtype, **how)
    if opened.skeleton.dtype != torch.float16:
        return opened
    if settings.dtype != "auto":
        raise CalibrationError(f"--dtype {settings.dtype}: too narrow for gradients. Use bfloat16, float32 or auto.")
    return open_model(folder, dtype="float32", **how)


def _matrices(skeleton: Skeleton, manifest: Manifest, settings: BlockSettings) -> dict[int, list[Matrix]]:
    """The pruned matrices that the globs leave, by block."""
    shapes = {matrix.name: matrix.shape for matrix in skeleton.matrices}
    plan = Plan.from_json(manifest.plan)
    plan.check(shapes)
    chosen = set(matching({name: shapes[name] for name in plan}, only=settings.only, skip=settings.skip))
    return by_block(matrix for matrix in skeleton.matrices if matrix.name in chosen)


def forwards(epochs: float, trained: float) -> float:
    """The work of one block in forwards of all samples, when `trained` is the share of them that is trained on.

    One for the targets, one for the next block's inputs, three for each epoch's forward and backward on what is trained
    on, and one forward of the rest before the first epoch and after each.
    """
    return 2 + 3 * epochs * trained + (math.ceil(epochs) + 1) * (1 - trained)
