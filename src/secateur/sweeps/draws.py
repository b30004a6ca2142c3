"""Cells that differ in the draw of their calibration samples alone: means over draws, with two kinds of error."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.sweeps.folder import Cell, Figures

Windows = Sequence[float | None]  # a value of each window of the evaluation


@dataclass(frozen=True)
class Figure:
    """A figure over draws: its mean, the standard deviation between draws, the mean's standard error over windows.

    `deviation` is None for a single draw, `error` for a single window; all are None where a draw has no finite value.
    """

    mean: float | None = None
    deviation: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Mean:
    """What a method in a pattern comes to on a text: figures over the `draws` cells that are done, of `cells`."""

    method: str
    pattern: str
    sparsity: float
    data: str
    draws: int
    cells: int
    status: str  # of a cell that is not done, or else "done"
    perplexity: Figure = Figure()
    nats: Figure = Figure()
    difference: Figure = Figure()
    kl: Figure = Figure()
    top1: Figure = Figure()


def means(cells: "Sequence[Cell]", dense: "Figures", texts: Sequence[str]) -> list[Mean]:
    """Every method in every pattern on every text, in the order of the cells."""
    return [_mean(group, data, dense.get(data, {})) for data in texts for group in drawn_cells(cells).values()]


def drawn_cells(cells: "Sequence[Cell]") -> "dict[tuple[str, str], list[Cell]]":
    """By method and pattern, the cells that differ in their draw alone."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.pattern), []).append(cell)
    return groups


def _mean(group: "Sequence[Cell]", data: str, dense: Mapping[str, Any]) -> Mean:
    first = group[0]
    own = [cell.figures[data] for cell in group if data in cell.figures]
    status = next((cell.status for cell in group if cell.status != "done"), "done")
    facts = (first.method, first.pattern, first.sparsity, data, len(own), len(group), status)
    if not own:
        return Mean(*facts)
    nats = [figures["window_nats"] for figures in own]
    perplexities = [figures["perplexity"] for figures in own]
    agreements = [figures["agreement"] for figures in own if "agreement" in figures]
    if len(own) == 1:
        (only,) = own
        beside = only.get("agreement", {})
        return Mean(
            *facts,
            perplexity=Figure(only["perplexity"], None, only.get("perplexity_error")),
            nats=Figure(only.get("nats"), None, only.get("standard_error")),
            difference=Figure(only.get("difference"), None, only.get("difference_error")),
            kl=Figure(beside.get("kl"), None, beside.get("kl_error")),
            top1=Figure(beside.get("top1"), None, beside.get("top1_error")),
        )
    # To first order, a perplexity moves with the loss of a window by itself times that.
    scaled = [
        [None if value is None or perplexity is None else perplexity * value for value in windows]
        for windows, perplexity in zip(nats, perplexities, strict=True)
    ]
    whole = len(agreements) == len(own)
    return Mean(
        *facts,
        perplexity=_figure(perplexities, scaled),
        nats=_figure([figures["nats"] for figures in own], nats),
        difference=_figure([figures["difference"] for figures in own], nats, dense.get("window_nats")),
        kl=_figure([one["kl"] for one in agreements], [one["window_kl"] for one in agreements]) if whole else Figure(),
        top1=_figure([one["top1"] for one in agreements], [one["window_top1"] for one in agreements])
        if whole
        else Figure(),
    )


def _figure(values: Sequence[float | None], windows: Sequence[Windows], dense: Windows | None = None) -> Figure:
    """The figure of values of several draws, whose windows are the same; less those of the dense model where given."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Figure()
    base = dense if dense is not None else [0.0] * len(windows[0])
    averages = []
    for level, *draws in zip(base, *windows, strict=True):
        finite = [value for value in draws if value is not None]
        if level is None or len(finite) < len(draws):
            return Figure(fmean(known), stdev(known))
        averages.append(fmean(finite) - level)
    error = stdev(averages) / math.sqrt(len(averages)) if len(averages) > 1 else None
    return Figure(fmean(known), stdev(known), error)


def figure_text(figure: Figure, decimals: int) -> str:
    """Mean ± deviation between draws (error over windows), each where it is known; empty without a mean."""
    if figure.mean is None:
        return ""
    deviation = "" if figure.deviation is None else f" ± {figure.deviation:.{decimals}f}"
    error = "" if figure.error is None else f" ({figure.error:.{decimals}f})"
    return f"{figure.mean:.{decimals}f}{deviation}{error}"


def seeds_text(seeds: Sequence[int | None]) -> str:
    """The draws in words: "3 draws (seeds 0, 1, 2)"."""
    known = sorted({seed for seed in seeds if seed is not None})
    return f"{len(known)} draws (seeds {', '.join(map(str, known))})"
