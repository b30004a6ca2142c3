"""The one loop over the cells of a sweep: has each run, records it, and drops what is not to be kept."""

import math
import time
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from secateur.calibration.windows import Windows
from secateur.collect.evidence import RunEvidence
from secateur.collect.gradient_file import GradientFile
from secateur.collect.gradient_pass import gradients
from secateur.collect.model_windows import Foreseen, foreseen_windows, is_text, model_evaluation_windows, model_windows
from secateur.collect.settings import (
    BatchSettings,
    CalibrationSettings,
    ExemptSettings,
    ModelSettings,
    SelectionSettings,
)
from secateur.collect.survey import Survey
from secateur.core.choices import Granularity, Norm, Scope
from secateur.core.statistics import Statistic
from secateur.errors import CheckpointError, SecateurError
from secateur.models.flow.stream import default_batch_size
from secateur.models.opening.opened import OpenedModel
from secateur.runs.events import PLACING
from secateur.runs.journal import AnotherRunError
from secateur.runs.options import shared
from secateur.sweeps.answers import dense_rows, tasks_csv
from secateur.sweeps.cells import CellRunner, SweepEvent
from secateur.sweeps.estimate import CellEstimate, SweepEstimate, Task, estimate_sweep, shared_gradient
from secateur.sweeps.folder import Cell, Sweep, check_settings, draw_suffix
from secateur.sweeps.on_ray import cells_on_ray
from secateur.sweeps.table import latex, markdown, table_csv


@dataclass(kw_only=True)
class SweepLoop(CellRunner):
    """One run of a sweep: what it was asked for, what is known so far, and what the cells share."""

    tasks: list[Task]
    drawing: CalibrationSettings  # how calibration windows are drawn
    outdated: set[str] = field(default_factory=set)  # folders of cells with a checkpoint of another method
    cells: dict[str, Cell] = field(default_factory=dict)  # by folder; also those that were not asked for this time
    known_answers: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # the dense model's
    left_out: list[Cell] = field(default_factory=list)  # cells of methods that are asked for no more, without figures
    estimates: dict[str, CellEstimate] = field(default_factory=dict)  # by cell folder
    unfinished: set[str] = field(default_factory=set)  # folders of cells that this run has still to finish
    position: tuple[int, int] = (0, 0)  # cells finished, cells in all

    @property
    def sweep(self) -> Sweep:
        """All that is known."""
        dense = {data: self.dense[data] for data in self.settings["data"] if data in self.dense}
        cells, asked = list(self.cells.values()), self.settings["tasks"]
        rows = {name: dense_rows(self.dense_answers[name]) for name in asked if name in self.dense_answers}
        return Sweep(self.folder.path, self.settings["model"], dense, self.settings, cells, self.known_answers | rows)

    def join(self, known: Sweep | None) -> None:
        """Go on from what is on the disk. Raises `CheckpointError` when that was made with other settings."""
        if known is not None:
            finished = {cell.method for cell in known.cells if cell.figures or cell.tasks} - set(self.asked.again)
            check_settings(self.folder.path, known.settings, self.settings, finished)
            held = known.settings["methods"]
            changed = {key for key, own in self.settings["methods"].items() if held.get(key) != own}
            changed |= set(self.asked.again)
            for key in ("methods", "digests", "bos_choices"):
                self.settings[key] = {**known.settings.get(key, {}), **self.settings[key]}
            self.settings["data"] = list(dict.fromkeys([*known.data, *self.settings["data"]]))
            self.settings["tasks"] = list(dict.fromkeys([*known.settings.get("tasks", ()), *self.settings["tasks"]]))
            self.settings["agreement"] = self.settings["agreement"] or known.settings["agreement"]
            self.known_answers = dict(known.dense_tasks)
            self.dense = {data: dict(figures) for data, figures in known.dense.items()}
            self.cells = {cell.folder: cell for cell in known.cells}
            for cell in known.cells:
                if cell.method in changed:
                    self.outdated.add(cell.folder)
                    self.cells[cell.folder] = cell.fresh()
            self._leave_out({task.cell.method for task in self.tasks})
        for task in self.tasks:
            held = self.cells.setdefault(task.cell.folder, task.cell)
            self.cells[held.folder] = replace(held, seed=task.cell.seed)
        self.tasks = [replace(task, cell=self.cells[task.cell.folder]) for task in self.tasks]
        self.source_tensors = self.folder.source_tensors(list(self.cells.values()))

    def _leave_out(self, methods: set[str]) -> None:
        """Of methods that are asked for no more, only what is finished stays in the tables."""
        for cell in [cell for cell in self.cells.values() if cell.method not in methods and cell.status != "done"]:
            if cell.figures or cell.tasks:
                self.cells[cell.folder] = replace(cell, status="done", error=None)
            else:
                self.left_out.append(self.cells.pop(cell.folder))

    @property
    def pending(self) -> list[Task]:
        """The tasks that are not finished, first those whose checkpoint is there."""
        cells = {task.cell.folder: self.cells[task.cell.folder] for task in self.tasks}
        unfinished = {folder for folder, cell in cells.items() if self.lacking(cell) or self.unanswered(cell)}
        tasks = [task for task in self.tasks if task.cell.folder in unfinished]
        return sorted(tasks, key=lambda task: not self.pruned(task.cell))

    def pruned(self, cell: Cell) -> bool:
        """Whether the checkpoint of a cell is there."""
        return cell.folder not in self.outdated and self.folder.checkpoint(cell).exists()

    def cut_texts(self, opened: OpenedModel, *, decide: bool) -> None:
        """Cut the windows of every data set that is needed. Raises what `perplexity` would, before any work.

        With `decide`, the model decides about BOS before every window where that was left to it.
        """
        for data in self.settings["data"]:
            if data in self.dense and not any(data in self.lacking(task.cell) for task in self.pending):
                continue
            bos = self.settings["bos"]
            held = self.asked.data[data] if isinstance(self.asked.data, Mapping) and data in self.asked.data else data
            windows = model_evaluation_windows(
                opened,
                held,
                self.drawing.tokenizer,
                length=self.settings["eval_length"] if is_text(held) else None,
                windows=self.settings["windows"],
                bos=bos if decide or bos != "auto" else "papers",
                known=self.settings["bos_choices"].get(f"data set {data}"),
                option="--eval-length",
            )
            if decide:
                self._note(f"data set {data}", windows)
            self.texts[data] = windows

    def draw_calibration(self, opened: OpenedModel) -> None:
        """Draw the calibration tokens, each time that a cell which has not been pruned yet needs."""
        for seed in dict.fromkeys(self.seed_of(task) for task in self._to_prune() if task.method.needs):
            windows = model_windows(
                opened,
                replace(self.drawing, seed=seed),
                known=self.settings["bos_choices"].get("calibration"),
                progress=partial(self._stage, None, "calibration"),
                placing=partial(self._stage, None, PLACING),
            )
            self._note("calibration" + (f", seed {seed}" if self._suffix(seed) else ""), windows, "calibration")
            self.calibrations[seed] = windows
        if not self.calibrations:
            return
        skeleton, length = opened.skeleton, next(iter(self.calibrations.values())).length
        for task in (task for task in self.tasks if task.method.needs):
            # That with which `prune` would run the method by itself, so that sharing changes no bit; what it would
            # refuse, it will refuse.
            with suppress(SecateurError):
                own = self.asked.batch_size or RunEvidence(task.method.needs).batch_size(skeleton, length, None)
                self.batch_sizes[task.cell.method] = own or default_batch_size(length, skeleton.device)

    def _suffix(self, seed: int) -> str:
        return draw_suffix(seed, self.settings["seed"])

    def _note(self, what: str, windows: Windows, text: str | None = None) -> None:
        """Record the tokens, and the choice about BOS that all draws of a `text` share."""
        if "bos" in windows.provenance:
            self.settings["bos_choices"].setdefault(text or what, windows.provenance["bos"])
        held = self.settings["digests"].setdefault(what, windows.digest)
        if windows.digest != held:
            raise CheckpointError(
                f"{self.folder.path}: the tokens of the {what} have changed since this sweep was started (digest "
                f"{windows.digest[:12]}, expected {held[:12]}). Bring the old text back, or choose another folder."
            )

    def estimate(self, opened: OpenedModel) -> SweepEstimate:
        """What is left to do, and what it would take. Raises what `draw_calibration` would, as far as that shows."""
        seen = Foreseen(None, self.settings["samples"], self.settings["length"], ())
        if any(task.method.needs for task in self._to_prune()):
            seen = foreseen_windows(opened, self.drawing)
        text = {"calibration": seen.windows, "samples": seen.samples, "length": seen.length}
        estimate = estimate_sweep(self, opened, {**self.options, **text, "model": opened}, seen)
        self.estimates = {own.cell.folder: own for own in estimate.cells}
        return estimate

    def run(self) -> None:
        """Evaluate the dense model, run every pending cell, and write the tables."""
        for cell in self.left_out:
            self.folder.drop_checkpoint(cell)
        for folder in self.outdated:
            self.folder.drop_checkpoint(self.cells[folder])
            self.folder.write_cell(self.cells[folder])
        self.outdated.clear()
        self._drop_unneeded()
        self.folder.write_sweep(self.sweep)
        for data in self.texts:
            if data not in self.dense:
                self.dense[data] = self._perplexity(self.asked.model, data, None)
                self.folder.write_sweep(self.sweep)
                self.tell(SweepEvent("dense", stage=data))
        asked = dict.fromkeys(name for task in self.pending for name in self.unanswered(task.cell))
        if asked:
            for name, found in self.answers(self.asked.model, list(asked), None):
                self.dense_answers[name] = found
                self.folder.write_sweep(self.sweep)
                self.tell(SweepEvent("dense", stage=name))
        self._take_gradients()
        self._share_statistics()
        pending = self.pending
        self.unfinished = {task.cell.folder for task in pending}
        self.position = (0, len(pending))
        began = time.perf_counter()
        with closing(self._run(pending)) as finished:
            for cell in finished:
                self.cells[cell.folder] = cell
                self.unfinished.discard(cell.folder)
                self._drop_unneeded()
                self._write()
                seconds = {task.cell.folder: self.estimates[task.cell.folder].seconds for task in pending}
                left = sum(value for folder, value in seconds.items() if folder in self.unfinished)
                done = sum(seconds.values()) - left
                left_by_pace = left * (time.perf_counter() - began) / done if done else None
                self.position = (len(pending) - len(self.unfinished), len(pending))
                self.tell(SweepEvent("cell", cell, seconds_left=left_by_pace))
        self._write()

    def _run(self, tasks: list[Task]) -> Generator[Cell, None, None]:
        """The cells of these tasks, each when it is finished: one after the other, or as Ray runs them."""
        if self.asked.ray is False:
            return (self.run_cell(task) for task in tasks)
        return cells_on_ray(self, tasks)

    def _write(self) -> None:
        self.folder.write_sweep(self.sweep)
        self.folder.write("table.md", markdown(self.sweep))
        self.folder.write("table.csv", table_csv(self.sweep))
        if self.settings["tasks"]:
            self.folder.write("tasks.csv", tasks_csv(self.sweep))
        if self.asked.latex:
            self.folder.write("table.tex", latex(self.sweep))

    def close(self) -> None:
        """Remove the statistics that the cells shared."""
        for statistics in self.statistics.values():
            statistics.close()

    def _to_prune(self) -> list[Task]:
        return [task for task in self.pending if not self.pruned(task.cell)]

    def _take_gradients(self) -> None:
        """One pass over the dense model for each kind of gradients that cells share; cells record its failure."""
        norms: dict[tuple[int, Granularity, Scope], set[Norm]] = {}
        for task in self._to_prune():
            kind = shared_gradient(task.method, self.asked.propagate)
            if kind is not None and task.method.gradient is not None:
                norms.setdefault((self.seed_of(task), *kind), set()).add(task.method.gradient.norm)
        for key, wanted in norms.items():
            try:
                self.gradients[key] = self._gradient_file(*key, wanted)
            except SecateurError as error:
                self.gradients[key] = error

    def _gradient_file(self, seed: int, granularity: Granularity, scope: Scope, norms: set[Norm]) -> Path:
        calibration = self.calibrations[seed]
        path = self.folder.path / f"gradients-{granularity}-{scope}{self._suffix(seed)}.safetensors"
        if path.exists():
            file = GradientFile(path)
            file.check_tokens(calibration.digest, calibration.samples, calibration.length)
            held = set(file.provenance["norms"])
            if norms <= held:
                return path
            norms = norms | held
        take = partial(
            gradients,
            **shared(self.asked, ExemptSettings, BatchSettings, ModelSettings, SelectionSettings),
            output=path,
            norms=sorted(norms),
            granularity=granularity,
            scope=scope,
            calibration=calibration,
            overwrite=True,
            progress=partial(self._stage, None, prefix="gradients: "),
        )
        try:
            take(resume=True)
        except AnotherRunError:  # the cells of this call need others
            take()
        return path

    def _share_statistics(self) -> None:
        """With the dense model's inputs, share one pass among all cells that run with the same batch size."""
        if self.asked.propagate != "dense":
            return
        groups: dict[tuple[int, int | None], list[frozenset[type[Statistic]]]] = {}
        for task in self._to_prune():
            if task.method.inputs:
                groups.setdefault(self.sharing(task), []).append(task.method.inputs)
        for (seed, size), needs in groups.items():
            if len(needs) > 1:
                folder = self.folder.path / f"statistics-{size}{self._suffix(seed)}.partial"
                self.statistics[seed, size] = Survey(folder, frozenset().union(*needs))

    def _drop_unneeded(self) -> None:
        """Remove every checkpoint that is neither kept nor waiting for its evaluation."""
        if self.settings["keep"] == "all":
            return
        pending = {task.cell.folder for task in self.tasks if self.cells[task.cell.folder].status == "pending"}
        needed = pending | self.unfinished
        if self.settings["keep"] == "best":
            first = self.settings["data"][0]
            found = [cell for cell in self.cells.values() if cell.status == "done" and first in cell.figures]
            for pattern in {cell.pattern for cell in found}:
                rivals = [cell for cell in found if cell.pattern == pattern]
                needed.add(min(rivals, key=lambda cell: cell.figures[first]["perplexity"] or math.inf).folder)
        for cell in self.cells.values():
            if cell.folder not in needed:
                self.folder.drop_checkpoint(cell)

    def tell(self, event: SweepEvent) -> None:
        """Pass an event on, with where the sweep is."""
        finished, cells = self.position
        super().tell(replace(event, finished=finished, cells=cells))
