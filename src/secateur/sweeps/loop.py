"""The one loop over the cells of a sweep: prune, evaluate, record, and drop what is not to be kept."""

import math
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.calibration.corpora import is_token_file
from secateur.calibration.windows import Windows
from secateur.collect.gradient_file import GradientFile
from secateur.collect.gradient_pass import gradient_batch_size, gradients
from secateur.collect.model_windows import foreseen_windows, model_evaluation_windows, model_windows
from secateur.collect.settings import CalibrationSettings, Model
from secateur.collect.survey import Survey
from secateur.core.choices import Granularity, Norm, Scope
from secateur.core.problem import Method
from secateur.core.statistics import Statistic, by_sample
from secateur.errors import CheckpointError, MethodError, SecateurError
from secateur.evaluate.agreement import agreement
from secateur.evaluate.perplexity import paired_difference, perplexity
from secateur.files.reading import read_text
from secateur.models.flow.memory import trim
from secateur.models.flow.stream import default_batch_size
from secateur.models.opening.opened import OpenedModel, open_model
from secateur.pruning.engine import prune
from secateur.record.manifest import FILE_NAME
from secateur.runs.events import Event
from secateur.sweeps.estimate import SweepEstimate, Task, estimate_sweep, shared_gradient
from secateur.sweeps.folder import Cell, Sweep, SweepFolder, check_settings, plain
from secateur.sweeps.settings import SweepSettings
from secateur.sweeps.table import markdown, table_csv

EVALUATION_OPTIONS = ("batch_size", "device", "dtype", "offload_states", "trust_remote_code")
GRADIENT_OPTIONS = (*EVALUATION_OPTIONS, "only", "skip", "revision")
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
    options: dict[str, Any]  # of prune
    tokenizer: Any
    outdated: set[str] = field(default_factory=set)  # folders of cells with a checkpoint of another method
    dense: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)  # by folder; also those that were not asked for this time
    texts: dict[str, Windows] = field(default_factory=dict)  # by data set
    calibration: Windows | None = None
    batch_sizes: dict[str, int | None] = field(default_factory=dict)  # by label
    gradients: dict[tuple[Granularity, Scope], Path | SecateurError] = field(default_factory=dict)
    statistics: dict[int | None, Survey] = field(default_factory=dict)  # by batch size
    source_tensors: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # estimated, by cell folder
    position: tuple[int, int] = (0, 0)  # cells finished, cells in all

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
            changed = {
                *self.asked.again,
                *(key for key, own in self.settings["methods"].items() if held.get(key) != own),
            }
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
        pending = [self.cells[task.cell.folder] for task in self.pending]
        for data in self.settings["data"]:
            if data in self.dense and not any(data in self.lacking(cell) for cell in pending):
                continue
            asked = {"length": self.settings["eval_length"], "windows": self.settings["windows"]}
            asked = {"windows": asked["windows"]} if is_token_file(data) else asked
            bos = self.settings["bos"]
            windows = model_evaluation_windows(
                opened,
                data,
                self.tokenizer,
                **asked,
                bos=bos if decide or bos != "auto" else "papers",
                known=self.settings["bos_choices"].get(f"data set {data}"),
                option="--eval-length",
            )
            if decide:
                self._note(f"data set {data}", windows)
            self.texts[data] = windows

    def draw_calibration(self, opened: OpenedModel, calibration: str | Sequence[str] | Windows) -> None:
        """Draw the calibration tokens, if a cell that has not been pruned yet needs any."""
        if not self._looks_at_tokens():
            return
        self.calibration = model_windows(
            opened,
            self._drawing(calibration),
            known=self.settings["bos_choices"].get("calibration"),
            progress=lambda done, total: self._stage(None, "calibration", done, total),
        )
        self._note("calibration", self.calibration)
        for task in (task for task in self.tasks if task.method.needs):
            size = _batch_size(opened, task.method, self.calibration.length, self.options["batch_size"])
            self.batch_sizes[task.cell.method] = size

    def _looks_at_tokens(self) -> bool:
        """Whether a cell that is still to be pruned needs calibration tokens."""
        return any(task.method.needs for task in self._to_prune())

    def _drawing(self, calibration: str | Sequence[str] | Windows) -> CalibrationSettings:
        """How calibration windows are drawn."""
        held = {key: self.settings[key] for key in ("samples", "length", "seed", "sampling", "bos")}
        return CalibrationSettings(calibration=calibration, tokenizer=self.tokenizer, **held)

    def _note(self, what: str, windows: Windows) -> None:
        if "bos" in windows.provenance:
            self.settings["bos_choices"][what] = windows.provenance["bos"]
        digests = {what: windows.digest}
        check_settings(self.folder.path, self.settings, {"methods": {}, "digests": digests})
        self.settings["digests"].update(digests)

    def estimate(self, opened: OpenedModel, calibration: str | Sequence[str] | Windows) -> SweepEstimate:
        """What is left to do, and what it would take. Raises what `draw_calibration` would, as far as that shows."""
        text = {"calibration": None, "samples": self.settings["samples"], "length": self.settings["length"]}
        unchecked: Sequence[str] = ()
        if self._looks_at_tokens():
            seen = foreseen_windows(opened, self._drawing(calibration))
            text = {"calibration": seen.windows, "samples": seen.samples, "length": seen.length}
            unchecked = seen.unchecked
        estimate = estimate_sweep(self, opened, {**self.options, **text}, unchecked)
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
        pending = self.pending
        done = spent = 0.0
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
            kind = shared_gradient(task.method, self.options["propagate"])
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
        options = {key: value for key, value in self.options.items() if key in GRADIENT_OPTIONS}
        gradients(
            self.asked.model,
            path,
            norms=sorted(norms),
            granularity=granularity,
            scope=scope,
            calibration=self.calibration,
            overwrite=True,
            progress=lambda stage, done, total: self._stage(None, f"gradients: {stage}", done, total),
            **options,
        )
        return path

    def _share_statistics(self) -> None:
        """With the dense model's inputs, share one pass among all cells that run with the same batch size."""
        if self.options["propagate"] != "dense":
            return
        groups: dict[int | None, list[frozenset[type[Statistic]]]] = {}
        for task in self._to_prune():
            if task.method.inputs:
                groups.setdefault(self.batch_sizes[task.cell.method], []).append(task.method.inputs)
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
        except SecateurError as error:
            cell = replace(cell, status="failed", error=str(error))
            if isinstance(error, MethodError):
                self.folder.write(f"{cell.folder}/{details.name}", traceback.format_exc())
        except Exception as error:  # a method may be anybody's, and a night's work must not end with one cell
            cell = replace(cell, status="failed", error=f"{type(error).__name__}: {error}")
            self.folder.write(f"{cell.folder}/{details.name}", traceback.format_exc())
        cell = replace(cell, seconds=before + time.perf_counter() - began)
        self.cells[cell.folder] = cell
        self.folder.write_cell(cell)
        trim()
        return cell

    def _prune(self, task: Task) -> None:
        kind = shared_gradient(task.method, self.options["propagate"])
        gradient = self.gradients[kind] if kind is not None else None
        if isinstance(gradient, SecateurError):
            raise gradient
        size = self.batch_sizes.get(task.cell.method, self.options["batch_size"])
        manifest = prune(
            self.asked.model,
            method=task.method,
            pattern=task.pattern,
            calibration=self.calibration if self.calibration is not None else (),
            gradient=gradient,
            statistics=self.statistics.get(size) if task.method.inputs else None,
            output=self.folder.checkpoint(task.cell),
            command=self.asked.command,
            on_event=lambda event: self._pruning(task.cell, event),
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
            how = {key: self.options[key] for key in ("device", "dtype", "revision", "trust_remote_code")}
            (found,) = agreement(
                open_model(self.asked.model, **how),
                [checkpoint],
                self.texts[data],
                progress=lambda stage, done, total: self._stage(cell, f"{data}: {stage}", done, total),
                **{key: value for key, value in self.options.items() if key in EVALUATION_OPTIONS},
            )
            figures["agreement"] = {key: plain(value) for key, value in vars(found).items() if key in AGREEMENT}
        return figures

    def _perplexity(self, model: Model, data: str, cell: Cell | None) -> dict[str, Any]:
        revision = self.options["revision"] if cell is None else None
        found = perplexity(
            model,
            self.texts[data],
            revision=revision,
            progress=lambda stage, done, total: self._stage(cell, f"{data}: {stage}", done, total),
            **{key: value for key, value in self.options.items() if key in EVALUATION_OPTIONS},
        )
        figures: dict[str, Any] = plain(replace(found, data=data).to_json())
        return figures

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

    def _stage(self, cell: Cell | None, stage: str, done: int, total: int) -> None:
        self._tell(SweepEvent("stage", cell, stage, done, total))

    def _tell(self, event: SweepEvent) -> None:
        finished, cells = self.position
        self.asked.on_event(replace(event, finished=finished, cells=cells))


class _ChangedModelError(CheckpointError):
    """The model is not the one that the other cells were made of."""


def _batch_size(opened: OpenedModel, method: Method, length: int, asked: int | None) -> int:
    """The batch size with which `prune` would run a method by itself, so that sharing changes no bit."""
    if asked is not None:
        return asked
    if by_sample(method.inputs) is not None:
        return 1
    if method.gradient is not None and method.gradient.scope == "block":
        return gradient_batch_size(opened.skeleton, length, method.gradient.granularity, None)
    return default_batch_size(length, opened.skeleton.device)
