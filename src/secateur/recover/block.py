"""`reconstruct`: block by block, the kept weights of a pruned checkpoint tuned to give what the dense model gives.

For each block: run the calibration samples through the dense one to get targets, tune the kept weights of the pruned
one, write it, and run the samples through it as it was written to make the next block's inputs. No more than one block
is held at a time, whatever the model's size.
"""

import datetime
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration import Windows
from secateur.collect.model_windows import model_windows
from secateur.collect.settings import CalibrationSettings
from secateur.errors import CalibrationError
from secateur.files.folders import locate
from secateur.files.names import unique
from secateur.models.flow.stream import default_batch_size
from secateur.models.opening.opened import OpenedModel, open_model
from secateur.models.shape.matrices import Matrix, by_block
from secateur.models.shape.skeleton import Skeleton
from secateur.plans.plan import Plan, matching
from secateur.record.manifest import Manifest, read_manifest
from secateur.record.versions import run_versions
from secateur.recover.block_pass import BlockPass, OnBlock
from secateur.recover.block_tuning import Tuning
from secateur.recover.dense_source import DenseSource
from secateur.recover.settings import require_one_process
from secateur.runs.checkpoint import checkpoint_output
from secateur.runs.conveyor import Conveyor
from secateur.runs.events import Clock, Event, OnEvent
from secateur.runs.output import check_output
from secateur.runs.transaction import Transaction


def reconstruct(
    pruned: str | os.PathLike[str],
    dense: str | os.PathLike[str] | None = None,
    *,
    calibration: str | Sequence[str] | Tensor | Windows = "c4",
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    sampling: str | None = None,
    bos: str = "auto",
    epochs: int = 10,
    minutes: float | None = None,
    learning_rate: float = 0.03,
    step: int = 4,
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
    only, skip = ([globs] if isinstance(globs, str) else globs for globs in (only, skip))
    check_numbers(epochs, minutes, learning_rate, step, held_out, patience, targets, batch_size)
    folder = locate(os.fspath(pruned))
    base = read_manifest(folder)
    target = check_output(output, folder, overwrite)
    assert target is not None
    with Transaction(target, overwrite) as transaction, ExitStack() as stack:
        opened = _open(folder, device, dtype, trust_remote_code)
        skeleton = opened.skeleton
        original = DenseSource(folder, base, dense)
        check_output(output, original.path, overwrite)
        original.check(skeleton)
        matrices = _matrices(skeleton, base, only, skip)
        clock = Clock(synchronise=skeleton.device.type == "cuda")
        began = time.perf_counter()
        on_event(Event("calibrate"))
        windows = model_windows(
            opened,
            CalibrationSettings(
                calibration=calibration,
                tokenizer=tokenizer,
                samples=samples,
                length=length,
                seed=seed,
                sampling=sampling,  # type: ignore[arg-type]  # checked there
                bos=bos,  # type: ignore[arg-type]
            ),
            dense=lambda: open_model(
                original.path,
                device=str(skeleton.device),
                dtype=str(skeleton.dtype).removeprefix("torch."),
                revision=base.source.get("revision") if dense is None else None,
                trust_remote_code=trust_remote_code,
            ),
            progress=lambda done, total: on_event(Event("calibrate", done=done, total=total)),
        )
        clock.add("calibrate", began)
        split = Split.of(windows, held_out, step, batch_size or default_batch_size(windows.length, skeleton.device))
        tuning = Tuning(split.steps, split.held_batches, epochs, learning_rate, patience, seed)
        manifest = replace(base, matrices={name: dict(entry) for name, entry in base.matrices.items()})
        recovery: dict[str, Any] = {
            "method": "block",
            "settings": {
                "targets": targets,
                "epochs": epochs,
                "minutes": minutes,
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
            "base": {"path": str(folder.resolve()), "digest": base.digest},
            "dense": original.path,
            "versions": run_versions(),
            "command": list(command) if command is not None else None,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "blocks": [],
            "trained": {},  # sha256 of each changed tensor as it was, and of each tuned matrix's mask, for `verify`
            "masks": {},
            "earlier": base.recovery,
        }
        manifest.recovery = recovery
        written = stack.enter_context(checkpoint_output(transaction, opened))
        BlockPass(
            conveyor=Conveyor(skeleton, written, clock, on_event),
            original=original,
            matrices=matrices,
            batches=split.batches,
            tuning=tuning,
            started=started,
            minutes=minutes,
            targets=targets,
            offload=offload_states,
            states_place=transaction.place(unique(f"{target.name}.states")),
            manifest=manifest,
            on_block=on_block,
        ).run()
        recovery["forwards"] = _forwards(recovery["blocks"], split, windows.samples)
        recovery["seconds"] = clock.seconds | {"total": time.perf_counter() - started}
        written.seal(manifest)
        written.publish(manifest)
    on_event(Event("done"))
    return manifest


def check_numbers(
    epochs: int,
    minutes: float | None,
    learning_rate: float,
    step: int,
    held_out: float,
    patience: int,
    targets: str,
    batch_size: int | None,
) -> None:
    """Raise `CalibrationError` for a setting that makes no sense."""
    for option, count in (("epochs", epochs), ("batch-size", step), ("patience", patience), ("batch-size", batch_size)):
        if count is not None and count < 1:
            raise CalibrationError(f"--{option}: got {count}, expected at least 1.")
    if minutes is not None and not (minutes > 0 and math.isfinite(minutes)):
        raise CalibrationError(f"--minutes: got {minutes}, expected a positive number.")
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise CalibrationError(f"--lr: got {learning_rate}, expected a positive number.")
    if not 0 < held_out < 1:
        raise CalibrationError(f"--held-out: got {held_out}, expected a share between 0 and 1, such as 0.125.")
    if targets not in ("dense", "pruned"):
        raise CalibrationError(f'--targets: got "{targets}", expected dense or pruned.')


@dataclass(frozen=True)
class Split:
    """Which samples are trained on, in steps of whole batches; the rest, which come last, is held out."""

    batches: Sequence[Tensor]  # of token ids, in all
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
        batches: list[Tensor] = []
        ranges = []
        trained = most // step * step
        for first, last in [*((first, first + step) for first in range(0, trained, step)), (trained, None)]:
            own = windows.part(first, last).batches(size)
            ranges.append(range(len(batches), len(batches) + len(own)))
            batches += own
        return cls(batches, ranges[:-1], ranges[-1], trained, step, size)


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
    return by_block(matrix for matrix in skeleton.matrices if matrix.name in chosen)


def forwards(epochs: float, trained: float) -> float:
    """The work of one block in forwards of all samples, when `trained` is the share of them that is trained on.

    One for the targets, one for the next block's inputs, three for each epoch's forward and backward on what is trained
    on, and one forward of the rest before the first epoch and after each.
    """
    return 2 + 3 * epochs * trained + (math.ceil(epochs) + 1) * (1 - trained)


def _forwards(blocks: Sequence[Mapping[str, Any]], split: Split, samples: int) -> float:
    """The mean over the tuned blocks of what was done."""
    return sum(forwards(block["epochs"], split.trained / samples) for block in blocks) / len(blocks)
