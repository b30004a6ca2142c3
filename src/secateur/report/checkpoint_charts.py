"""The charts of a pruned checkpoint: what changes with depth."""

from collections.abc import Callable, Sequence

from secateur.record.manifest import Manifest
from secateur.report.charts import Chart, Series
from secateur.report.masks import Group, MaskReport, groups
from secateur.report.tables import share

ALIKE = 0.02  # sparsities that differ by less would make a flat chart; a sentence states them


def depth_charts(manifest: Manifest, matrices: Sequence[MaskReport]) -> dict[str, Chart]:
    """The charts over depth, by name: of what the run recorded, and of what differs between matrices."""
    found = {
        "sparsity": _sparsity(matrices),
        "change": _change(manifest),
        "recovery": _recovery(manifest),
        "reconstruction": _reconstruction(manifest),
        "error": _error(matrices),
        "columns": _structure(matrices, "column"),
        "rows": _structure(matrices, "row"),
    }
    return {name: chart for name, chart in found.items() if chart is not None}


def _sparsity(matrices: Sequence[MaskReport]) -> Chart | None:
    values = [matrix.sparsity for matrix in matrices]
    if max(values) - min(values) < ALIKE:
        return None
    return Chart(
        name="sparsity",
        title="Sparsity by block",
        summary="The share of zeros in the matrices of each kind, block by block, between "
        f"{share(min(values))} and {share(max(values))}.",
        y="share of zeros",
        series=_over_blocks(matrices, lambda group: group.sparsity),
        limits=(0.0, 1.0),
    )


def _change(manifest: Manifest) -> Chart | None:
    blocks = [block for block in manifest.blocks if block.get("output_change") is not None]
    if not blocks:
        return None
    highest = max(blocks, key=lambda block: block["output_change"])
    return Chart(
        name="output-change",
        title="Output change by block",
        summary=f"How far each block's output moved, relative to its norm; most in block {highest['index']}, by "
        f"{highest['output_change']:.3f}.",
        y="relative change of the output",
        series=[
            Series("output change", [block["index"] for block in blocks], [block["output_change"] for block in blocks])
        ],
    )


def _recovery(manifest: Manifest) -> Chart | None:
    """Held-out perplexity while the kept weights were trained."""
    points = [point for point in (manifest.recovery or {}).get("curve") or [] if point.get("perplexity") is not None]
    if len(points) < 2:
        return None
    return Chart(
        name="recovery",
        title="Recovery",
        summary="Perplexity on held-out windows while the kept weights were trained, from "
        f"{points[0]['perplexity']:.4g} at step {points[0]['step']} to {points[-1]['perplexity']:.4g} at step "
        f"{points[-1]['step']}.",
        x="step",
        y="held-out perplexity",
        series=[Series("held-out", [point["step"] for point in points], [point["perplexity"] for point in points])],
        logarithmic=True,
    )


def _reconstruction(manifest: Manifest) -> Chart | None:
    """Each block's held-out loss before and after reconstruction block by block."""
    blocks = [block for block in (manifest.recovery or {}).get("blocks") or [] if block["before"] > 0 < block["after"]]
    if len(blocks) < 2:
        return None
    least = min(blocks, key=lambda block: block["after"] / block["before"])
    places = [block["index"] for block in blocks]
    return Chart(
        name="block-loss",
        title="Recovery by block",
        summary="The loss of each block on held-out samples, relative to the dense block's outputs, "
        f"before and after its kept weights were tuned; block {least['index']} fell furthest, from "
        f"{least['before']:.3g} to {least['after']:.3g}.",
        y="held-out loss",
        series=[Series(label, places, [block[label] for block in blocks]) for label in ("before", "after")],
        logarithmic=True,
    )


def _error(matrices: Sequence[MaskReport]) -> Chart | None:
    known = [matrix for matrix in matrices if matrix.reconstruction_error is not None]
    if not known:
        return None
    errors = {matrix.name: matrix.reconstruction_error or 0.0 for matrix in known}
    worst = max(errors, key=lambda name: errors[name])
    return Chart(
        name="reconstruction-error",
        title="Reconstruction error by block",
        summary="The mean reconstruction error of the matrices of each kind, block by block; the largest of one matrix "
        f"is {errors[worst]:.3g} in {worst}.",
        y="reconstruction error",
        series=_over_blocks(known, lambda group: sum(errors[m.name] for m in group.matrices) / len(group.matrices)),
        logarithmic=min(errors.values()) > 0,
    )


def _structure(matrices: Sequence[MaskReport], side: str) -> Chart | None:
    """The excess of columns or rows over depth; None where there is none anywhere."""
    series = _over_blocks(matrices, lambda group: float(getattr(group, f"{side}s").excess))
    top, label = max((max(one.y), one.label) for one in series)
    if top == 0:
        return None
    return Chart(
        name=f"{side}-structure",
        title=f"{side.capitalize()} structure by block",
        summary=f"The standard deviation of the sparsity of {side}s beyond chance, for each kind of matrix, block by "
        f"block. The largest is {share(top, 1)}, in {label}.",
        y=f"excess of {side}s",
        series=series,
        limits=(0.0, max(0.05, 1.08 * top)),
    )


def _over_blocks(matrices: Sequence[MaskReport], value: Callable[[Group], float]) -> list[Series]:
    """A value of the matrices of each kind in each block, a line for each kind."""
    made = []
    for kind in groups(matrices, lambda matrix: matrix.label):
        blocks = groups(kind.matrices, lambda matrix: str(matrix.block))
        made.append(Series(kind.label, [int(block.label) for block in blocks], [value(block) for block in blocks]))
    return made
