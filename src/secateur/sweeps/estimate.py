"""What a sweep would run and cost, before it starts."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.collect.model_windows import Foreseen
from secateur.core.choices import Granularity, Scope
from secateur.core.gram import Gram
from secateur.core.patterns import Pattern
from secateur.core.problem import Method
from secateur.errors import SecateurError
from secateur.models.opening.opened import OpenedModel
from secateur.pruning.forecast import Estimate, estimate
from secateur.pruning.forecast_time import forward_seconds, writing_note, writing_seconds
from secateur.pruning.preparation import prepared
from secateur.pruning.settings import PruneSettings
from secateur.sweeps.folder import Cell

if TYPE_CHECKING:
    from secateur.sweeps.loop import SweepLoop


@dataclass(frozen=True)
class Task:
    """A cell to run, with the objects that its names stand for."""

    cell: Cell
    method: Method
    pattern: Pattern


@dataclass(frozen=True)
class CellEstimate:
    """What one cell would take. `refusal` says why it cannot be run at all; it will be recorded as failed."""

    cell: Cell
    seconds: float
    prune: bool  # rather than only evaluate a checkpoint that is there
    refusal: str | None = None
    host_bytes: int = 0  # at the peak of its pruning


@dataclass(frozen=True)
class SweepEstimate:
    """The dry run of a sweep. Bytes are totals at the peak; seconds are rough."""

    folder: Path
    cells: list[CellEstimate]
    finished: int
    shared_seconds: float  # of the dense evaluation, the gradients, and calibration text that the model writes
    disk_bytes: int
    free_disk_bytes: int
    host_bytes: int
    available_host_bytes: int
    notes: list[str]

    @property
    def seconds(self) -> float:
        """Seconds of everything that is still to be done."""
        return self.shared_seconds + sum(cell.seconds for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        """All fields, with the total of seconds."""
        cells = [
            {"method": own.cell.method, "pattern": own.cell.pattern, **vars(own), "cell": own.cell.folder}
            for own in self.cells
        ]
        return {**vars(self), "folder": str(self.folder), "cells": cells, "seconds": self.seconds}


def shared_gradient(method: Method, propagate: str) -> tuple[Granularity, Scope] | None:
    """The kind of a method's gradients where it can share them with others, as those of the dense model.

    Gradients of block outputs are taken on the outputs of pruned blocks, unless ``propagate="dense"``.
    """
    kind = method.gradient
    if kind is None or (kind.scope == "block" and propagate == "pruned"):
        return None
    return kind.granularity, kind.scope


def refusal(task: Task, options: Mapping[str, Any]) -> SecateurError | None:
    """The error that `prune` would raise for a task before it starts."""
    try:
        with prepared(PruneSettings(method=task.method, pattern=task.pattern, **options), dry=True):
            pass
    except SecateurError as error:
        return error
    return None


def estimate_sweep(loop: "SweepLoop", opened: OpenedModel, options: Mapping[str, Any], seen: Foreseen) -> SweepEstimate:
    """The estimate of the tasks of a loop that are still to be done.

    `options` are those of `forecast.estimate`, and `seen` is what is known of the calibration text. Raises the error of
    the first task when none can be run.
    """
    tasks = loop.pending
    pruned = [task.cell for task in tasks if loop.pruned(task.cell)]
    refusals = {task.cell.folder: None if task.cell in pruned else refusal(task, options) for task in tasks}
    errors = [error for error in refusals.values() if error is not None]
    if tasks and len(errors) == len(tasks):
        raise errors[0]
    tokens = {data: windows.tokens for data, windows in loop.texts.items()}
    dense_tokens = sum(count for data, count in tokens.items() if data not in loop.dense)
    # Agreement runs the dense model beside the pruned one.
    passes = 3 if loop.settings["agreement"] else 1
    # Beside the one at hand.
    kept = {"none": 0, "best": len({task.cell.pattern for task in loop.tasks}), "all": len(tasks) - 1}
    token_seconds = forward_seconds(opened.skeleton, 10**6) / 10**6 if tasks or dense_tokens else 0.0
    alone: dict[tuple[str, bool], Estimate] = {}  # by label, and whether the statistics are there already
    shared: dict[tuple[int, Granularity, Scope], tuple[float, int]] = {}
    of_kind: dict[tuple[Granularity, Scope], tuple[float, int]] = {}  # whatever the draw
    cells, statistics = [], dict[int, int]()  # bytes, by draw
    for task in tasks:
        error, label, memory = refusals[task.cell.folder], task.cell.method, 0
        seconds = token_seconds * passes * sum(tokens[data] for data in loop.lacking(task.cell))
        if error is None and task.cell not in pruned:
            kind = shared_gradient(task.method, options["propagate"])
            seed = loop.seed_of(task)
            reused = options["propagate"] == "dense" and seed in statistics
            if (label, reused) not in alone:
                method = replace(task.method, needs=task.method.inputs) if kind is not None else task.method
                method = replace(method, needs=method.needs - method.inputs) if reused else method
                alone[label, reused] = estimate(method=method, pattern=task.pattern, **options)
            own = alone[label, reused]
            seconds += own.seconds
            memory = own.host_bytes
            if kind is not None and kind not in of_kind:
                both = estimate(method=task.method, pattern=task.pattern, **options)
                of_kind[kind] = (max(0.0, both.seconds - own.seconds), both.disk_bytes - own.disk_bytes)
            if kind is not None:
                shared[seed, *kind] = of_kind[kind]
            if options["propagate"] == "dense" and task.method.inputs:
                grams = sum(4 * matrix.shape[1] ** 2 for matrix in opened.skeleton.matrices)
                statistics[seed] = max(statistics.get(seed, 1), grams if Gram in task.method.needs else 1)
        elif error is not None:
            seconds = 0.0
        cells.append(CellEstimate(task.cell, seconds, task.cell not in pruned, str(error) if error else None, memory))
    checkpoint = max((own.disk_bytes for own in alone.values()), default=0)
    together = sum(size for _, size in shared.values()) + sum(statistics.values())
    disk = (1 + kept[loop.settings["keep"]]) * checkpoint + together
    folder = loop.folder.path
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    writing = writing_seconds(opened.skeleton, seen) if seen.to_write else 0.0
    notes = [writing_note(opened.skeleton, seen, writing)] if writing else []
    notes += [
        *seen.unchecked,
        *(f"{own.cell.name} will fail: {own.refusal}" for own in cells if own.refusal is not None),
    ]
    if disk > free:
        notes.append("This needs more disk than is free now: use --keep none, or another folder.")
    notes += dict.fromkeys(note for own in alone.values() for note in own.notes if "Gram" not in note)
    asked = [loop.unanswered(task.cell) for task in tasks if refusals[task.cell.folder] is None]
    if names := dict.fromkeys(chain.from_iterable(asked)):
        count = sum(map(bool, asked)) + bool(names.keys() - loop.known_answers.keys())
        notes.append(
            f"The time is without tasks ({', '.join(names)}), which {count} models answer: how long that takes depends "
            "on questions that are not loaded yet."
        )
    some = next(iter(alone.values()), None)
    if loop.asked.ray is not False:
        notes.append("On Ray, each further cell that runs at once takes as much memory, and the disk of a checkpoint.")
    return SweepEstimate(
        folder=folder,
        cells=cells,
        finished=len(loop.tasks) - len(tasks),
        shared_seconds=writing + token_seconds * dense_tokens + sum(seconds for seconds, _ in shared.values()),
        disk_bytes=disk,
        free_disk_bytes=free,
        host_bytes=max((own.host_bytes for own in alone.values()), default=0),
        available_host_bytes=some.available_host_bytes if some is not None else 0,
        notes=notes,
    )
