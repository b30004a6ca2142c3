"""The tables of a pruned checkpoint: its matrices, where the time went, and the settings of the run."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.filesize import decimal

from secateur.record.card import patterns
from secateur.record.manifest import Manifest
from secateur.report.masks import Group, MaskReport
from secateur.report.structure import Structure
from secateur.report.tables import Cell, Table, count, number, percent, share, text


def kinds(manifest: Manifest, found: Sequence[Group]) -> Table:
    """A row for each kind of matrix: how many, what was asked, what the files hold."""
    rows = []
    for kind in found:
        entries = [manifest.matrices[matrix.name] for matrix in kind.matrices]
        shapes = dict.fromkeys(f"{matrix.shape[0]:,} × {matrix.shape[1]:,}" for matrix in kind.matrices)
        seen = min((entry["tokens"] for entry in entries if entry.get("tokens") is not None), default=None)
        rows.append(
            [
                text(kind.label),
                count(len(entries)),
                Cell(", ".join(shapes), kind.matrices[0].weights),
                text("; ".join(patterns(entries))),
                percent(kind.sparsity),
                Cell("none") if seen is None else count(seen),
            ]
        )
    columns = ["kind of matrix", "count", "out × in", "pattern asked", "zeros", "tokens seen, at least"]
    return Table("kinds", "By kind of matrix", columns, rows)


_SIDES = ["column excess", "column ratio", "zero columns", "row excess", "row ratio", "zero rows"]


def _side(side: Structure) -> list[Cell]:
    """Cells of one side of a mask: excess, ratio with its spread by chance, lines that are zero from end to end."""
    empty = f"{side.empty:,} ({share(side.empty / side.lines, 1)})" if side.empty else "0"
    return [percent(side.excess), number(side.ratio, ".2f", side.ratio_error), Cell(empty, side.empty)]


def structure(found: Sequence[Group]) -> Table:
    """A row for each kind of matrix: structure against chance of columns and rows."""
    rows = [[text(kind.label), *_side(kind.columns), *_side(kind.rows)] for kind in found]
    caption = "Structure by kind; ± is the standard deviation of the ratio among random masks"
    return Table("structure-kinds", caption, ["kind of matrix", *_SIDES], rows, sortable=True)


def every_matrix(matrices: Sequence[MaskReport]) -> Table:
    """A row for each matrix."""
    with_error = any(matrix.reconstruction_error is not None for matrix in matrices)
    rows = [
        [
            text(matrix.name),
            Cell(str(matrix.block), matrix.block),
            percent(matrix.sparsity),
            *_side(matrix.columns),
            *_side(matrix.rows),
            *([number(matrix.reconstruction_error, ".3g")] if with_error else []),
        ]
        for matrix in matrices
    ]
    columns = ["matrix", "block", "zeros", *_SIDES, *(["reconstruction error"] if with_error else [])]
    return Table("matrices", "A row for each matrix", columns, rows, sortable=True, long=len(rows) > 16)


def seconds(manifest: Manifest) -> Table:
    """Where the time went, the longest part first."""
    total = manifest.seconds.get("total", 0.0)
    parts = sorted(((part, value) for part, value in manifest.seconds.items() if part != "total"), key=lambda p: -p[1])
    rows = [[text(part), number(value, ".2f"), percent(value / total if total else None, 1)] for part, value in parts]
    return Table("seconds", "Seconds by part", ["part", "seconds", "of the total"], rows)


def recovery(manifest: Manifest) -> Table | None:
    """The record of training after pruning: its single values, and the perplexities that it measured."""
    if manifest.recovery is None:
        return None
    record = {key: value for key, value in manifest.recovery.items() if isinstance(value, str | int | float)}
    measured = (manifest.recovery.get("perplexity") or {}).items()
    figures = {f"perplexity, {key}": f"{value:.3f}" for key, value in measured if isinstance(value, float)}
    command = manifest.recovery.get("command")
    return pairs("recovered", "Recovery", figures | record | {"command": shlex.join(command) if command else None})


def provenance(manifest: Manifest) -> list[Table]:
    """Source, calibration, settings and versions."""
    source = dict(manifest.source)
    headers = source.pop("headers", None) or {}
    made = [pairs("source", "Source", source | {f"header of {name}, sha256": value for name, value in headers.items()})]
    if manifest.calibration is not None:
        calibration = dict(manifest.calibration)
        parts = calibration.pop("sources", [])
        calibration["tokens, sha256"] = calibration.pop("digest", None)
        made.append(pairs("calibration", "Calibration", calibration))
        for place, part in enumerate(parts):
            caption = "Text" if len(parts) == 1 else f"Text {place + 1} of {len(parts)}"
            facts = {key: decimal(value) if key == "bytes" else value for key, value in part.items()}
            made.append(pairs(f"text-{place + 1}", caption, facts))
    made.append(pairs("run", "Settings", manifest.settings | {"date": manifest.created}))
    made.append(pairs("versions", "Versions", manifest.versions))
    return made


def pairs(name: str, caption: str, values: Mapping[str, Any]) -> Table:
    """A table of names and values; those without a value are left out."""
    known = {key: value for key, value in values.items() if value is not None and value not in ({}, [])}
    rows = [[text(key.replace("_", " ")), text(_plain(value))] for key, value in known.items()]
    return Table(name, caption, ["what", "value"], rows, headed=False)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)
