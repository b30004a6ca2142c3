"""The application that commands register with, and how it ends. Heavy imports wait for the command that needs them."""

import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Annotated, Any

import typer

import secateur
from secateur.cli.streams import guarded_streams
from secateur.errors import NumericalError, SecateurError

app = typer.Typer(
    name="secateur",
    help="Prune pretrained large language models in one shot, block by block, without retraining.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Interrupted(SystemExit):
    """The end of a command that was interrupted and left something behind on purpose, which the message says."""

    def __init__(self, message: str) -> None:
        super().__init__(130)
        self.message = message


def epilog(*commands: str) -> str:
    """The examples at the end of a command's help."""
    return "**Examples**\n\n" + "\n\n".join(f"`{command}`" for command in commands)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"secateur {secateur.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Prune pretrained large language models in one shot, block by block, without retraining."""
    # Libraries read these when they are imported, and torch imports tqdm.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class _Signals:
    """Lets SIGTERM and SIGHUP end a command as Ctrl-C does, through everything that tidies up on the way out.

    A signal that was ignored from the start (nohup) stays so. After the first one the others are ignored: tidying up
    is under way.
    """

    def __init__(self) -> None:
        self.received = signal.SIGINT
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Signals":
        names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        if threading.current_thread() is threading.main_thread():
            for number in (signal.Signals[name] for name in names):
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._before[number] = signal.signal(number, self._end)
        return self

    def _end(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
        for other in self._before:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def main() -> None:
    """Run the command line.

    Exits with 2 for the user's mistake, 1 for a failure, 130 for an interruption, 143 for SIGTERM, 129 for SIGHUP.
    """
    with guarded_streams():
        _run()


def _run() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # wherever it stands
    with _Signals() as signals:
        try:
            app(args=arguments, prog_name="secateur")
        except SecateurError as error:
            if len(arguments) < len(sys.argv[1:]):
                raise
            typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
            sys.exit(1 if isinstance(error, NumericalError) else 2)
        except (MemoryError, RuntimeError) as error:
            # torch.OutOfMemoryError, without importing torch for commands that do without
            if len(arguments) < len(sys.argv[1:]) or not (
                isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            ):
                raise
            reason = str(error).partition(". ")[0] or "out of memory"
            typer.secho(
                f"Error: {reason}. What takes less: --batch-size 1, fewer or shorter samples, and for Gram matrices on "
                "a GPU --statistics-device cpu. secateur plan counts it beforehand.",
                fg=typer.colors.RED,
                err=True,
            )
            sys.exit(1)
        except (KeyboardInterrupt, SystemExit) as end:
            if isinstance(end, SystemExit) and end.code != 130:  # typer's own code for an interruption
                raise
            ending = "Interrupted" if signals.received == signal.SIGINT else f"Ended by {signals.received.name}"
            message = (
                end.message if isinstance(end, Interrupted) else f"{ending}; nothing half-written was left behind."
            )
            with suppress(OSError):  # the terminal may be gone
                typer.secho(message, err=True)
            sys.exit(128 + signals.received)
