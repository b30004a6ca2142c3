"""The report of a sweep: perplexity over sparsity for each method, and tables of method by pattern."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.report.charts import Chart, Drawn, Series, check_installed
from secateur.report.checkpoint_tables import pairs
from secateur.report.evaluations import data_name
from secateur.report.page import FOLDER, PAGE, render, report_folder
from secateur.report.tables import Cell, Table, count, number, percent, text
from secateur.runs.events import Progress, seconds_text
from secateur.sweeps.answers import by_task, shown
from secateur.sweeps.best import best_lines
from secateur.sweeps.draws import Figure, figure_text
from secateur.sweeps.folder import SWEEP_FILE, Sweep


def build_sweep(folder: Path, progress: Progress = lambda stage, done, total: None) -> Path:
    """The page of a sweep, written to its folder `report` together with its pictures.

    Raises `CheckpointError` for a file `sweep.json` that cannot be read, and `SecateurError` when the libraries of
    reports are missing.
    """
    check_installed()
    found = Sweep.read(folder / SWEEP_FILE)
    sweep = found.to_json()
    with report_folder(folder) as made:
        charts: dict[str, Drawn | None] = {}
        for place, data in enumerate(_texts(sweep)):
            chart = _chart(sweep, data, place)
            charts[data] = None if chart is None else chart.draw(made)
            progress("charts", place + 1, len(_texts(sweep)))
        (made / PAGE).write_text(
            render("sweep.html", _content(sweep, charts) | {"best": best_lines(found)}), encoding="utf-8"
        )
    return folder / FOLDER / PAGE


def _done(sweep: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cell for cell in sweep["cells"] if cell["status"] == "done"]


def _drawn(sweep: Mapping[str, Any]) -> bool:
    """Whether cells were run for several draws of calibration samples."""
    return any(mean["cells"] > 1 for mean in sweep["means"])


def _texts(sweep: Mapping[str, Any]) -> list[str]:
    """The names of the texts, in order."""
    names = [*sweep["dense"], *(data for cell in _done(sweep) for data in cell["figures"])]
    return list(dict.fromkeys(names))


def _chart(sweep: Mapping[str, Any], data: str, place: int) -> Chart | None:
    """Perplexity over sparsity of the unstructured patterns, or None with fewer than two sparsities."""
    # A perplexity that is not finite is recorded as null, and has no place on a chart.
    points = [
        mean
        for mean in sweep["means"]
        if mean["data"] == data and ":" not in mean["pattern"] and mean["perplexity"]["mean"] is not None
    ]
    bar = "deviation" if _drawn(sweep) else "error"
    series = []
    for method in dict.fromkeys(mean["method"] for mean in points):
        own = sorted((mean for mean in points if mean["method"] == method), key=lambda mean: mean["sparsity"])
        figures = [mean["perplexity"] for mean in own]
        series.append(
            Series(
                method,
                [100 * mean["sparsity"] for mean in own],
                [figure["mean"] for figure in figures],
                [figure[bar] for figure in figures],
            )
        )
    if len({x for one in series for x in one.x}) < 2:
        return None
    dense = sweep["dense"].get(data)
    best = min(series, key=lambda one: one.y[-1])
    name = data_name({"data": data})
    return Chart(
        name=f"perplexity-{place + 1}",
        title=f"Perplexity on {name} by sparsity",
        summary=f"Perplexity on {name} of {', '.join(one.label for one in series)} over the share of weights removed. "
        f"At {best.x[-1]:g} % the lowest is {best.y[-1]:.4g}, by {best.label}."
        + (f" The dense model has {_spoken(dense, '.4g')}." if dense else ""),
        x="weights removed, per cent",
        y="perplexity",
        series=series,
        logarithmic=True,
        level=("dense", dense["perplexity"]) if dense and dense["perplexity"] is not None else None,
    )


def _content(sweep: Mapping[str, Any], charts: Mapping[str, Drawn | None]) -> dict[str, Any]:
    done = _done(sweep)
    methods = list(dict.fromkeys(cell["method"] for cell in sweep["cells"]))
    kinds = list(dict.fromkeys(cell["pattern"] for cell in sweep["cells"]))
    texts = []
    for place, (data, chart) in enumerate(charts.items()):
        dense = sweep["dense"].get(data)
        name = data_name({"data": data})
        texts.append(
            {
                "anchor": f"text-{place + 1}",
                "heading": f"Perplexity on {name}",
                "words": _words(dense),
                "chart": chart,
                "table": _grid(sweep, data, name, methods, kinds, place),
            }
        )
    seconds = sum(cell["seconds"] for cell in done)
    unfinished = [cell for cell in sweep["cells"] if cell["status"] != "done"]
    seeds = {cell["folder"]: f", seed {cell['seed']}" if _drawn(sweep) else "" for cell in unfinished}
    model = Path(sweep["model"]).name or sweep["model"]
    return {
        "kind": "Sweep of prunings",
        "title": f"{model}, {len(methods)} methods by {len(kinds)} patterns",
        "lead": f"{len(done)} of {len(sweep['cells'])} prunings of {model}, each from the dense model and "
        "evaluated on the same tokens.",
        "key_facts": [
            ("Methods", ", ".join(methods)),
            ("Patterns", ", ".join(kinds)),
            *(
                (f"Perplexity, dense, {data_name({'data': data})}", _spoken(figure, ".3f"))
                for data, figure in sweep["dense"].items()
            ),
            ("Time", seconds_text(seconds)),
        ],
        "warnings": [
            f"{len(unfinished)} runs are not done: "
            + ", ".join(
                f"{cell['method']} {cell['pattern']}{seeds[cell['folder']]} ({cell['status']})" for cell in unfinished
            )
            + ". Their places in the tables are empty."
        ]
        if unfinished
        else [],
        "contents": [
            *((part["anchor"], part["heading"]) for part in texts),
            *([("tasks", "Tasks")] if sweep.get("dense_tasks") else []),
            ("runs", "Every run"),
            ("settings", "Settings"),
        ],
        "texts": texts,
        "bars": "standard deviation over draws of the calibration samples"
        if _drawn(sweep)
        else "standard error over windows",
        "tasks": _tasks(sweep) if sweep.get("dense_tasks") else None,
        "runs": _runs(sweep, list(charts)),
        "settings": pairs("settings-table", "Common to all runs", _settings(sweep["settings"])),
    }


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with a line for each method, text and digest."""
    known = dict(settings)
    methods, digests, choices = (known.pop(name, {}) for name in ("methods", "digests", "bos_choices"))
    for label, method in methods.items():
        options = ", ".join(f"{key}={value}" for key, value in method["options"].items())
        known[f"method {label}"] = method["name"] + (f" ({options})" if options else "")
    known |= {f"digest of the {what}": digest for what, digest in digests.items()}
    return known | {f"BOS, {what}": choice for what, choice in choices.items()}


def _spoken(figure: Mapping[str, Any], digits: str) -> str:
    """A perplexity in words; one that is not finite is recorded as null."""
    return "no finite value" if figure["perplexity"] is None else format(figure["perplexity"], digits)


def _words(dense: Mapping[str, Any] | None) -> str:
    if dense is None:
        return "The dense model was not evaluated on this text."
    error = dense.get("perplexity_error")
    spread = f" ± {error:.3f}" if error is not None else ""
    windows = f"{dense['windows']:,} windows of {dense['length']:,} tokens"
    return f"The dense model has a perplexity of {_spoken(dense, '.3f')}{spread} on {windows}."


def _grid(
    sweep: Mapping[str, Any], data: str, name: str, methods: Sequence[str], kinds: Sequence[str], place: int
) -> Table:
    """Methods down, patterns across."""
    held = {
        (mean["method"], mean["pattern"]): Figure(**mean["perplexity"])
        for mean in sweep["means"]
        if mean["data"] == data
    }
    drawn = _drawn(sweep)
    rows = []
    for method in methods:
        figures = [held.get((method, kind), Figure()) for kind in kinds]
        cells = [
            Cell(figure_text(figure, 3), figure.mean) if drawn else number(figure.mean, ".3f", figure.error)
            for figure in figures
        ]
        rows.append([text(method), *cells])
    caption = f"Perplexity on {name}, " + (
        "mean ± standard deviation over draws of the calibration samples, in brackets the standard error over windows"
        if drawn
        else "with its standard error over windows"
    )
    return Table(f"grid-{place + 1}", caption, ["method", *kinds], rows, sortable=True)


def _tasks(sweep: Mapping[str, Any]) -> Table:
    """The metric that papers show of each task, and its paired difference from the dense model."""
    dense = by_task(sweep["dense_tasks"])
    columns = {task: shown(row) for task, row in dense.items()}
    drawn = any(mean["draws"] > 1 for mean in sweep["task_means"])
    held = {
        (mean["method"], mean["pattern"], mean["task"]): mean
        for mean in sweep["task_means"]
        if columns.get(mean["task"]) == mean["metric"]
    }

    def entry(figure: Figure, form: str) -> Cell:
        if drawn and figure.mean is not None:
            return Cell(figure_text(figure, 4), figure.mean)
        return number(figure.mean, form, figure.error)

    first: list[Cell] = []
    for task, row in dense.items():
        value = row["metrics"][columns[task]]
        first += [number(value["value"], ".4f", value["error"]), number(None, ".4f")]
    rows = [[text("dense"), text(""), *first]]
    for method, pattern in dict.fromkeys((method, pattern) for method, pattern, _ in held):
        cells: list[Cell] = []
        for task in columns:
            mean = held.get((method, pattern, task), {"value": {}, "difference": {}})
            cells += [entry(Figure(**mean["value"]), ".4f"), entry(Figure(**mean["difference"]), "+.4f")]
        rows.append([text(method), text(pattern), *cells])
    headings = [heading for task, metric in columns.items() for heading in (f"{task}, {metric}", "− dense")]
    limit = sweep["settings"].get("limit")
    caption = (
        "Tasks"
        + (f", the first {limit} documents of each" if limit else "")
        + (
            ", mean ± standard deviation over draws, in brackets the standard error over documents"
            if drawn
            else ", with standard errors over documents, those of differences paired"
        )
    )
    return Table("grid-tasks", caption, ["method", "pattern", *headings], rows, sortable=True)


def _runs(sweep: Mapping[str, Any], texts: Sequence[str]) -> Table:
    """A row for each run, with its paired difference from the dense model where the sweep has it."""
    drawn, rows = _drawn(sweep), []
    for cell in sweep["cells"]:
        row = [text(cell["method"]), text(cell["pattern"]), percent(cell["sparsity"])]
        row += [count(cell["seed"])] if drawn else []
        for data in texts:
            figure = cell["figures"].get(data, {})
            row.append(number(figure.get("perplexity"), ".3f"))
            row.append(number(figure.get("difference"), "+.4f", figure.get("difference_error")))
        rows.append([*row, number(cell["seconds"], ".1f"), text(cell["status"])])
    columns = ["method", "pattern", "sparsity", *(["seed"] if drawn else [])]
    for data in texts:
        columns += [f"perplexity, {data_name({'data': data})}", "nats − dense"]
    columns += ["seconds", "status"]
    return Table("every-run", "A row for each run", columns, rows, sortable=True, long=len(rows) > 16)
