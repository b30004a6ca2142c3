"""One cell of a sweep: pruned, evaluated and recorded, with what all cells share."""

import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from secateur.calibration.windows import Windows
from secateur.collect.settings import BatchSettings, DtypeSettings, Model, ModelSettings, SelectionSettings
from secateur.collect.survey import Survey
from secateur.core.choices import Granularity, Scope
from secateur.errors import CheckpointError, MethodError, SecateurError
from secateur.evaluate.agreement import agreement
from secateur.evaluate.perplexity import paired_difference, perplexity
from secateur.evaluate.results import Results
from secateur.evaluate.settings import TaskSettings
from secateur.evaluate.task_results import TaskResults
from secateur.evaluate.tasks import tasks
from secateur.files.reading import read_text
from secateur.models.flow.memory import trim
from secateur.models.opening.opened import open_model
from secateur.models.opening.whole import WholeModel
from secateur.pruning.engine import prune
from secateur.pruning.settings import SharedSettings
from secateur.record.manifest import FILE_NAME
from secateur.runs.events import Event
from secateur.runs.options import shared
from secateur.sweeps.answers import cell_rows
from secateur.sweeps.estimate import Task, shared_gradient
from secateur.sweeps.folder import Cell, SweepFolder, plain
from secateur.sweeps.settings import SweepSettings

ANSWERS = "answers"  # the folder of what each model answered, document by document
AGREEMENT = ("kl", "kl_error", "kl_99", "top1", "top1_error", "window_kl", "window_top1")


class ChangedModelError(CheckpointError):
    """The model is not the one that the other cells were made of."""


@dataclass(frozen=True)
class SweepEvent:
    """What a sweep is doing, or has just done.

    `kind` is "stage" (of the current `cell`, or of what all cells share where it is None), "dense" (the dense model was
    evaluated on a data set, which is the `stage`), "again" (a cell with figures is pruned once more, because its
    checkpoint was not kept), "lost" (the worker of a cell on Ray was lost, for the reason that is the `stage`, and the
    cell is tried again) or "cell" (one is done or has failed). `finished` of `cells` are done or failed.
    """

    kind: str
    cell: Cell | None = None
    stage: str = ""
    done: int = 0
    total: int = 0
    finished: int = 0
    cells: int = 0
    seconds_left: float | None = None
    model: str = ""  # in a sweep of several models

    @property
    def where(self) -> str:
        """The name of the cell that it is about, and of its model where there are several."""
        return ", ".join(filter(None, [self.model, self.cell.name if self.cell is not None else "all cells"]))

    @property
    def place(self) -> tuple[str, int, int, str]:
        """Where a bar stands, as of an `Event`."""
        stage = self.stage.rpartition("/")[2]  # of a file, the name alone
        note = f"{self.where}: {stage} {self.done}/{self.total}" if self.total else stage
        return "cells", self.finished, self.cells, note


@dataclass(kw_only=True)
class CellRunner:
    """What the cells of a sweep share, and how one of them is run, in this process or in another."""

    folder: SweepFolder
    asked: SweepSettings
    settings: dict[str, Any]  # as they are recorded
    dense: dict[str, dict[str, Any]] = field(default_factory=dict)
    dense_answers: dict[str, TaskResults] = field(default_factory=dict)  # by the name of the task
    texts: dict[str, Windows] = field(default_factory=dict)  # by data set
    calibrations: dict[int, Windows] = field(default_factory=dict)  # by seed
    batch_sizes: dict[str, int] = field(default_factory=dict)  # by label
    gradients: dict[tuple[int, Granularity, Scope], Path | SecateurError] = field(default_factory=dict)  # by seed, ...
    statistics: dict[tuple[int, int | None], Survey] = field(default_factory=dict)  # by seed and batch size
    source_tensors: dict[str, str] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The options of `prune` that all cells share."""
        return shared(self.asked, SharedSettings, SelectionSettings)

    def unanswered(self, cell: Cell) -> list[str]:
        """The tasks that a cell has not been asked yet."""
        return [name for name in self.settings["tasks"] if name not in cell.tasks]

    def lacking(self, cell: Cell) -> list[str]:
        """The data sets on which a cell has not been evaluated yet."""
        wanted = {"perplexity"} | ({"agreement"} if self.settings["agreement"] else set())
        return [data for data in self.settings["data"] if wanted - cell.figures.get(data, {}).keys()]

    def seed_of(self, task: Task) -> int:
        """The draw of calibration samples that a task is pruned with; the sweep's own where its cell has none."""
        return self.settings["seed"] if task.cell.seed is None else task.cell.seed

    def batch_size_of(self, task: Task) -> int | None:
        """The batch size that a task is pruned with."""
        return self.batch_sizes.get(task.cell.method, self.asked.batch_size)

    def survey_of(self, task: Task) -> Survey | None:
        """The statistics that a task shares with others: taken already, or to be taken by the first of them."""
        return self.statistics.get(self.sharing(task)) if task.method.inputs else None

    def sharing(self, task: Task) -> tuple[int, int | None]:
        """What tasks have in common that share statistics: draw and batch size."""
        return self.seed_of(task), self.batch_size_of(task)

    def check_source(self, cell: Cell, tensors: Mapping[str, str]) -> None:
        """Raise `ChangedModelError` where a cell was made of other weights than the cells before it."""
        for name, digest in tensors.items():
            if self.source_tensors.setdefault(name, digest) != digest:
                self.folder.drop_checkpoint(cell)
                raise ChangedModelError(
                    f"{self.settings['model']}: {name} has changed since this sweep was started. Bring the old model "
                    "back, or choose another folder."
                )

    def run_cell(self, task: Task) -> Cell:
        """Prune and evaluate one cell; whatever goes wrong there is recorded. Returns the cell with its results."""
        began = time.perf_counter()
        cell = replace(task.cell, error=None)
        before, details = cell.seconds, self.folder.path / cell.folder / "traceback.txt"
        details.unlink(missing_ok=True)
        try:
            if not self.folder.checkpoint(cell).exists():
                if cell.figures or cell.tasks:
                    self.tell(SweepEvent("again", cell))
                self._prune(task)
            self.folder.write(f"{cell.folder}/{FILE_NAME}", read_text(self.folder.checkpoint(cell) / FILE_NAME))
            for data in self.lacking(cell):
                figures = {**cell.figures, data: self._figures(cell, data)}
                cell = replace(cell, figures=figures, seconds=before + time.perf_counter() - began)
                self.folder.write_cell(cell)
            if names := self.unanswered(cell):
                for name, found in self.answers(self.folder.checkpoint(cell), names, cell):
                    rows = {**cell.tasks, name: plain(cell_rows(self.dense_answers[name], found))}
                    cell = replace(cell, tasks=rows, seconds=before + time.perf_counter() - began)
                    self.folder.write_cell(cell)
            cell = replace(cell, status="done")
        except ChangedModelError:
            raise
        except Exception as error:  # a method may be anybody's, and a night's work must not end with one cell
            expected = isinstance(error, SecateurError)
            cell = replace(cell, status="failed", error=str(error) if expected else f"{type(error).__name__}: {error}")
            if isinstance(error, MethodError) or not expected:
                self.folder.write(f"{cell.folder}/{details.name}", traceback.format_exc())
        cell = replace(cell, seconds=before + time.perf_counter() - began)
        self.folder.write_cell(cell)
        trim()
        return cell

    def _prune(self, task: Task) -> None:
        kind = shared_gradient(task.method, self.asked.propagate)
        seed = self.seed_of(task)
        gradient = self.gradients[seed, *kind] if kind is not None else None
        if isinstance(gradient, SecateurError):
            raise gradient
        manifest = prune(
            method=task.method,
            pattern=task.pattern,
            calibration=self.calibrations.get(seed, ()),
            gradient=gradient,
            statistics=self.survey_of(task),
            output=self.folder.checkpoint(task.cell),
            resumable=False,  # a sweep goes on cell by cell
            command=self.asked.command,
            on_event=partial(self._pruning, task.cell),
            **{**self.options, "batch_size": self.batch_size_of(task)},
        )
        self.check_source(task.cell, manifest.source_tensors)

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

    def answers(self, model: Model, names: Sequence[str], cell: Cell | None) -> Iterator[tuple[str, TaskResults]]:
        """A model's results of tasks, name by name; those that were found before are kept in the sweep's folder."""
        opening: dict[str, Any] = shared(self.asked, ModelSettings)
        opening |= {"model": model, "revision": self.asked.revision if cell is None else None}
        how = shared(self.asked, TaskSettings) | {"batch_size": self.asked.batch_size}
        with WholeModel(**opening, tokenizer=self.asked.tokenizer) as whole:
            for name in names:
                asked = how | {"names": [name], "store": Results(self.folder.path / ANSWERS)}
                del asked["tasks"]
                yield name, tasks(whole, **asked, progress=partial(self._stage, cell))

    def _evaluating(self, cell: Cell | None, data: str) -> dict[str, Any]:
        """How all models are evaluated."""
        progress = partial(self._stage, cell, prefix=f"{data}: ")
        return shared(self.asked, BatchSettings, DtypeSettings) | {"progress": progress}

    def _pruning(self, cell: Cell, event: Event) -> None:
        if event.blocks:
            self._stage(cell, "blocks", event.block + (event.stage == "write"), event.blocks)
        elif event.total:
            self._stage(cell, event.stage, event.done, event.total)

    def _stage(self, cell: Cell | None, stage: str, done: int, total: int, *, prefix: str = "") -> None:
        self.tell(SweepEvent("stage", cell, prefix + stage, done, total))

    def tell(self, event: SweepEvent) -> None:
        """Pass an event on to whoever asked for the sweep."""
        self.asked.on_event(event)
