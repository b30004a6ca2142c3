"""The report of a pruned checkpoint: what was done, what it did to the matrices, and where the zeros lie."""

import csv
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from secateur.files.packed import is_packed, open_files
from secateur.plans.allocated import told
from secateur.record.card import papers, patterns, source_name
from secateur.record.manifest import Manifest, cautions, read_manifest
from secateur.report import checkpoint_tables
from secateur.report.charts import Drawn, check_installed
from secateur.report.checkpoint_charts import depth_charts
from secateur.report.evaluations import Evaluation, data_name, tables, verdict_of
from secateur.report.masks import Group, MaskReport, groups, read_masks
from secateur.report.page import FOLDER, PAGE, render, report_folder
from secateur.report.tables import share
from secateur.runs.events import Progress, seconds_text


def build(
    pruned: str | os.PathLike[str],
    evaluations: Sequence[Evaluation] = (),
    progress: Progress = lambda stage, done, total: None,
) -> Path:
    """The page of a pruned checkpoint, written to its folder `report` together with its pictures.

    `evaluations` are mappings with `kind` ("perplexity", "agreement", "tasks", or any other whose result has `rows`),
    `key` and `result`, the JSON of what an evaluation returned. The checkpoint is read one tensor at a time. The
    folder appears under its name when it is complete, and replaces an earlier report.

    Raises `CheckpointError` for what is no pruned checkpoint or cannot be written to, and `SecateurError` when the
    libraries of reports are missing.
    """
    check_installed()
    folder = Path(pruned).expanduser()
    manifest = read_manifest(folder)
    with report_folder(folder) as made:
        matrices = read_masks(folder, manifest, lambda done, total: progress("reading", done, total))
        shown = [matrix for matrix in matrices if matrix.picture is not None]
        found = depth_charts(manifest, matrices)
        charts = {}
        for done, (name, chart) in enumerate(found.items()):
            charts[name] = chart.draw(made)
            progress("charts", done + 1, len(found))
        html = render("checkpoint.html", _content(folder, manifest, matrices, shown, evaluations, charts))
        (made / PAGE).write_text(html, encoding="utf-8")
        _write_csv(made / "matrices.csv", matrices)
        (made / "masks").mkdir()
        for done, matrix in enumerate(shown):
            _save_picture(made / "masks" / f"{matrix.name.replace('/', '_')}.png", matrix)
            progress("pictures", done + 1, len(shown))
    return folder / FOLDER / PAGE


def _content(
    folder: Path,
    manifest: Manifest,
    matrices: Sequence[MaskReport],
    shown: Sequence[MaskReport],
    evaluations: Sequence[Evaluation],
    charts: Mapping[str, Drawn],
) -> dict[str, Any]:
    """What the template fills in."""
    kinds = groups(matrices, lambda matrix: matrix.label)
    whole = Group("all", matrices)
    weights = sum(math.prod(record.shape) for record in open_files(folder).tensors.values())
    zeros, planned = sum(matrix.zeros for matrix in matrices), sum(matrix.weights for matrix in matrices)
    evaluated = tables(evaluations)
    source, text = str(manifest.source.get("path")), manifest.calibration
    widths = [str(m) for m in sorted({e["pattern"]["m"] for e in manifest.matrices.values() if "m" in e["pattern"]})]
    part = (
        "" if len(shown) == len(matrices) else f"{len(shown)} of {len(matrices):,} matrices, evenly chosen in each kind"
    )
    contents = [
        ("evaluations", "Evaluations", bool(evaluated)),
        ("sparsity", "Sparsity", True),
        ("error", "Error by depth", "change" in charts or "error" in charts),
        ("recovery-heading", "Recovery", manifest.recovery is not None),
        ("masks", "Where the pruned weights sit", True),
        ("structure", "Structure", True),
        ("time", "Time", True),
        ("made", "How it was made", True),
    ]
    return {
        "kind": "Pruning report",
        "title": f"{source_name(manifest)}, pruned with {manifest.method}",
        "lead": f"{zeros:,} of {planned:,} planned weights in {len(matrices):,} matrices are zero: "
        f"{share(zeros / planned)} of them, and {share(zeros / weights, 1)} of all {weights:,} weights of the model."
        + (" Kept weights were trained afterwards." if manifest.recovery is not None else ""),
        "verdict": None if (found := verdict_of(folder.name, evaluations)) is None else found.sentence,
        "key_facts": [
            *_perplexity_fact(evaluations),
            *_agreement_fact(evaluations),
            ("Pattern", "; ".join(patterns(manifest.matrices.values()))),
            ("Calibration", f"{text.get('samples')} × {text.get('length')} tokens" if text is not None else "none"),
            ("Size of the weights", _size(folder)),
            *([] if is_packed(folder) else [("Speed", "that of the dense model")]),  # zeros are multiplied like others
            ("Time to prune", seconds_text(manifest.seconds.get("total", 0.0))),
        ],
        "warnings": [*_warnings(folder, matrices), *cautions(manifest)],
        "contents": [(anchor, name) for anchor, name, there in contents if there],
        "evaluations": evaluated,
        "sparsity_words": f"{_sparsity_words(matrices)} {told(manifest.settings.get('allocation') or {})}".strip(),
        "kinds": checkpoint_tables.kinds(manifest, kinds),
        "charts": charts,
        "recovery": checkpoint_tables.recovery(manifest),
        "group_words": f", within each group of {' or '.join(widths)} inputs of the N:M pattern" if widths else "",
        "structure_kinds": checkpoint_tables.structure([*kinds, whole]),
        "pictures_words": f"Pictured are {part}." if part else "",
        "table_words": "A name shows its picture." + (f" Listed are {part}; matrices.csv has all." if part else ""),
        "matrices": checkpoint_tables.every_matrix(shown),
        "seconds": checkpoint_tables.seconds(manifest),
        "command": shlex.join(manifest.command) if manifest.command else None,
        "provenance": checkpoint_tables.provenance(manifest),
        "verify": f"secateur verify {shlex.quote(str(folder))} --source {shlex.quote(source)}",
        "references": papers(manifest),
        "data": {"matrices": [_data(matrix) for matrix in shown]},
    }


def _perplexity_fact(evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    """The first perplexity there is, with the dense model's where both are known."""
    for kind in ("agreement", "perplexity"):
        for item in evaluations:
            if item["kind"] == kind:
                result = item["result"]
                before = f"{result['perplexity_dense']:.4g} → " if "perplexity_dense" in result else ""
                return [(f"Perplexity, {data_name(result)}", f"{before}{result['perplexity']:.4g}")]
    return []


def _agreement_fact(evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    """How often the first choice is the dense model's, on the first text that both were compared on."""
    found = next((item["result"] for item in evaluations if item["kind"] == "agreement"), None)
    return [] if found is None else [("Same first choice as dense", share(found["top1"], 1))]


def _size(folder: Path) -> str:
    """The bytes of the files of weights, and what unpacking or packing would change."""
    held = decimal(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    if not is_packed(folder):
        return f"{held}, zeros included"
    plain = sum(record.end - record.start for record in open_files(folder).tensors.values())
    return f"{held}, {decimal(plain)} unpacked"


def _sparsity_words(matrices: Sequence[MaskReport]) -> str:
    lowest, highest = (pick(matrices, key=lambda matrix: matrix.sparsity) for pick in (min, max))
    if highest.sparsity - lowest.sparsity < 5e-5:
        return f"Every matrix has the same share of zeros in the files: {share(highest.sparsity)}."
    return (
        f"From {share(lowest.sparsity)} in {lowest.name} to {share(highest.sparsity)} in {highest.name}, in the files."
    )


def _warnings(folder: Path, matrices: Sequence[MaskReport]) -> list[str]:
    found = []
    other = [matrix for matrix in matrices if matrix.zeros != matrix.recorded_zeros]
    if other:
        found.append(
            f"{len(other)} of {len(matrices)} matrices hold other numbers of zeros than the manifest records, first "
            f"{other[0].name}: {other[0].zeros:,}, recorded {other[0].recorded_zeros:,}. This page shows the files; "
            f"check them with: secateur verify {shlex.quote(str(folder))}"
        )
    empty = [matrix for matrix in matrices if matrix.zeros == matrix.weights]
    if empty:
        found.append(f"{len(empty)} matrices are zero from end to end, first {empty[0].name}.")
    return found


def _data(matrix: MaskReport) -> dict[str, Any]:
    """A matrix with a picture, as the page's script reads it."""
    sides = {"columns": matrix.columns, "rows": matrix.rows}
    assert matrix.picture is not None
    return {
        "name": matrix.name,
        "label": matrix.own_label,
        "block": matrix.block,
        "shape": list(matrix.shape),
        "sparsity": matrix.sparsity,
        **{side: {"excess": own.excess, "ratio": own.ratio, "empty": own.empty} for side, own in sides.items()},
        "scored": matrix.scored,
        "values": dict(matrix.values),
        "side": matrix.picture.side,
        "counts": matrix.picture.code,
    }


def _write_csv(file: Path, matrices: Sequence[MaskReport]) -> None:
    sides = ("excess", "ratio", "ratio_error", "empty")
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["name", "kind", "block", "out", "in", "zeros", "sparsity"]
            + [f"{side}_{value}" for side in ("columns", "rows") for value in sides]
            + ["reconstruction_error"]
        )
        for matrix in matrices:
            writer.writerow(
                [matrix.name, matrix.kind, matrix.block, *matrix.shape, matrix.zeros, matrix.sparsity]
                + [getattr(side, value) for side in (matrix.columns, matrix.rows) for value in sides]
                + [matrix.reconstruction_error]
            )


def _save_picture(file: Path, matrix: MaskReport) -> None:
    """The picture in shades of grey, black where all is kept, about 512 pixels on its longer side."""
    from PIL import Image

    assert matrix.picture is not None
    shares = matrix.picture.shares()
    times = max(1, round(512 / max(shares.shape)))
    grey = (255 * (1 - shares)).round().astype("uint8")
    Image.fromarray(grey.repeat(times, 0).repeat(times, 1)).save(file)
