"""Charts by matplotlib: for a page as SVG whose colours follow its style, and as files for papers."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree  # nosec B405

from secateur.errors import SecateurError
from secateur.report.tables import Cell, Table, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names of the page's colours, and their values on white paper; the page replaces these values by its own colours.
INK, FAINT, RULE = "#20262b", "#5b646b", "#d9d5cb"
SERIES = ("#1d5c4f", "#b4532a", "#3a5a94", "#86690f", "#7a3e72", "#4d5459", "#a32f4e", "#1f7488")
COLOURS = {"ink": INK, "faint": FAINT, "rule": RULE} | {f"series-{i + 1}": hex for i, hex in enumerate(SERIES)}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLES = ("-", "--", ":", "-.")
WIDE, NARROW = 7.6, 3.7  # inches at 96 pixels: a page's column, a telephone's


@dataclass(frozen=True)
class Series:
    """One line: points from left to right, with an error each where there are any."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float | None] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis. `summary` describes them in words; `level` is a horizontal line and its name.

    With `limits`, the lowest and highest y shown, the y axis is in per cent.
    """

    name: str
    title: str
    summary: str
    y: str
    series: Sequence[Series]
    x: str = "block"
    logarithmic: bool = False
    limits: tuple[float, float] | None = None
    level: tuple[str, float] | None = None

    @property
    def table(self) -> Table:
        """The numbers that are drawn."""
        places = sorted({x for series in self.series for x in series.x})
        held = [dict(zip(series.x, series.y, strict=True)) for series in self.series]
        rows = [[Cell(f"{place:g}", place), *(number(own.get(place), ".4g") for own in held)] for place in places]
        columns = [self.x, *(series.label for series in self.series)]
        return Table(f"{self.name}-numbers", f"{self.title}: the numbers", columns, rows)

    def draw(self, folder: Path) -> "Drawn":
        """The chart as `<svg>` elements in the page's colours; NAME.svg and NAME.png are written to a folder.

        The files are on white, with letters as outlines, so that they look the same everywhere.
        """
        import matplotlib

        with _style(self.name):
            wide, narrow = self._figure(WIDE), self._figure(NARROW)
            elements = [_for_page(wide, f"{self.name}-wide", self), _for_page(narrow, f"{self.name}-narrow", self)]
            with matplotlib.rc_context({"svg.fonttype": "path"}):
                wide.savefig(folder / f"{self.name}.svg", metadata={"Date": None, "Title": self.title})
            wide.savefig(folder / f"{self.name}.png", dpi=200)
        return Drawn(self.name, self.table, *elements)

    def _figure(self, width: float) -> "Figure":
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

        narrow = width < 5
        across = 2 if narrow else 4
        legend_rows = -(-len(self.series) // across) if len(self.series) > 1 else 0
        figure = Figure(figsize=(width, 2.9 + 0.22 * legend_rows), layout="constrained")
        axes = figure.add_subplot()
        for number_, series in enumerate(self.series):
            colour = SERIES[number_ % len(SERIES)]
            style = STYLES[number_ // len(SERIES) % len(STYLES)]
            marker = MARKERS[number_ % len(MARKERS)]
            few = len(series.x) <= 48
            axes.plot(
                series.x,
                series.y,
                style,
                color=colour,
                marker=marker if few else None,
                markersize=4,
                label=series.label,
            )
            if any(error is not None for error in series.error):
                errors = [error or 0.0 for error in series.error]
                axes.errorbar(series.x, series.y, errors, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
        if self.level is not None:
            axes.axhline(self.level[1], color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
            axes.annotate(
                self.level[0], (1, self.level[1]), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", ha="right", va="bottom", color=FAINT,
            )  # fmt: skip
        if self.logarithmic:
            axes.set_yscale("log")
            values = [value for series in self.series for value in series.y]
            values += [] if self.level is None else [self.level[1]]
            # 1, 2 and 5 times a power of ten are too far apart for values that lie close together.
            close = max(values) < 8 * min(values)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6) if close else LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        if self.limits is not None:
            axes.set_ylim(*self.limits)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        elif not self.logarithmic:
            axes.set_ylim(bottom=0)
        places = sorted({x for series in self.series for x in series.x})
        if len(places) <= 8:
            axes.set_xticks(places)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if narrow else 12))
        axes.set_xlabel(self.x)
        axes.set_title(self.y, loc="left")
        axes.grid(axis="y")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        if legend_rows:
            figure.legend(loc="outside lower left", ncols=across, frameon=False, handlelength=2.2, columnspacing=1.4)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, drawn several times
        return figure


class Drawn(NamedTuple):
    """A chart as templates show it: its numbers, and `<svg>` elements for wide and narrow screens."""

    name: str
    table: Table
    wide: str
    narrow: str


def _style(salt: str) -> Any:
    """Matplotlib with our settings and no others, for the length of a `with`."""
    import matplotlib

    return matplotlib.rc_context(
        {
            **matplotlib.rcParamsDefault,
            "backend": "agg",
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "font.family": ["DejaVu Sans"],
            "font.size": 8.5,
            "axes.titlesize": 8.5,
            "axes.labelsize": 8.5,
            "text.color": INK,
            **dict.fromkeys(("axes.titlecolor", "axes.labelcolor", "xtick.color", "ytick.color"), FAINT),
            "axes.edgecolor": RULE,
            "grid.color": RULE,
            "lines.linewidth": 1.4,
            "axes.axisbelow": True,
        }
    )


def check_installed() -> None:
    """Raise `SecateurError` when the libraries of reports are missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SecateurError(f'a report needs {error.name}: pip install "secateur[report]"') from None


_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def _for_page(figure: "Figure", prefix: str, chart: Chart) -> str:
    """A figure as an element of a page: no prologue, metadata, or style of its own; ids of its own."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(stream.getvalue())  # nosec B314 # what matplotlib has just written
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        identity = element.attrib.pop("id", None)
        if identity is not None and element.tag != f"{{{_SVG}}}g":  # groups are named, but nobody refers to them
            element.set("id", f"{prefix}-{identity}")
        link = element.attrib.pop(f"{{{_LINK}}}href", None) or element.attrib.pop("href", None)
        if link is not None:
            element.set("href", f"#{prefix}-{link.removeprefix('#')}")
        for key, value in element.attrib.items():
            value = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", value)
            for name, colour in COLOURS.items():
                value = value.replace(colour, f"var(--{name})")
            element.set(key, value)
        if element.tag == f"{{{_SVG}}}text":
            element.set("style", re.sub(r"(font: \S+) [^;]*", r"\1 var(--sans)", element.get("style", "")))
    root.attrib.pop("version", None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}-title {prefix}-description")
    root.set("stroke-linejoin", "round")
    for name, words in (("description", chart.summary), ("title", chart.title)):
        element = ElementTree.Element(f"{{{_SVG}}}{'desc' if name == 'description' else name}")
        element.set("id", f"{prefix}-{name}")
        element.text = words
        root.insert(0, element)
    return ElementTree.tostring(root, encoding="unicode")
