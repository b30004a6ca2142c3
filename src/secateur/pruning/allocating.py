"""`allocate`: a plan that divides the zeros of one pattern among the matrices, and is better than the uniform one."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.windows import Windows, check_predictions
from secateur.collect.exempt import Exempt
from secateur.collect.held_out import held_out_losses
from secateur.collect.measures import Measuring
from secateur.collect.model_windows import model_windows
from secateur.collect.settings import ModelSettings
from secateur.core.needs import OutputGradients
from secateur.errors import CalibrationError, CheckpointError, PatternError
from secateur.files.cache import keep_json
from secateur.models.flow.stream import default_batch_size, states_folder
from secateur.models.opening.opened import OpenedModel, choose_device, open_model
from secateur.plans import ALLOCATIONS
from secateur.plans.allocated import Allocated
from secateur.plans.budget import counted, on_budget
from secateur.plans.plan import Plan
from secateur.plans.uniform import uniform
from secateur.pruning.named import allocation_of, as_pattern
from secateur.pruning.settings import AllocateSettings, PruneSettings
from secateur.runs.events import PLACING, Progress
from secateur.runs.options import shared, taking
from secateur.runs.output import check_writable, resolved

SHARE = 8  # of so many calibration windows one is held out


@taking(AllocateSettings)
def allocate(settings: AllocateSettings) -> Allocated:
    """The plan of an allocation, which is written to `output` for `prune(plan=...)`.

    `allocation` is "owl", "dlp", "alpha" or "sensitivity", with its options in `allocation_option`; the plan removes as
    many weights as the uniform plan of `sparsity` or `pattern`. `unit` is what has one sparsity: a "block", a "matrix",
    or all matrices of a "kind".

    One of eight calibration windows is held out: measures are taken on the others, and the plan is used where it beats
    the uniform one there. Nothing is pruned, and the memory is that of one block; "sensitivity" takes about four
    forwards of all windows, the others one.

    Raises what `prune` raises.
    """
    if settings.allocation == "uniform":
        raise PatternError(f"--allocation: nothing to make; choose {', '.join(list(ALLOCATIONS)[:-1])} or sensitivity.")
    target = resolved(settings.output)
    if target.exists() and not settings.overwrite:
        raise CheckpointError(f"{settings.output}: exists already. Choose another name, or pass --overwrite.")
    if target.is_dir():
        raise CheckpointError(f"{settings.output}: is a folder; a plan is one file. Choose a name such as plan.json.")
    check_writable(settings.output)
    pattern = as_pattern(settings.pattern, settings.sparsity, settings.per)
    check_divisible(settings, pattern)
    opened = open_model(**shared(settings, ModelSettings))
    try:
        shapes = {matrix.name: matrix.shape for matrix in opened.skeleton.matrices}
        plan = uniform(shapes, pattern, only=settings.only, skip=settings.skip)
        windows = model_windows(
            opened, settings, progress=partial(settings.tell, "draw"), placing=partial(settings.tell, PLACING)
        )
        found = allocated(opened, windows, settings, plan, progress=settings.tell)
    finally:
        opened.restore()
    keep_json(target, found.to_json(), "the plan", indent=1)
    return found


def check_divisible(settings: AllocateSettings | PruneSettings, pattern: object) -> None:
    """Raise `PatternError` for what no allocation can divide, or for options of none."""
    if settings.allocation == "uniform":
        if settings.unit is not None or settings.allocation_option:
            option = "--unit" if settings.unit is not None else "--allocation-option"
            raise PatternError(f"{option}: is for an allocation, and --allocation is uniform.")
        return
    allocation_of(settings.allocation, settings.allocation_option)
    if isinstance(pattern, Mapping):
        raise PatternError(
            f"--allocation {settings.allocation}: divides the zeros of one pattern, and a pattern for each glob, or a "
            "whole plan, was given. Give one, such as --sparsity 0.6."
        )


def allocated(
    opened: OpenedModel,
    windows: Windows,
    settings: AllocateSettings | PruneSettings,
    even: Plan,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> Allocated:
    """The plan of the allocation that settings ask for, for an opened model, its windows and its uniform plan."""
    allocation = allocation_of(settings.allocation, settings.allocation_option)
    unit = settings.unit or allocation.unit
    held_out = max(1, windows.samples // SHARE)
    if windows.samples < 2:
        raise CalibrationError(
            f"--allocation {allocation.name}: got {windows.samples} calibration sample, expected at least 2: one is "
            "held out to judge the plan. Use more --samples."
        )
    check_predictions(windows)
    shapes = {matrix.name: matrix.shape for matrix in opened.skeleton.matrices}
    for name in even:
        counted(name, even[name], shapes[name])
    kept = settings.statistics_device
    size = settings.batch_size or default_batch_size(windows.length, opened.skeleton.device)
    # Memory: a pass back through the model keeps what goes into every block.
    saved = len(opened.skeleton.blocks) if OutputGradients in allocation.needs else 1
    needed = saved * windows.samples * windows.length * opened.skeleton.hidden_size * opened.skeleton.dtype.itemsize
    folder = states_folder(settings.offload_states, needed, Path.cwd())
    measuring = Measuring(
        opened,
        allocation,
        unit,
        even,
        exempt=Exempt(settings.on_nonfinite, settings.unseen),
        statistics_device=None if kept is None else choose_device(kept, "--statistics-device"),
        states_folder=folder,
        progress=progress,
    )
    units = measuring.run(windows.part(0, windows.samples - held_out), settings.batch_size, settings.seed)
    bounds = allocation.bounds(units.found.pattern)
    wanted = allocation.divide(units.found)
    by_name = {name: float(wanted[row]) for row, members in enumerate(units.members) for name in members}
    plan = on_budget(even, shapes, by_name, bounds)
    last = windows.part(windows.samples - held_out, None)
    losses = held_out_losses(
        opened, last.batches(size), [even, plan], measuring.norms, states_folder=folder, progress=progress
    )
    judged = compared(*losses)
    record = {
        "name": allocation.name,
        "unit": unit,
        "options": dict(allocation.options),
        "bounds": list(bounds),
        "tokens": windows.digest,
        "held_out": judged,
    }
    used = judged["difference"] < 0
    return Allocated(plan if used else even, record | {"used": used, **extremes(plan)})


def compared(even: torch.Tensor, plan: torch.Tensor) -> dict[str, Any]:
    """What held-out windows say of a plan beside the uniform one, in nats per token, paired by window."""
    difference = plan - even
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else None
    return {
        "windows": len(difference),
        "uniform": float(even.mean()),
        "plan": float(plan.mean()),
        "difference": float(difference.mean()),
        "error": error,
    }


def extremes(plan: Plan) -> dict[str, Any]:
    """The matrices with the lowest and the highest sparsity."""
    ordered = sorted(plan, key=lambda name: plan[name].sparsity)
    return {
        "lowest": [ordered[0], plan[ordered[0]].sparsity],
        "highest": [ordered[-1], plan[ordered[-1]].sparsity],
    }
