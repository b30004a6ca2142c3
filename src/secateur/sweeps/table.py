"""The papers' table of a sweep: a row for each method, a column for each pattern, one table for each data set."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.calibration.text import bos_text
from secateur.sweeps.folder import Sweep

CSV_COLUMNS = (
    *("method", "pattern", "sparsity", "status", "data", "windows", "length", "perplexity", "perplexity_error"),
    *("nats", "difference", "difference_error", "kl", "kl_error", "top1", "top1_error", "error"),
)


@dataclass(frozen=True)
class Entry:
    """One number of a table, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class SweepTable:
    """One table: a title, the patterns, and for each method its name and an entry for each pattern."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Entry]]]


def sweep_tables(sweep: Sweep) -> list[SweepTable]:
    """Perplexity on each data set, the dense model first; where agreement was asked for, the divergence from it too."""
    tables = []
    for data, dense in sweep.dense.items():
        bos = bos_text(dense.get("provenance", {}))
        where = f"{data}, {dense['windows']} windows of {dense['length']} tokens" + (f", {bos}" if bos else "")
        own = {(cell.method, cell.pattern): cell.figures.get(data, {}) for cell in sweep.cells}
        perplexities = {key: figures.get("perplexity") for key, figures in own.items()}
        tables.append(_table(sweep, f"Perplexity, {where}", perplexities, dense["perplexity"], 2))
        if any("agreement" in figures for figures in own.values()):
            divergences = {key: figures.get("agreement", {}).get("kl") for key, figures in own.items()}
            title = f"Divergence from the dense model in nats per token, {where}"
            tables.append(_table(sweep, title, divergences, None, 4))
    return tables


def _table(sweep: Sweep, title: str, figures: Mapping[tuple[str, str], Any], dense: Any, decimals: int) -> SweepTable:
    # Unstructured patterns by sparsity, then the others as they came.
    cells = {(cell.method, cell.pattern): cell for cell in sweep.cells}
    patterns = {cell.pattern: cell.sparsity for cell in sweep.cells}
    columns = sorted(patterns, key=lambda pattern: ("%" not in pattern, patterns[pattern]))
    values = {key: value for key, value in figures.items() if value is not None}
    rivals = {column: [value for (_, pattern), value in values.items() if pattern == column] for column in columns}
    rows = [("dense", [Entry(f"{dense:.{decimals}f}")] * len(columns))] if dense is not None else []
    for method in dict.fromkeys(cell.method for cell in sweep.cells):
        entries = []
        for column in columns:
            value, cell = values.get((method, column)), cells.get((method, column))
            if value is not None:
                entries.append(Entry(f"{value:.{decimals}f}", len(rivals[column]) > 1 and value == min(rivals[column])))
            else:
                entries.append(Entry(cell.status if cell is not None and cell.status != "done" else ""))
        rows.append((method, entries))
    return SweepTable(title, columns, rows)


def markdown(sweep: Sweep) -> str:
    """The tables in Markdown, the best of each column bold, and under them what failed and why."""
    parts = []
    for table in sweep_tables(sweep):
        lines = [table.title, "", _line(["method", *table.columns]), "|---|" + "---:|" * len(table.columns)]
        for name, entries in table.rows:
            lines.append(_line([name, *(f"**{entry.text}**" if entry.best else entry.text for entry in entries)]))
        parts.append("\n".join(lines))
    if sweep.failed:
        parts.append("\n".join(f"- {cell.name} failed: {cell.error}" for cell in sweep.failed))
    return "\n\n".join(parts) + "\n"


def _line(words: list[str]) -> str:
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


def table_csv(sweep: Sweep) -> str:
    """One line for the dense model and each cell on each data set; errors of one window alone are left empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for data, figures in sweep.dense.items():
        writer.writerow({"method": "dense", "sparsity": 0.0, "status": "done", **figures, "data": data})
    for cell in sweep.cells:
        for data in sweep.data if cell.status != "done" else cell.figures:
            own = cell.figures.get(data, {})
            agreement = {key: value for key, value in own.get("agreement", {}).items() if key in CSV_COLUMNS}
            writer.writerow({**own, **agreement, **vars(cell), "data": data})
    return stream.getvalue()
