"""What a person sees while a command runs and when it is done: bars and spinners on a terminal, lines in a pipe."""

import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli.streams import visible
from secateur.cli.voice import bars, quiet, say

# Of what --json prints. Raise it when an entry goes, or means something else; new ones change nothing for who reads.
JSON_FORMAT = 1

if TYPE_CHECKING:
    from secateur.runs.events import Event
    from secateur.sweeps.cells import SweepEvent


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the progress bars and advice of other libraries away from our own output."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        # What transformers and peft tell each other about names to come.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
        yield


class _Visible:
    """Something to print, with its texts as `visible` makes them."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.segment import Segment

        for text, style, control in console.render(self.content, options):
            yield Segment(text if control else visible(text), style, control)


def _console(**options: Any) -> Any:
    """A console that takes no name for markup or for the code of an emoji."""
    from rich.console import Console

    return Console(markup=False, emoji=False, **options)


def print_tables(content: Any, *, error: bool = False) -> None:
    """Print tables to standard output, or to standard error."""
    from rich.console import Group
    from rich.text import Text

    # A pipe has no width; lines are then as long as they need to be.
    terminal = (sys.stderr if error else sys.stdout).isatty()
    console = _console(width=None if terminal else 200, stderr=error)
    for part in content.renderables if isinstance(content, Group) else (content,):
        # A command stays in one line, however long, so that it can be copied.
        whole = not terminal or (isinstance(part, Text) and bool(part.no_wrap))
        console.print(_Visible(part), soft_wrap=whole)


def print_json(value: Mapping[str, Any]) -> None:
    """Print a JSON object to standard output, with the number of its format; what a file holds has the file's own."""
    print(json.dumps({"format": JSON_FORMAT, **value}, indent=2, default=str))


def print_result(result: Any, tables: Callable[[Any], Any], as_json: bool) -> None:
    """Print a result: as JSON, or as its tables."""
    if as_json:
        print_json(result.to_json())
    else:
        print_tables(tables(result))


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the single values of rows into a CSV file, with a header; lists and objects are left out.

    A column that only some rows have is empty in the others.
    """
    import csv

    from secateur.files.writer import writing

    columns = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list | dict))
    with writing(file), file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(columns), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner on a terminal, nothing in a pipe."""
    if not bars():
        say(text, detail=True)
        yield
        return
    with _console(stderr=True).status(text):
        yield


@contextmanager
def _bar(first: str = "opening") -> Iterator[tuple[Any, Callable[..., None]]]:
    """A bar, and the function that updates it: `update(stage, done, total, detail)`; the detail follows the time."""
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    from secateur.runs.events import seconds_text

    class Count(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.total is None else f"{int(task.completed)}/{int(task.total)}", "progress.download")

    class Time(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            """Seconds since the work began, and those that are left as far as that is known."""
            passed, left = task.elapsed or 0.0, task.time_remaining
            return Text(seconds_text(passed) + (f", {seconds_text(left)} left" if left else ""), "progress.elapsed")

    with Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=20),
        Count(),
        Time(),
        # One width for all, so that the bar stays where it is; what does not fit is cut.
        TextColumn(
            "{task.fields[detail]}",
            style="dim",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        expand=True,
        console=_console(stderr=True),
    ) as bar:
        task = bar.add_task(first, total=None, detail="")

        def update(stage: str, done: int, total: int | None, detail: str = "", **options: Any) -> None:
            bar.update(task, description=stage, total=total, completed=done, detail=visible(detail), **options)

        yield bar, update


@contextmanager
def progress(done: str = "pruned", note: Callable[[], str] = lambda: "") -> Iterator[Callable[["Event"], None]]:
    """A bar over blocks with the stage and time left on a terminal; one line per block in a pipe, which is `done`.

    `note` is what to add to either.
    """
    started, screen, last = time.perf_counter(), not bars(), ""

    def plain(event: "Event") -> None:
        nonlocal last
        elapsed = time.perf_counter() - started
        if event.stage == "calibrate" and not event.total:
            say("drawing calibration samples", screen=screen)
        elif event.stage.startswith(("gradients", "allocation")) and event.done == event.total:
            say(f"{event.stage}, {elapsed:.1f} s", screen=screen)
        elif event.stage == "write":
            say(f"block {event.block + 1} of {event.blocks} {done}, {elapsed:.1f} s{note()}", screen=screen)
        elif event.stage != "calibrate":
            where = f"block {event.block + 1} of {event.blocks}: " if event.blocks else ""
            if (text := f"{where}{event.matrix or event.stage}") != last:
                last = text
                say(text, detail=True, screen=screen)

    if screen:
        yield plain
        return
    with _bar() as (_, update):

        def show(event: "Event") -> None:
            plain(event)
            if event.place is not None:
                stage, done, total, detail = event.place
                update(stage, done, total or None, detail + note() if detail else "")

        yield show


@contextmanager
def stage_progress(*, lines: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage on a terminal; in a pipe nothing, or with `lines` one when a stage is done."""
    started, screen = time.perf_counter(), not bars()

    def plain(stage: str, done: int, total: int) -> None:
        if total and done == total:
            say(f"{stage}, {time.perf_counter() - started:.1f} s", detail=not lines, screen=screen)

    if screen:
        yield plain
        return
    with _bar() as (_, update):

        def show(stage: str, done: int, total: int) -> None:
            plain(stage, done, total)
            update(stage, done, total)

        yield show


@contextmanager
def sweep_progress() -> Iterator[tuple[Callable[["SweepEvent"], None], Callable[[Any], None]]]:
    """Two functions: one shows an event, the other prints a table above the bar.

    On a terminal events move a bar over the cells, with the stage of the current one; in a pipe each cell is a line.
    """
    from secateur.runs.events import seconds_text

    def line(event: "SweepEvent") -> str | None:
        cell = event.cell
        model = f"{event.model}: " if event.model else ""
        if event.kind == "dense":
            return f"{model}dense model evaluated on {event.stage}"
        if event.kind == "again":
            assert cell is not None
            return f"{model}{cell.name}: pruned again for what it lacks, since its checkpoint was not kept"
        if event.kind == "lost":
            assert cell is not None
            return f"{model}{cell.name}: its worker was lost ({event.stage}); tried again"
        if event.kind != "cell" or cell is None:
            return None
        found = {data.rpartition("/")[2]: figures.get("perplexity") for data, figures in cell.figures.items()}
        numbers = [f"{value:.2f}" + (f" on {data}" if len(found) > 1 else "") for data, value in found.items() if value]
        result = f"failed: {cell.error}" if cell.status == "failed" else f"perplexity {', '.join(numbers)}"
        left = event.cells - event.finished
        time_left = f", about {seconds_text(event.seconds_left)}" if left and event.seconds_left is not None else ""
        time = seconds_text(cell.seconds)
        return f"{model}{cell.name}: {result}, {time}, {left} of {event.cells} cells left{time_left}"

    if not bars():

        def plain(event: "SweepEvent") -> None:
            text = line(event)
            if text is not None:
                say(text)

        yield plain, _tables_beside
        return
    with _bar("cells") as (bar, update):

        def show(event: "SweepEvent") -> None:
            text = line(event)
            if text is not None:
                say(text, screen=False)
                bar.console.print(visible(text), highlight=False)
            _, done, total, detail = event.place
            begins = not bar.tasks[0].fields["detail"].startswith(event.where)
            update("cells", done, total or None, detail, refresh=begins)

        yield show, bar.console.print


@contextmanager
def recovery_progress() -> Iterator[tuple[Callable[[str, int, int, str], None], Callable[[Any], None]]]:
    """Two functions: `show` moves a bar for each stage, with a note after it; `say` prints a line above the bar.

    In a pipe a line is printed whenever a stage is done or a perplexity was measured. All of it goes to stderr.
    """
    started, measured, screen = time.perf_counter(), "", not bars()

    def plain(stage: str, done: int, total: int, note: str) -> None:
        nonlocal measured
        perplexity = note.partition("perplexity ")[2]
        if stage.startswith("training") and perplexity != measured:
            measured = perplexity
            say(f"{stage}, {done} of {total}, {note}, {time.perf_counter() - started:.1f} s", screen=screen)

    if screen:
        yield plain, _tables_beside
        return
    with _bar() as (bar, update):

        def show(stage: str, done: int, total: int, note: str) -> None:
            plain(stage, done, total, note)
            update(stage, done, total or None, note)

        yield show, bar.console.print


def _tables_beside(content: Any) -> None:
    """Print tables to standard error, where anything but errors is wanted there."""
    if not quiet():
        print_tables(content, error=True)
