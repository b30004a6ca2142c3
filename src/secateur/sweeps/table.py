"""The papers' table of a sweep: a row for each method, a column for each pattern, one table for each data set."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from secateur.calibration.text import bos_text
from secateur.sweeps.answers import best, by_task, shown
from secateur.sweeps.best import best_lines
from secateur.sweeps.draws import Figure, Mean, drawn_cells, figure_text, seeds_text
from secateur.sweeps.folder import Sweep

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


Kind = tuple[str, str]  # a method and a pattern
DENSE: Kind = ("dense", "")


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
    metrics = {task: shown(row) for task, row in dense.items()}
    figures: dict[str, dict[Kind, Figure]] = {}
    for task, metric in metrics.items():
        level = dense[task]["metrics"][metric]
        figures[f"{task}, {metric}"] = {DENSE: Figure(level["value"], None, level["error"])} | {
            (mean.method, mean.pattern): mean.value
            for mean in sweep.task_means
            if (mean.task, mean.metric) == (task, metric)
        }
    return table_of_kinds(title, figures, 4, [partial(best, metric=metric) for metric in metrics.values()])


def table_of_kinds(
    title: str,
    figures: Mapping[str, Mapping[Kind, Figure]],
    decimals: int,
    winners: Sequence[Callable[[list[float]], float]],
) -> SweepTable:
    """A table with a row for each method in each pattern, patterns together, and these columns of figures.

    The best of a column is that of its own `winners` among all methods in a pattern. Deviations between draws and
    errors are shown where any figure has one of several draws.
    """
    known = list(dict.fromkeys(kind for own in figures.values() for kind in own))
    patterns = list(dict.fromkeys(pattern for _, pattern in known))
    drawn = is_drawn(figures)

    def entry(own: Mapping[Kind, Figure], kind: Kind, winner: Callable[[list[float]], float]) -> Entry:
        figure = own.get(kind, Figure())
        if figure.mean is None:
            return Entry("")
        rivals = [held.mean for (_, pattern), held in own.items() if pattern == kind[1] and held.mean is not None]
        text = figure_text(figure if drawn else Figure(figure.mean), decimals)
        return Entry(text, len(rivals) > 1 and figure.mean == winner(rivals))

    rows = [
        (
            ", ".join(filter(None, kind)),
            [entry(own, kind, winner) for own, winner in zip(figures.values(), winners, strict=True)],
        )
        for kind in sorted(known, key=lambda kind: patterns.index(kind[1]))
    ]
    return SweepTable(title, list(figures), rows, "method, pattern")


def is_drawn(figures: Mapping[str, Mapping[Kind, Figure]]) -> bool:
    """Whether any of them is that of several draws."""
    return any(figure.deviation is not None for own in figures.values() for figure in own.values())


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
    """The tables in Markdown, the best of each column bold; under them what they come to, and what failed and why."""
    failures = [f"{cell.name} failed: {cell.error}" for cell in sweep.failed]
    return in_markdown(sweep_tables(sweep), [*best_lines(sweep), *failures])


def in_markdown(tables: Sequence[SweepTable], remarks: Sequence[str]) -> str:
    """Tables in Markdown, the best of each column bold, and under them a list of remarks."""
    parts = []
    for table in tables:
        lines = [table.title, "", _line([table.first, *table.columns]), "|---|" + "---:|" * len(table.columns)]
        for name, entries in table.rows:
            lines.append(_line([name, *(f"**{entry.text}**" if entry.best else entry.text for entry in entries)]))
        parts.append("\n".join(lines))
    if remarks:
        parts.append("\n".join(f"- {remark}" for remark in remarks))
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
    means = sweep.means
    for key, group in drawn_cells(sweep.cells).items():
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
