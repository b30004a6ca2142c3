"""The papers' table of a sweep: a row for each method, a column for each pattern, one table for each data set."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.calibration.text import bos_text
from secateur.sweeps.answers import best, by_task, shown
from secateur.sweeps.draws import Figure, Mean, figure_text, seeds_text
from secateur.sweeps.folder import Cell, Sweep

# The figures of a mean over draws, and the columns of their standard errors.
ERRORS = {
    "perplexity": "perplexity_error",
    "nats": None,
    "difference": "difference_error",
    "kl": "kl_error",
    "top1": "top1_error",
}
CSV_COLUMNS = (
    *("method", "pattern", "sparsity", "status", "data", "windows", "length", "perplexity", "perplexity_error"),
    *("nats", "difference", "difference_error", "kl", "kl_error", "top1", "top1_error", "error", "seed", "draws"),
    *(f"{name}_deviation" for name in ERRORS),
)


@dataclass(frozen=True)
class Entry:
    """One number of a table, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class SweepTable:
    """One table: a title, the headings of its columns after the first one, and rows: a name and an entry for each.

    Tables of a text have methods for rows and patterns for columns; that of tasks has a row for each method in each
    pattern.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Entry]]]
    first: str = "method"


def sweep_tables(sweep: Sweep) -> list[SweepTable]:
    """Perplexity on each data set, the dense model first; where agreement was asked for, the divergence from it too;
    and the tasks.

    Of several draws of calibration samples entries are the mean, the standard deviation between draws, and in brackets
    the standard error over windows.
    """
    tables, means = [], sweep.means
    drawn = max((mean.cells for mean in means), default=1) > 1
    over = (
        f", mean ± standard deviation over {seeds_text([cell.seed for cell in sweep.cells])}, in brackets the standard "
        "error over windows"
    )
    for data, dense in sweep.dense.items():
        bos = bos_text(dense.get("provenance", {}))
        where = f"{data}, {dense['windows']} windows of {dense['length']} tokens" + (f", {bos}" if bos else "")
        where += over if drawn else ""
        own = [mean for mean in means if mean.data == data]
        level = Figure(dense["perplexity"], None, dense.get("perplexity_error"))
        perplexities = {(mean.method, mean.pattern): mean.perplexity for mean in own}
        tables.append(_table(f"Perplexity, {where}", own, perplexities, 2, drawn, level))
        if any(mean.kl.mean is not None for mean in own):
            divergences = {(mean.method, mean.pattern): mean.kl for mean in own}
            title = f"Divergence from the dense model in nats per token, {where}"
            tables.append(_table(title, own, divergences, 4, drawn))
    answered = by_task(sweep.dense_tasks)
    if answered:
        title = "Tasks" + (f", the first {limit} documents of each" if (limit := sweep.settings.get("limit")) else "")
        tables.append(_tasks_table(title + (over.replace("windows", "documents") if drawn else ""), sweep, answered))
    return tables


def _tasks_table(title: str, sweep: Sweep, dense: Mapping[str, Any]) -> SweepTable:
    # A task, and the metric that is shown of it.
    columns = {task: shown(row) for task, row in dense.items()}
    means = [mean for mean in sweep.task_means if columns.get(mean.task) == mean.metric]
    drawn = any(mean.draws > 1 for mean in means)
    values = {(mean.method, mean.pattern, mean.task): mean.value for mean in means}
    kinds = list(dict.fromkeys((cell.method, cell.pattern) for cell in sweep.cells))

    def entry(method: str, pattern: str, task: str) -> Entry:
        figure = values.get((method, pattern, task), Figure())
        if figure.mean is None:
            return Entry("")
        rivals = [
            held.mean
            for (_, own, other), held in values.items()
            if (own, other) == (pattern, task) and held.mean is not None
        ]
        text = figure_text(figure if drawn else Figure(figure.mean), 4)
        return Entry(text, figure.mean == best(rivals, columns[task]))

    level = [row["metrics"][columns[task]] for task, row in dense.items()]
    rows = [("dense", [Entry(_task_text(own["value"], own["error"] if drawn else None)) for own in level])]
    rows += [
        (f"{method}, {pattern}", [entry(method, pattern, task) for task in columns])
        for pattern in dict.fromkeys(pattern for _, pattern in kinds)
        for method, own in kinds
        if own == pattern and any((method, pattern, task) in values for task in columns)
    ]
    return SweepTable(title, [f"{task}, {metric}" for task, metric in columns.items()], rows, "method, pattern")


def _task_text(value: float | None, error: float | None) -> str:
    return figure_text(Figure(value, None, error), 4)


def _table(
    title: str,
    means: Sequence[Mean],
    figures: Mapping[tuple[str, str], Figure],
    decimals: int,
    drawn: bool,
    dense: Figure | None = None,
) -> SweepTable:
    # Unstructured patterns by sparsity, then the others as they came.
    patterns = {mean.pattern: mean.sparsity for mean in means}
    columns = sorted(patterns, key=lambda pattern: ("%" not in pattern, patterns[pattern]))
    groups = {(mean.method, mean.pattern): mean for mean in means}
    values = {key: figure.mean for key, figure in figures.items() if figure.mean is not None}
    rivals = {column: [value for (_, pattern), value in values.items() if pattern == column] for column in columns}

    def entry(method: str, column: str) -> Entry:
        group, value = groups.get((method, column)), values.get((method, column))
        if group is None or value is None:
            return Entry(group.status if group is not None and group.status != "done" else "")
        text = figure_text(figures[method, column] if drawn else Figure(value), decimals)
        missing = f", {group.draws} of {group.cells} draws" if group.draws < group.cells else ""
        return Entry(text + missing, len(rivals[column]) > 1 and value == min(rivals[column]))

    rows = []
    if dense is not None:
        text = figure_text(dense if drawn else Figure(dense.mean), decimals)
        rows.append(("dense", [Entry(text)] * len(columns)))
    rows += [
        (method, [entry(method, column) for column in columns])
        for method in dict.fromkeys(mean.method for mean in means)
    ]
    return SweepTable(title, columns, rows)


def markdown(sweep: Sweep) -> str:
    """The tables in Markdown, the best of each column bold, and under them what failed and why."""
    return in_markdown(sweep_tables(sweep), [f"{cell.name} failed: {cell.error}" for cell in sweep.failed])


def in_markdown(tables: Sequence[SweepTable], failures: Sequence[str]) -> str:
    """Tables in Markdown, the best of each column bold, and under them what failed and why."""
    parts = []
    for table in tables:
        lines = [table.title, "", _line([table.first, *table.columns]), "|---|" + "---:|" * len(table.columns)]
        for name, entries in table.rows:
            lines.append(_line([name, *(f"**{entry.text}**" if entry.best else entry.text for entry in entries)]))
        parts.append("\n".join(lines))
    if failures:
        parts.append("\n".join(f"- {failure}" for failure in failures))
    return "\n\n".join(parts) + "\n"


def latex(sweep: Sweep) -> str:
    """The tables in LaTeX, with the rules of the package booktabs; the best of each column bold."""
    return in_latex(sweep_tables(sweep))


def in_latex(tables: Sequence[SweepTable]) -> str:
    """Tables in LaTeX, with the rules of the package booktabs; the best of each column bold."""
    parts = []
    for table in tables:
        rows = [
            [_tex(name), *(f"\\textbf{{{_tex(entry.text)}}}" if entry.best else _tex(entry.text) for entry in entries)]
            for name, entries in table.rows
        ]
        lines = [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{_tex(table.title)}}}",
            f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            "\\toprule",
            " & ".join([table.first, *map(_tex, table.columns)]) + r" \\",
            "\\midrule",
            *(" & ".join(row) + r" \\" for row in rows),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
        ]
        parts.append("\n".join(lines))
    return "% Needs \\usepackage{booktabs}\n" + "\n\n".join(parts) + "\n"


_TEX: dict[str, str | int | None] = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
}


def _tex(text: str) -> str:
    return text.translate(str.maketrans(_TEX))


def _line(words: list[str]) -> str:
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


def table_csv(sweep: Sweep) -> str:
    """One line for the dense model and each cell on each data set; errors of one window alone are left empty.

    Cells of several draws are followed by their mean, which has the number of `draws` and the deviations between them.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for data, figures in sweep.dense.items():
        writer.writerow({"method": "dense", "sparsity": 0.0, "status": "done", **figures, "data": data})
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in sweep.cells:
        groups.setdefault((cell.method, cell.pattern), []).append(cell)
    means = sweep.means
    for key, group in groups.items():
        for cell in group:
            for data in sweep.data if cell.status != "done" else cell.figures:
                own = cell.figures.get(data, {})
                agreement = {key: value for key, value in own.get("agreement", {}).items() if key in CSV_COLUMNS}
                writer.writerow({**own, **agreement, **vars(cell), "data": data})
        for mean in means:
            if mean.cells > 1 and (mean.method, mean.pattern) == key:
                writer.writerow(_mean_row(sweep, mean))
    return stream.getvalue()


def _mean_row(sweep: Sweep, mean: Mean) -> dict[str, Any]:
    windows = {name: sweep.dense.get(mean.data, {}).get(name) for name in ("windows", "length")}
    row = {**vars(mean), **windows}
    for name, error in ERRORS.items():
        figure: Figure = row.pop(name)
        row |= {name: figure.mean, f"{name}_deviation": figure.deviation}
        if error is not None:
            row[error] = figure.error
    return row
