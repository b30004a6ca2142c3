"""What calls of Python show: a bar while they run, and results as a few lines, or as tables in a notebook."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Protocol, TypeVar, cast

from secateur.launched import launched

T = TypeVar("T")


class Tell(Protocol):
    """What is told of a stage: how much of it is done, how much there is in all, and a note on it."""

    def __call__(self, stage: str, done: int, total: int, note: str = "", /) -> None:
        """Tell it."""


@contextmanager
def bar(progress: Callable[..., None] | bool | None) -> Iterator[Tell | None]:
    """Where `progress` is True, what moves a bar, in a notebook one of its own; otherwise `progress` itself, or None.

    Of several processes that share a run the first has the bar.
    """
    if callable(progress):
        # It is called as it always was, without the note.
        yield lambda stage, done, total, note="", /: progress(stage, done, total)
    elif not progress or launched().rank > 0:
        yield None
    else:
        shown = _Bar()
        try:
            yield shown.tell
        finally:
            shown.close()


@contextmanager
def counted(progress: Callable[[int, int], None] | bool | None, stage: str) -> Iterator[Callable[[int, int], None]]:
    """What to call with how much is done of one stage, and how much there is; with True a bar, as in `bar`."""
    if callable(progress):
        yield progress
        return
    with bar(progress) as tell:
        yield (lambda done, total: None) if tell is None else (lambda done, total: tell(stage, done, total))


class _Bar:
    """One bar for stage after stage, which appears with the first."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage: tuple[str, int] | None = None

    def tell(self, stage: str, done: int, total: int, note: str = "", /) -> None:
        if self._bar is None:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total or None, unit="", dynamic_ncols=True)
        if (stage, total) != self._stage:
            self._stage = stage, total
            self._bar.set_description_str(stage, refresh=False)
            self._bar.reset(total or None)
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str("", refresh=False)
            self._bar.close()


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


class ShownList(Shown, list[T]):
    """Several results of one kind, which are shown in one table."""
