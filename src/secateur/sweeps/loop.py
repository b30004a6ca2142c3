"""The one loop over the cells of a sweep: prune, evaluate, record, and drop what is not to be kept."""

import math
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from secateur.calibration.corpora import is_token_file
from secateur.calibration.windows import Windows
from secateur.collect.evidence import RunEvidence
from secateur.collect.gradient_file import GradientFile
from secateur.collect.gradient_pass import gradients
from secateur.collect.model_windows import Foreseen, foreseen_windows, model_evaluation_windows, model_windows
from secateur.collect.settings import (
    BatchSettings,
    CalibrationSettings,
    DtypeSettings,
    ExemptSettings,
    Model,
    ModelSettings,
    SelectionSettings,
)
from secateur.collect.survey import Survey
from secateur.core.choices import Granularity, Norm, Scope
from secateur.core.statistics import Statistic
from secateur.errors import CheckpointError, MethodError, SecateurError
from secateur.evaluate.agreement import agreement
from secateur.evaluate.perplexity import paired_difference, perplexity
from secateur.files.reading import read_text
from secateur.models.flow.memory import trim
from secateur.models.flow.stream import default_batch_size
from secateur.models.opening.opened import OpenedModel, open_model
from secateur.pruning.engine import prune
from secateur.pruning.settings import SharedSettings
from secateur.record.manifest import FILE_NAME
from secateur.runs.events import Event
from secateur.runs.journal import AnotherRunError
from secateur.runs.options import shared
from secateur.sweeps.estimate import SweepEstimate, Task, estimate_sweep, shared_gradient
from secateur.sweeps.folder import Cell, Sweep, SweepFolder, check_settings, plain
from secateur.sweeps.settings import SweepSettings
from secateur.sweeps.table import markdown, table_csv

AGREEMENT = ("kl", "kl_error", "kl_99", "top1", "top1_error", "window_kl", "window_top1")


@dataclass(frozen=True)
class SweepEvent:
    """What a sweep is doing, or has just done.

    `kind` is "stage" (of the current `cell`, or of what all cells share where it is None), "dense" (the dense model was
    evaluated on a data set, which is the `stage`), "again" (a cell with figures is pruned once more, because its
    checkpoint was not kept) or "cell" (one is done or has failed). `finished` of `cells` are done or failed.
    """

    kind: str
    cell: Cell | None = None
    stage: str = ""
    done: int = 0
    total: int = 0
    finished: int = 0
    cells: int = 0
    seconds_left: float | None = None


@dataclass
class SweepLoop:
    """One run of a sweep: what it was asked for, what is known so far, and what the cells share."""

    folder: SweepFolder
    asked: SweepSettings
    tasks: list[Task]
    settings: dict[str, Any]  # as they are recorded
    drawing: CalibrationSettings  # how calibration windows are drawn
    outdated: set[str] = field(default_factory=set)  # folders of cells with a checkpoint of another method
    dense: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)  # by folder; also those that were not asked for this time
    texts: dict[str, Windows] = field(default_factory=dict)  # by data set
    calibration: Windows | None = None
    batch_sizes: dict[str, int] = field(default_factory=dict)  # by label
    gradients: dict[tuple[Granularity, Scope], Path | SecateurError] = field(default_factory=dict)
    statistics: dict[int | None, Survey] = field(default_factory=dict)  # by batch size
    source_tensors: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # estimated, by cell folder
    position: tuple[int, int] = (0, 0)  # cells finished, cells in all

    @property
    def options(self) -> dict[str, Any]:
        """The options of `prune` that all cells share."""
        return shared(self.asked, SharedSettings, SelectionSettings)

    @property
    def sweep(self) -> Sweep:
        """All that is known."""
        dense = {data: self.dense[data] for data in self.settings["data"] if data in self.dense}
        return Sweep(self.folder.path, self.settings["model"], dense, self.settings, list(self.cells.values()))

    def join(self, known: Sweep | None) -> None:
        """Go on from what is on the disk. Raises `CheckpointError` when that was made with other settings."""
        if known is not None:
            finished = {cell.method for cell in known.cells if cell.figures} - set(self.asked.again)
            check_settings(self.folder.path, known.settings, self.settings, finished)
            held = known.settings["methods"]
            changed = {key for key, own in self.settings["methods"].items() if held.get(key) != own}
            changed |= set(self.asked.again)
            for key in ("methods", "digests", "bos_choices"):
                self.settings[key] = {**known.settings.get(key, {}), **self.settings[key]}
            self.settings["data"] = list(dict.fromkeys([*known.data, *self.settings["data"]]))
            self.settings["agreement"] = self.settings["agreement"] or known.settings["agreement"]
            self.dense = {data: dict(figures) for data, figures in known.dense.items()}
            self.cells = {cell.folder: cell for cell in known.cells}
            for cell in known.cells:
                if cell.method in changed:
                    self.outdated.add(cell.folder)
                    self.cells[cell.folder] = Cell(cell.method, cell.pattern, cell.sparsity, cell.folder)
        for task in self.tasks:
            self.cells.setdefault(task.cell.folder, task.cell)
        self.tasks = [replace(task, cell=self.cells[task.cell.folder]) for task in self.tasks]
        self.source_tensors = self.folder.source_tensors(list(self.cells.values()))

    def lacking(self, cell: Cell) -> list[str]:
        """The data sets on which a cell has not been evaluated yet."""
        wanted = {"perplexity"} | ({"agreement"} if self.settings["agreement"] else set())
        return [data for data in self.settings["data"] if wanted - cell.figures.get(data, {}).keys()]

    @property
    def pending(self) -> list[Task]:
        """The tasks that are not finished, first those whose checkpoint is there."""
        tasks = [task for task in self.tasks if self.lacking(self.cells[task.cell.folder])]
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
            windows = model_evaluation_windows(
                opened,
                data,
                self.drawing.tokenizer,
                length=None if is_token_file(data) else self.settings["eval_length"],
                windows=self.settings["windows"],
                bos=bos if decide or bos != "auto" else "papers",
                known=self.settings["bos_choices"].get(f"data set {data}"),
                option="--eval-length",
            )
            if decide:
                self._note(f"data set {data}", windows)
            self.texts[data] = windows

    def draw_calibration(self, opened: OpenedModel) -> None:
        """Draw the calibration tokens, if a cell that has not been pruned yet needs any."""
        if not any(task.method.needs for task in self._to_prune()):
            return
        self.calibration = model_windows(
            opened,
            self.drawing,
            known=self.settings["bos_choices"].get("calibration"),
            progress=partial(self._stage, None, "calibration"),
        )
        self._note("calibration", self.calibration)
        skeleton, length = opened.skeleton, self.calibration.length
        for task in (task for task in self.tasks if task.method.needs):
            # That with which `prune` would run the method by itself, so that sharing changes no bit; what it would
            # refuse, it will refuse.
            with suppress(SecateurError):
                own = self.asked.batch_size or RunEvidence(task.method.needs).batch_size(skeleton, length, None)
                self.batch_sizes[task.cell.method] = own or default_batch_size(length, skeleton.device)

    def _note(self, what: str, windows: Windows) -> None:
        if "bos" in windows.provenance:
            self.settings["bos_choices"][what] = windows.provenance["bos"]
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
        estimate = estimate_sweep(self, opened, {**self.options, **text, "model": opened}, seen.unchecked)
        self.seconds = {own.cell.folder: own.seconds for own in estimate.cells}
        return estimate

    def run(self) -> None:
        """Evaluate the dense model, run every pending cell, and write the tables."""
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
                self._tell(SweepEvent("dense", stage=data))
        self._take_gradients()
        self._share_statistics()
        done = spent = 0.0
        pending = self.pending
        for number, task in enumerate(pending):
            self.position = (number, len(pending))
            began = time.perf_counter()
            cell = self._run_cell(task)
            self._drop_unneeded()
            self._write()
            done, spent = done + self.seconds[cell.folder], spent + time.perf_counter() - began
            left = sum(self.seconds[other.cell.folder] for other in pending[number + 1 :])
            self.position = (number + 1, len(pending))
            self._tell(SweepEvent("cell", cell, seconds_left=left * spent / done if done else None))
        self._write()

    def _write(self) -> None:
        self.folder.write_sweep(self.sweep)
        self.folder.write("table.md", markdown(self.sweep))
        self.folder.write("table.csv", table_csv(self.sweep))

    def close(self) -> None:
        """Remove the statistics that the cells shared."""
        for statistics in self.statistics.values():
            statistics.close()

    def _to_prune(self) -> list[Task]:
        return [task for task in self.pending if not self.pruned(task.cell)]

    def _take_gradients(self) -> None:
        """One pass over the dense model for each kind of gradients that cells share; cells record its failure."""
        norms: dict[tuple[Granularity, Scope], set[Norm]] = {}
        for task in self._to_prune():
            kind = shared_gradient(task.method, self.asked.propagate)
            if kind is not None and task.method.gradient is not None:
                norms.setdefault(kind, set()).add(task.method.gradient.norm)
        for kind, wanted in norms.items():
            try:
                self.gradients[kind] = self._gradient_file(*kind, wanted)
            except SecateurError as error:
                self.gradients[kind] = error

    def _gradient_file(self, granularity: Granularity, scope: Scope, norms: set[Norm]) -> Path:
        assert self.calibration is not None
        path = self.folder.path / f"gradients-{granularity}-{scope}.safetensors"
        if path.exists():
            file = GradientFile(path)
            file.check_tokens(self.calibration.digest, self.calibration.samples, self.calibration.length)
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
            calibration=self.calibration,
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
        groups: dict[int | None, list[frozenset[type[Statistic]]]] = {}
        for task in self._to_prune():
            if task.method.inputs:
                groups.setdefault(self.batch_sizes.get(task.cell.method), []).append(task.method.inputs)
        for size, needs in groups.items():
            if len(needs) > 1:
                folder = self.folder.path / f"statistics-{size}.partial"
                self.statistics[size] = Survey(folder, frozenset().union(*needs))

    def _run_cell(self, task: Task) -> Cell:
        """Prune and evaluate one cell; whatever goes wrong there is recorded."""
        began = time.perf_counter()
        cell = replace(self.cells[task.cell.folder], error=None)
        before, details = cell.seconds, self.folder.path / cell.folder / "traceback.txt"
        details.unlink(missing_ok=True)
        try:
            if not self.folder.checkpoint(cell).exists():
                if cell.figures:
                    self._tell(SweepEvent("again", cell))
                self._prune(task)
            self.folder.write(f"{cell.folder}/{FILE_NAME}", read_text(self.folder.checkpoint(cell) / FILE_NAME))
            for data in self.lacking(cell):
                figures = {**cell.figures, data: self._figures(cell, data)}
                cell = replace(cell, figures=figures, seconds=before + time.perf_counter() - began)
                self.folder.write_cell(cell)
            cell = replace(cell, status="done")
        except _ChangedModelError:
            raise
        except Exception as error:  # a method may be anybody's, and a night's work must not end with one cell
            expected = isinstance(error, SecateurError)
            cell = replace(cell, status="failed", error=str(error) if expected else f"{type(error).__name__}: {error}")
            if isinstance(error, MethodError) or not expected:
                self.folder.write(f"{cell.folder}/{details.name}", traceback.format_exc())
        cell = replace(cell, seconds=before + time.perf_counter() - began)
        self.cells[cell.folder] = cell
        self.folder.write_cell(cell)
        trim()
        return cell

    def _prune(self, task: Task) -> None:
        kind = shared_gradient(task.method, self.asked.propagate)
        gradient = self.gradients[kind] if kind is not None else None
        if isinstance(gradient, SecateurError):
            raise gradient
        size = self.batch_sizes.get(task.cell.method, self.asked.batch_size)
        manifest = prune(
            method=task.method,
            pattern=task.pattern,
            calibration=self.calibration if self.calibration is not None else (),
            gradient=gradient,
            statistics=self.statistics.get(size) if task.method.inputs else None,
            output=self.folder.checkpoint(task.cell),
            resumable=False,  # a sweep goes on cell by cell
            command=self.asked.command,
            on_event=partial(self._pruning, task.cell),
            **{**self.options, "batch_size": size},
        )
        for name, digest in manifest.source_tensors.items():
            if self.source_tensors.setdefault(name, digest) != digest:
                self.folder.drop_checkpoint(task.cell)
                raise _ChangedModelError(
                    f"{self.settings['model']}: {name} has changed since this sweep was started. Bring the old model "
                    "back, or choose another folder."
                )

    def _figures(self, cell: Cell, data: str) -> dict[str, Any]:
        figures = dict(cell.figures.get(data, {}))
        checkpoint = self.folder.checkpoint(cell)
        if "perplexity" not in figures:
            figures = self._perplexity(checkpoint, data, cell)
            mean, error = paired_difference(figures["window_nats"], self.dense[data]["window_nats"])
            figures |= {"difference": mean, "difference_error": plain(error)}
        if self.settings["agreement"]:
            dense = open_model(**shared(self.asked, ModelSettings))
            (found,) = agreement(dense, [checkpoint], self.texts[data], **self._evaluating(cell, data))
            figures["agreement"] = {key: plain(value) for key, value in vars(found).items() if key in AGREEMENT}
        return figures

    def _perplexity(self, model: Model, data: str, cell: Cell | None) -> dict[str, Any]:
        revision = self.asked.revision if cell is None else None
        found = perplexity(model, self.texts[data], revision=revision, **self._evaluating(cell, data))
        figures: dict[str, Any] = plain(replace(found, data=data).to_json())
        return figures

    def _evaluating(self, cell: Cell | None, data: str) -> dict[str, Any]:
        """How all models are evaluated."""
        progress = partial(self._stage, cell, prefix=f"{data}: ")
        return shared(self.asked, BatchSettings, DtypeSettings) | {"progress": progress}

    def _drop_unneeded(self) -> None:
        """Remove every checkpoint that is neither kept nor waiting for its evaluation."""
        if self.settings["keep"] == "all":
            return
        needed = {task.cell.folder for task in self.tasks if self.cells[task.cell.folder].status == "pending"}
        if self.settings["keep"] == "best":
            first = self.settings["data"][0]
            found = [cell for cell in self.cells.values() if cell.status == "done" and first in cell.figures]
            for pattern in {cell.pattern for cell in found}:
                rivals = [cell for cell in found if cell.pattern == pattern]
                needed.add(min(rivals, key=lambda cell: cell.figures[first]["perplexity"] or math.inf).folder)
        for cell in self.cells.values():
            if cell.folder not in needed:
                self.folder.drop_checkpoint(cell)

    def _pruning(self, cell: Cell, event: Event) -> None:
        if event.blocks:
            self._stage(cell, "blocks", event.block + (event.stage == "write"), event.blocks)
        elif event.total:
            self._stage(cell, event.stage, event.done, event.total)

    def _stage(self, cell: Cell | None, stage: str, done: int, total: int, *, prefix: str = "") -> None:
        self._tell(SweepEvent("stage", cell, prefix + stage, done, total))

    def _tell(self, event: SweepEvent) -> None:
        finished, cells = self.position
        self.asked.on_event(replace(event, finished=finished, cells=cells))


class _ChangedModelError(CheckpointError):
    """The model is not the one that the other cells were made of."""
