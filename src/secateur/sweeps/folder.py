"""A sweep on disk: its cells, its settings, and the remains of killed processes."""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from secateur.core.fingerprint import difference
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.errors import CheckpointError
from secateur.files.reading import checked, read_json
from secateur.files.redaction import redacted
from secateur.files.scratch import delete
from secateur.files.writer import writing
from secateur.record.manifest import FILE_NAME
from secateur.runs.output import check_apart, check_writable
from secateur.shown import Shown
from secateur.sweeps.answers import Answered, Answers, TaskMean, task_means
from secateur.sweeps.draws import Mean, means

SWEEP_FILE = "sweep.json"
CELL_FILE = "cell.json"
CHECKPOINT = "checkpoint"
LOCK_FILE = "sweep.lock"
_FOLDER = re.compile(r"cells/(?!\.{1,2}$)[^/\\\0]+")  # of a cell, as it stands in files
_DRAW = re.compile(r"~seed\d+$")
_UNFINISHED = re.compile(r"gradients-\w+-\w+(~seed\d+)?\.safetensors\.partial$")  # which the next run goes on with
_LEFTOVER = re.compile(r"\.(partial|old)$|\.(partial|states|gradients|old)-\d+")

Figures = Mapping[str, Mapping[str, Any]]
Status = Literal["done", "failed", "pending"]


@dataclass(frozen=True)
class Cell:
    """One pruning of a sweep: a method, by its label, and a pattern, with the results.

    `figures` has an entry for each data set: the output of `Perplexity.to_json`, `difference` and `difference_error`,
    the paired difference to the dense model in nats; where agreement was asked for, also that, under `agreement`.
    `seconds` are those of pruning and evaluating. `folder` is relative to that of the sweep. `seed` is that of the draw
    of its calibration samples; None where the method needs none, and in the files of earlier versions. `tasks` has, by
    the names that were asked for and then by task, shots, documents, metrics and their paired differences from the
    dense model.
    """

    method: str
    pattern: str
    sparsity: float
    folder: str
    status: Status = "pending"
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    error: str | None = None
    seed: int | None = None
    tasks: Answers = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Method and pattern, and a draw that is not the first: "wanda 50%", "wanda 50%, seed 1"."""
        return f"{self.method} {self.pattern}" + (f", seed {self.seed}" if _DRAW.search(self.folder) else "")

    @classmethod
    def of(cls, label: str, pattern: Pattern, seed: int | None = None, first: int | None = None) -> "Cell":
        """The cell of a method's label, a pattern and a draw, not run yet; `first` is the sweep's own seed."""
        folder = f"cells/{cell_name(label, pattern)}{draw_suffix(seed, first)}"
        return cls(label, pattern_text(pattern), pattern.sparsity, folder, seed=seed)

    def fresh(self) -> "Cell":
        """The same cell, not run yet."""
        return Cell(self.method, self.pattern, self.sparsity, self.folder, seed=self.seed)


def draw_suffix(seed: int | None, first: int | None) -> str:
    """What is added to a name for a draw; nothing for the sweep's own seed, whose cells had no other name before."""
    return "" if seed is None or seed == first else f"~seed{seed}"


class _Found(TypedDict):
    """What is read of a cell's figures on a data set."""

    perplexity: float | None
    window_nats: list[float | None]


class _Dense(_Found):
    windows: int
    length: int


class _Chosen(TypedDict):
    name: str
    options: dict[str, Any]
    fingerprint: NotRequired[dict[str, str]]


class _Settings(TypedDict):
    """What is read of a sweep's settings."""

    data: list[str]
    methods: dict[str, _Chosen]
    digests: dict[str, str]
    agreement: bool


_Answers = dict[str, dict[str, Answered]]


class _Written(TypedDict):
    model: str
    dense: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    cells: list[Cell]
    dense_tasks: NotRequired[_Answers]


@dataclass(frozen=True, repr=False)
class Sweep(Shown):
    """A grid of prunings: the dense model's figures by data set and its results of tasks, the settings, the cells."""

    folder: Path
    model: str
    dense: Figures
    settings: Mapping[str, Any]
    cells: Sequence[Cell]
    dense_tasks: Answers = field(default_factory=dict)

    @property
    def failed(self) -> list[Cell]:
        """The cells that failed."""
        return [cell for cell in self.cells if cell.status == "failed"]

    @property
    def means(self) -> list[Mean]:
        """Every method in every pattern on every text, over the draws of calibration samples."""
        return means(self.cells, self.dense, self.data)

    @property
    def task_means(self) -> list[TaskMean]:
        """Every metric of every task for every method in every pattern, over the draws of calibration samples."""
        return task_means(self.cells)

    @property
    def data(self) -> list[str]:
        """The data sets, the first of which decides which cell is best."""
        return list(self.settings["data"])

    def to_json(self) -> dict[str, Any]:
        """What `sweep.json` holds: model, dense, settings, cells, and their means over draws, also those of tasks."""
        value: dict[str, Any] = plain(dataclasses.asdict(self))
        del value["folder"]
        means, task_means = (
            [plain(dataclasses.asdict(mean)) for mean in held] for held in (self.means, self.task_means)
        )
        return value | {"means": means, "task_means": task_means}

    @classmethod
    def read(cls, file: Path) -> "Sweep":
        """The sweep that `to_json` wrote into a file. Raises `CheckpointError` for anything else."""
        advice = f"Remove {file.parent} to start again."
        value = read_json(file, _Written, advice=advice)
        checked(value["settings"], file, _Settings, advice=advice)
        checked(value["dense"], file, dict[str, _Dense], advice=advice)
        for cell in value["cells"]:
            _check_cell(cell, file, advice)
        answers = value.get("dense_tasks", {})
        return cls(file.parent, value["model"], value["dense"], value["settings"], value["cells"], answers)


def _check_cell(cell: Cell, file: Path, advice: str) -> None:
    """Raise `CheckpointError` for figures that are none, and for a folder that is not one of a sweep's cells."""
    # Files are removed there: it must lie inside of the sweep, whatever a file says.
    if not _FOLDER.fullmatch(cell.folder):
        raise CheckpointError(
            f'{file}: damaged or altered: the folder of {cell.name} is "{cell.folder}", expected cells/NAME. {advice}'
        )
    checked(cell.figures, f"{file}, {cell.name}", dict[str, _Found], advice=advice)
    checked(cell.tasks, f"{file}, {cell.name}", _Answers, advice=advice)


class _Sources(TypedDict):
    """What is read of a cell's manifest."""

    source_tensors: dict[str, str]


class SweepFolder:
    """The folder of a sweep. `sweep.json` has settings and cells; every cell has a folder with its own `cell.json`.

    Whatever is written appears under its name when it is complete, so that a process can end at any time.
    """

    def __init__(self, path: str | os.PathLike[str], model: str | os.PathLike[str]) -> None:
        """Raises `CheckpointError` for a folder that holds something else, and where nothing can be written."""
        self.path = Path(path).expanduser().absolute()
        check_apart(path, model)
        check_writable(path)
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{path}: is a file; a sweep needs a folder. Choose another name.")
        others = {LOCK_FILE} | {file.name for file in self.path.glob("*") if _LEFTOVER.search(file.name)}
        if self.found() is None and self.path.exists() and {file.name for file in self.path.iterdir()} - others:
            raise CheckpointError(
                f"{path}: is not empty and holds no {SWEEP_FILE}, so it is not the folder of a sweep. Choose another."
            )

    def found(self) -> Sweep | None:
        """The sweep as the files have it, or None where none was started. Raises `CheckpointError` for damaged ones."""
        file = self.path / SWEEP_FILE
        if not file.exists():
            return None
        sweep = Sweep.read(file)
        return dataclasses.replace(sweep, cells=[self.cell(cell) for cell in sweep.cells])

    def cell(self, cell: Cell) -> Cell:
        """A cell as its own file has it. Raises `CheckpointError` for a damaged one."""
        # A process that was killed may have finished a cell, and not have told sweep.json.
        folder = self.path / cell.folder
        if folder.is_symlink() or folder.parent.is_symlink():
            link = folder if folder.is_symlink() else folder.parent
            raise CheckpointError(f"{link}: is a link, and a sweep keeps its cells in its own folder. Remove the link.")
        file = folder / CELL_FILE
        if not file.exists():
            return cell
        advice = f"Remove {file.parent} to run this cell again."
        found: Cell = read_json(file, Cell, advice=advice)
        _check_cell(found, file, advice)
        if found.folder != cell.folder:
            raise CheckpointError(f"{file}: is of {found.folder}, expected {cell.folder}. {advice}")
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder meanwhile; what killed ones left half-written is removed."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK_FILE)
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]  # innermost first
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise CheckpointError(
                    f"{self.path}: another process is running this sweep. Wait for it, or choose another folder."
                ) from None
        try:
            self.clean()
            yield
        finally:
            if not (self.path / SWEEP_FILE).exists():
                (self.path / LOCK_FILE).unlink(missing_ok=True)
                with suppress(OSError):
                    for folder in made:
                        folder.rmdir()
            lock.release()

    def clean(self) -> None:
        """Remove what processes that were killed have left half-written."""
        cells = [] if (self.path / "cells").is_symlink() else self.path.glob("cells/*/")
        for folder in (self.path, *(cell for cell in cells if not cell.is_symlink())):
            for entry in list(folder.iterdir()):
                if _LEFTOVER.search(entry.name) and not _UNFINISHED.match(entry.name):
                    delete(entry)

    def write(self, name: str, text: str) -> None:
        """Write a file of the sweep, whole or not at all."""
        write_whole(self.path / name, text)

    def write_cell(self, cell: Cell) -> None:
        """Write what is known of a cell."""
        self._write_json(f"{cell.folder}/{CELL_FILE}", dataclasses.asdict(cell))

    def write_sweep(self, sweep: Sweep) -> None:
        """Write what is known of the whole sweep."""
        self._write_json(SWEEP_FILE, sweep.to_json())

    def _write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(redacted(plain(value)), indent=1, allow_nan=False) + "\n")

    def checkpoint(self, cell: Cell) -> Path:
        """Where the pruned checkpoint of a cell is, or would be."""
        return self.path / cell.folder / CHECKPOINT

    def source_tensors(self, cells: Sequence[Cell]) -> dict[str, str]:
        """sha256 of the source's planned tensors as the first of these cells with a manifest saw them."""
        for cell in cells:
            file = self.path / cell.folder / FILE_NAME
            if file.exists():
                found: dict[str, str] = read_json(file, _Sources)["source_tensors"]
                return found
        return {}

    def drop_checkpoint(self, cell: Cell) -> None:
        """Remove the checkpoint of a cell, if it has one."""
        folder = self.checkpoint(cell)
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            # Under another name first: what is half removed must not be taken for a checkpoint.
            old = folder.rename(folder.with_name(f"{folder.name}.old"))
            delete(old)


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there when it is whole. Raises `CheckpointError` where it cannot be written."""
    partial = file.with_name(f"{file.name}.partial")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", newline="", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)


def check_settings(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], finished: Collection[str]) -> None:
    """Raise `CheckpointError` for a setting that differs from the one that the folder's cells were made with.

    Methods, patterns and data sets may be added. A method may be changed as long as no cell is `finished` with it.
    An entry that only one side has is no difference.
    """
    growing = ("methods", "digests", "bos_choices", "data", "agreement", "tasks")
    for key, value in new.items():
        if key in old and key not in growing and old[key] != value:
            raise _changed(folder, f"--{key.replace('_', '-')}", old[key], value)
    for label, method in new["methods"].items():
        if label in old["methods"] and label in finished:
            _check_method(folder, label, old["methods"][label], method)


def _check_method(folder: Path, label: str, held: Mapping[str, Any], method: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` when a label stands for another method, other options or other code than before."""
    if held["name"] != method["name"]:
        raise _changed(folder, f"--methods {label} for", held["name"], method["name"], label)
    for option in sorted({*held["options"], *method["options"]}):
        before, now = (side["options"].get(option) for side in (held, method))
        if before != now:
            raise _changed(folder, f"--option {label}.{option}", before, now, label)
    changed = difference(held.get("fingerprint", {}), method["fingerprint"])
    if changed is not None:
        raise CheckpointError(
            f"{folder}: {label} is not the method any more that its finished cells were made with: {changed}. Run them "
            f"again with --again {label}, give the new one a label of its own (--methods NEW={label}), or choose "
            "another folder."
        )


def _changed(folder: Path, setting: str, old: Any, new: Any, label: str | None = None) -> CheckpointError:
    label_it = ""
    if label is not None:
        label_it = f", give this variant a label of its own: --methods NAME={label}, run it again with --again {label}"
    return CheckpointError(
        f"{folder}: this sweep was started with {setting} {_spoken(old)}, got {_spoken(new)}. All cells of a sweep "
        f"have the same settings: go on with the old value{label_it}, or choose another folder."
    )


def _spoken(value: Any) -> str:
    if value is None or value == []:
        return "left out"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def pattern_text(pattern: Pattern) -> str:
    """What tables call a pattern: "50%", "50% per row", "2:4"."""
    if isinstance(pattern, Unstructured):
        return f"{_percent(pattern.sparsity)}%" + (f" per {pattern.per}" if pattern.per else "")
    return str(pattern)


def _percent(sparsity: float) -> str:
    # Exact: the decimal that was written, so that two sparsities never share a name.
    percent = Decimal(str(sparsity)) * 100
    if len(format(percent, "f")) > 24:
        return format(percent, "e")
    return format(percent.normalize(), "f")


def cell_name(label: str, pattern: Pattern) -> str:
    """A file name for a cell, legal on every system and different for different cells: "wanda-50", "wanda-2of4"."""
    if isinstance(pattern, Unstructured):
        end = f"{_percent(pattern.sparsity)}{pattern.per or ''}".replace("-", "_")
    elif isinstance(pattern, NM):
        end = f"{pattern.n}of{pattern.m}"
    else:
        end = legal_name(str(pattern)).replace("-", "_")
    # No hyphen is left in `end`, so that the last one is where the label ends.
    return f"{legal_name(label)}-{end}"


def legal_name(text: str) -> str:
    """The text, or, where systems disagree about it (capitals, dots, other signs, length), a likeness and a digest."""
    if re.fullmatch(r"[a-z0-9_][a-z0-9_+-]{0,63}", text):
        return text
    likeness = re.sub(r"[^a-z0-9_+-]", "_", text.lower())[:48]
    return f"{likeness}~{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def plain(value: Any) -> Any:
    """The value as plain JSON; a number that is not finite becomes null, since JSON knows none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else str(value)
