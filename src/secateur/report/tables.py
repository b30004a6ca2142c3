"""Tables of a page: cells with the text to show and the value to sort by."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Cell(NamedTuple):
    """What a cell shows, and what it is sorted by (None: last, whichever way)."""

    text: str
    value: float | str | None = None


@dataclass(frozen=True)
class Table:
    """A table: `columns` are the headings. Without headings it is a list of pairs."""

    name: str  # within the page
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = False
    long: bool = False  # scrolls in a window of its own
    headed: bool = True

    @cached_property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers: no cell of it is sorted by words."""
        return [not any(isinstance(row[place].value, str) for row in self.rows) for place in range(len(self.columns))]


def text(value: str) -> Cell:
    """A cell of words."""
    return Cell(value, value)


def count(value: int | None) -> Cell:
    """A cell of a whole number; empty for None."""
    return Cell("" if value is None else f"{value:,}", value)


def number(value: float | None, form: str, error: float | None = None) -> Cell:
    """A cell of a number in a format such as ".3f", with an error in the same one; empty for None."""
    if value is None:
        return Cell("", None)
    return Cell(f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}"), float(value))


def share(value: float, digits: int = 2) -> str:
    """A fraction in per cent, which no line breaks: 43.6 %."""
    return f"{100 * value:.{digits}f}\u00a0%"


def percent(value: float | None, digits: int = 2) -> Cell:
    """A cell of a fraction in per cent; empty for None."""
    return Cell("", None) if value is None else Cell(share(value, digits), float(value))
