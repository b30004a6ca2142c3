"""Commands in several processes: started here or by torchrun, of which the first one speaks, and all keep logs."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from secateur.collect.settings import HOW
from secateur.errors import ProcessError, SecateurError
from secateur.launched import devices_named, launched
from secateur.runs.options import Option

if TYPE_CHECKING:
    from secateur.runs.events import Event, OnEvent, Progress

LogDir = Annotated[
    str | None,
    Option(HOW, "Folder for a log of each process that shares the run: process-0.log, process-1.log, ..."),
]


@contextmanager
def silent() -> Iterator[None]:
    """Within it, what a process prints that is not the first goes nowhere."""
    first = True
    with suppress(ProcessError):  # which the command will tell of
        first = launched().rank == 0
    if first:
        yield
        return
    null = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2):
        os.dup2(null, number)
    os.close(null)
    yield


def alone(command: str) -> None:
    """Raise `ProcessError` in several processes, for a command that one process runs."""
    if launched().count > 1:
        raise ProcessError(
            f"secateur {command} runs in one process, and a launcher has started {launched().count}. Start it alone."
        )


def devices_of(name: str) -> list[str]:
    """The devices on which a command starts processes; one, on which it runs itself, where there are not several."""
    if name == "auto":
        import torch

        return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or [name]
    return devices_named(name)


def started_for(device: str) -> bool:
    """Whether processes have done the work of this command, one for each of several devices; they have ended.

    Exits with their code where that is not 0.
    """
    if launched().count > 1:
        return False
    devices = devices_of(device)
    if len(devices) == 1:
        return False
    from secateur.runs.launch import launch

    code = launch(devices, sys.argv[1:])
    if code:
        sys.exit(code)
    return True


@contextmanager
def logged(folder: str | None) -> Iterator["Log"]:
    """The log of this process, in a folder; nowhere without one."""
    log = Log(None if folder is None else Path(folder).expanduser())
    try:
        yield log
    except BaseException as error:
        log.write(f"{type(error).__name__}: {error}")
        raise
    finally:
        log.close()


class Log:
    """One line for each stage of a run that begins, and for everything that is said."""

    def __init__(self, folder: Path | None) -> None:
        self._stream = None
        self._last = ""
        self._handler: logging.Handler | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = (folder / f"process-{launched().rank}.log").open("a", encoding="utf-8")
        except OSError as error:
            raise SecateurError(f"--log-dir {folder}: cannot be written ({error.strerror}).") from None
        self._handler = logging.StreamHandler(self._stream)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("secateur").addHandler(self._handler)
        self.write(f"process {launched().rank} of {launched().count}: {shlex.join(['secateur', *sys.argv[1:]])}")

    def write(self, text: str) -> None:
        """A line with the time."""
        if self._stream is not None:
            from secateur.files.redaction import redacted

            print(time.strftime("%Y-%m-%d %H:%M:%S"), redacted(text), file=self._stream, flush=True)

    def beside(self, on_event: "OnEvent") -> "OnEvent":
        """What tells the log of events, and `on_event` as well."""

        def tell(event: "Event") -> None:
            self._event(event)
            on_event(event)

        return tell

    def stages_beside(self, progress: "Progress") -> "Progress":
        """What tells the log of stages, and `progress` as well."""

        def tell(stage: str, done: int, total: int) -> None:
            self._line(stage)
            progress(stage, done, total)

        return tell

    def _event(self, event: "Event") -> None:
        self._line(f"{event.stage}, block {event.block + 1} of {event.blocks}" if event.blocks else event.stage)

    def _line(self, text: str) -> None:
        if text != self._last:
            self._last = text
            self.write(text)

    def close(self) -> None:
        """Let go of the file."""
        if self._handler is not None:
            logging.getLogger("secateur").removeHandler(self._handler)
        if self._stream is not None:
            self._stream.close()
