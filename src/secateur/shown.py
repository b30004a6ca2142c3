"""Results that show themselves: a few lines in a session of Python, tables in a notebook, as `report` has them."""

from importlib import import_module
from typing import Any, Protocol, TypeVar, cast


class _Report(Protocol):
    def lines(self, result: Any) -> list[str]: ...

    def html(self, result: Any) -> str: ...


def _report() -> _Report:
    # Rooms that make results lie below the one that knows what they look like, which is loaded when one is shown.
    return cast(_Report, import_module("secateur.report.shown"))


class Shown:
    """A result with a short `repr`, and tables where a notebook asks for HTML."""

    def __repr__(self) -> str:
        return "\n".join(_report().lines(self))

    def _repr_html_(self) -> str:
        return _report().html(self)


T = TypeVar("T")


class ShownList(Shown, list[T]):
    """Several results of one kind, which are shown in one table."""
