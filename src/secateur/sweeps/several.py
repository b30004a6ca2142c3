"""The same sweep over several models: a sweep in a folder for each, and tables with a column for each model."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from secateur.errors import CheckpointError
from secateur.files.cache import keep_json
from secateur.files.reading import read_json
from secateur.shown import Shown
from secateur.sweeps.answers import best, by_task, shown
from secateur.sweeps.cells import SweepEvent
from secateur.sweeps.draws import Figure
from secateur.sweeps.folder import Cell, Sweep, SweepFolder, legal_name, write_whole
from secateur.sweeps.run import sweep
from secateur.sweeps.table import DENSE, Kind, SweepTable, in_latex, in_markdown, is_drawn, table_of_kinds

SWEEPS_FILE = "sweeps.json"

Model = str | os.PathLike[str]


@dataclass(frozen=True, repr=False)
class Sweeps(Shown):
    """The sweeps of several models, by the models' names."""

    folder: Path
    sweeps: Mapping[str, Sweep]

    @property
    def failed(self) -> list[tuple[str, Cell]]:
        """The cells that failed, each with the name of its model."""
        return [(name, cell) for name, own in self.sweeps.items() for cell in own.failed]

    def to_json(self) -> dict[str, Any]:
        """What `sweep.json` of each model holds, by name."""
        return {"models": {name: own.to_json() for name, own in self.sweeps.items()}}

    @classmethod
    def read(cls, folder: Path) -> "Sweeps":
        """The sweeps of a folder as far as they have come. Raises `CheckpointError` for damaged files."""
        found = {}
        for name, model in _models(folder).items():
            own = SweepFolder(folder / legal_name(name), model).found()
            if own is not None:
                found[name] = own
        return cls(folder, found)


class _Written(TypedDict):
    models: dict[str, str]


def sweep_models(
    models: Sequence[Model],
    *,
    output: str | os.PathLike[str],
    latex: bool = False,
    dry_run: bool = False,
    on_event: Callable[[SweepEvent], None] = lambda event: None,
    **options: Any,
) -> Sweeps:
    """`sweep` of each of these models, with the same options, in a folder of its own inside of `output`.

    There `table.md` (with `latex` also `table.tex`) has a table for each text, with a row for each method in each
    pattern and a column for each model, which is called by the last part of its path or hub id. Events have the name of
    their model. Before the first cell runs, every model is opened and every grid checked.

    Raises `CheckpointError` for two models of the same name and for a folder of something else, and what `sweep`
    raises.
    """
    names = model_names(models)
    folder = Path(output).expanduser().absolute()
    known = _models(folder)
    for name, model in names.items():
        if known.get(name, model) != model:
            raise CheckpointError(f"{folder}: {name} is {known[name]} there, got {model}. Choose another folder.")
    if not known and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder}: is not empty and holds no {SWEEPS_FILE}, so it is not the folder of sweeps of several models. "
            "Choose another."
        )
    for name, model in names.items():
        sweep(model, output=folder / legal_name(name), dry_run=True, **options)
    if dry_run:
        return Sweeps(folder, {})
    keep_json(folder / SWEEPS_FILE, {"models": known | names}, "the list of models", indent=1)
    for name, model in names.items():
        own = {"output": folder / legal_name(name), "latex": latex, "on_event": partial(_named, on_event, name)}
        sweep(model, **options | own | {"on_estimate": lambda estimate: None})
        found = Sweeps.read(folder)
        failures = [f"{model}, {cell.name} failed: {cell.error}" for model, cell in found.failed]
        write_whole(folder / "table.md", in_markdown(models_tables(found), failures))
        if latex:
            write_whole(folder / "table.tex", in_latex(models_tables(found)))
    return found


def _named(on_event: Callable[[SweepEvent], None], name: str, event: SweepEvent) -> None:
    on_event(replace(event, model=name))


def _models(folder: Path) -> dict[str, str]:
    file = folder / SWEEPS_FILE
    if not file.exists():
        return {}
    found: _Written = read_json(file, _Written, advice=f"Remove {folder} to start again.")
    return dict(found["models"])


def model_names(models: Sequence[Model]) -> dict[str, str]:
    """The models by the last part of their path or hub id. Raises `CheckpointError` for two of the same name."""
    paths = [os.fspath(model) for model in models]
    names = [Path(path).expanduser().name.removesuffix(".gguf") for path in paths]
    for name, count in Counter(map(legal_name, names)).items():
        if count > 1:
            own = ", ".join(path for path, called in zip(paths, names, strict=True) if legal_name(called) == name)
            raise CheckpointError(
                f"{own}: models of a sweep are told apart by the last part of their path, which is the same. Run each "
                "into a folder of its own."
            )
    return dict(zip(names, paths, strict=True))


def models_tables(found: Sweeps) -> list[SweepTable]:
    """Perplexity on each text and the shown metric of each task (of means over tasks alone where there are some): a row
    for each method in each pattern, a column for each model.
    """
    sweeps, made = found.sweeps, []
    for data in dict.fromkeys(data for own in sweeps.values() for data in own.dense):
        perplexities: dict[str, Mapping[Kind, Figure]] = {}
        lengths = []
        for name, own in sweeps.items():
            if (dense := own.dense.get(data)) is None:
                perplexities[name] = {}
                continue
            level = Figure(dense["perplexity"], None, dense.get("perplexity_error"))
            means = {(mean.method, mean.pattern): mean.perplexity for mean in own.means if mean.data == data}
            perplexities[name] = {DENSE: level, **means}
            lengths.append(f"{dense['windows']} windows of {dense['length']} tokens")
        made.append(_table(f"Perplexity, {data}, {', '.join(dict.fromkeys(lengths))}", perplexities, 2, min))
    answered = {name: by_task(own.dense_tasks) for name, own in sweeps.items()}
    rows = {task: row for own in answered.values() for task, row in own.items()}
    for task in [task for task, row in rows.items() if row["members"]] or list(rows):
        metric, values = shown(rows[task]), {}
        for name, own in sweeps.items():
            level = answered[name].get(task, {"metrics": {}})["metrics"].get(metric, {"value": None, "error": None})
            values[name] = {DENSE: Figure(level["value"], None, level["error"])} | {
                (mean.method, mean.pattern): mean.value
                for mean in own.task_means
                if (mean.task, mean.metric) == (task, metric)
            }
        made.append(_table(f"{task}, {metric}", values, 4, partial(best, metric=metric)))
    return made


def _table(
    title: str, figures: Mapping[str, Mapping[Kind, Figure]], decimals: int, winner: Callable[[list[float]], float]
) -> SweepTable:
    if is_drawn(figures):
        title += ", mean ± standard deviation over draws, in brackets the standard error of the evaluation"
    return table_of_kinds(title, figures, decimals, [winner] * len(figures))
