"""The application that commands register with, and how it ends. Heavy imports wait for the command that needs them."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

from cyclopts import App, CycloptsError

import secateur
from secateur.arguments import command_line
from secateur.cli.commands import GROUPS, parsed, told
from secateur.cli.configuration import configured, run_of_file, runs_of
from secateur.cli.processes import alone, silent
from secateur.cli.streams import guarded_streams, print_error
from secateur.cli.voice import GLOBAL, debugging, log, say, speaking
from secateur.errors import CheckpointError, MethodError, NumericalError, SecateurError
from secateur.runs.options import ARGUMENTS, OPTIONS, Option
from secateur.runs.stopping import stop

Function = TypeVar("Function", bound=Callable[..., None])
Shell = Literal["bash", "zsh", "fish", "powershell"]
Json = Annotated[bool, Option(OPTIONS, "Print the result as JSON.", name="json")]
Config = Annotated[
    str | None,
    Option(
        OPTIONS,
        "YAML file with these options as keys, and a list of runs where there are several; options given here win over "
        "it.",
    ),
]

app = App(
    name="secateur",
    help="Prune pretrained large language models in one shot, block by block, without retraining.",
    help_format="markdown",
    help_flags=["--help", "-h"],
    help_epilogue=GLOBAL,
    version=f"secateur {secateur.__version__}",
    group_arguments=GROUPS[ARGUMENTS],
    group_parameters=GROUPS[OPTIONS],
    config=configured,
    print_error=False,
    exit_on_error=False,
    verbose=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
app["--help"].group = app["--version"].group = GROUPS[OPTIONS]
app.register_install_completion_command(help="Complete commands, options and their values in this shell.")
app["--install-completion"].group = GROUPS[OPTIONS]


@app.command(name="--show-completion", group=GROUPS[OPTIONS])
def _show_completion(shell: Shell | None = None) -> None:
    """Print the script that completes commands in this shell: bash, zsh, fish or powershell [default: $SHELL]."""
    asked: Any = shell or Path(os.environ.get("SHELL", "")).name
    if asked not in (known := get_args(Shell)):
        raise CheckpointError(f"--show-completion: in which shell? Name one, of {', '.join(known)}.")
    print(app.generate_completion(shell=asked))  # nosec B604 # the name of a shell, no command


def command(
    *examples: str,
    name: str | None = None,
    required: Collection[str] = (),
    hidden: Collection[str] = (),
    common: Sequence[str] = (),
    processes: bool = False,
) -> Callable[[Function], Function]:
    """The decorator of a function that makes it a command with these examples at the end of its help.

    Its options are the fields of its settings and its arguments that have an `Option`. `required` names fields that
    only Python code can do without, `hidden` those that the help does not show, `common` those that most people need,
    which it shows first. Several `processes` may share its work.
    """

    def register(function: Function) -> Function:
        shown = GLOBAL + "\n\n**Examples**\n\n" + "\n\n".join(f"`{example}`" for example in examples)
        shown_name = name or function.__name__
        own = parsed(
            function if processes else _alone(function, shown_name), required=required, hidden=hidden, common=common
        )
        order = len(list(app))  # as they are registered, not by the alphabet
        app.command(own, name=shown_name, help_epilogue=shown, sort_key=order)
        return function

    return register


def _alone(function: Function, name: str) -> Function:
    """The function as one that raises `ProcessError` where several processes were started."""

    @wraps(function)
    def run(*arguments: Any, **keywords: Any) -> None:
        alone(name)
        function(*arguments, **keywords)

    return cast("Function", run)


def exit_code(kind: type[SecateurError]) -> int:
    """What a command exits with that such an error ends: 2 for a mistake in what was asked, 1 for a failure."""
    return 1 if issubclass(kind, NumericalError) else 2


@contextmanager
def _signals() -> Iterator[Callable[[], signal.Signals]]:
    """Let Ctrl-C, SIGTERM and SIGHUP end a command: at the next safe point of long work, elsewhere at once.

    Yields what says which signal came. One that was ignored from the start (nohup) stays so. A second one ends the
    process on the spot, as a kill would: what is on the disk is in order at any time.
    """
    received: signal.Signals | None = None

    def end(number: int, frame: object) -> None:
        nonlocal received
        second, received = received is not None, received or signal.Signals(number)
        if second:
            with suppress(OSError):
                shown = b"\x1b[?25h" if sys.stderr.isatty() else b""  # a progress bar hides the cursor
                os.write(2, shown + b"Stopped at once. Run the command again to see what is kept.\n")
            os._exit(128 + received)
        if not stop():
            raise KeyboardInterrupt
        with suppress(OSError):  # print could be in the middle of a line of its own
            again = b"press Ctrl-C again" if number == signal.SIGINT else b"send the signal again"
            os.write(2, b"Stopping at the next safe point; " + again + b" to stop at once.\n")

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        usual = (signal.SIG_DFL, signal.default_int_handler)
        before = {number: signal.signal(number, end) for number in numbers if signal.getsignal(number) in usual}
    try:
        yield lambda: received or signal.SIGINT
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Run the command line.

    Exits with 2 for the user's mistake, 1 for a failure, 130 for an interruption, 143 for SIGTERM, 129 for SIGHUP, and
    with what else commands pass to `sys.exit`; docs/reliability.md has them all.
    """
    with guarded_streams(), silent():
        # Libraries read these when they are imported; torch imports tqdm.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        sys.exit(_run())


def _run() -> int:
    try:
        with speaking(sys.argv[1:]) as arguments:
            code = 1
            try:
                code = _ended(arguments)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(bool(end.code))
                raise
            except BaseException:
                log(traceback.format_exc().rstrip())
                raise
            finally:
                log(f"ended with {code}")
            return code
    except SecateurError as error:  # with --debug as it is; else of the options of what is said alone
        if "--debug" in sys.argv:
            raise
        print_error(f"Error: {error}")
        return 2


def _ended(arguments: list[str]) -> int:
    """The exit code of a command; of several runs of a file that of the first one that failed.

    Runs after a failure go on, those after an interruption do not.
    """
    runs = runs_of(arguments)
    if not runs:
        return _once(arguments)
    failed: dict[str, int] = {}
    for number, name in enumerate(runs):
        say(f"Run {number + 1} of {len(runs)}: {name}")
        with run_of_file(number):
            try:
                code = _once(arguments)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(bool(end.code))
        if code > 128:
            return code
        if code:
            failed[name] = code
    if failed:
        print_error(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}.")
    return next(iter(failed.values()), 0)


def _once(arguments: list[str]) -> int:
    debug = debugging()

    def tell(text: str) -> None:
        print_error(text)
        log(text)

    with _signals() as received:
        try:
            with command_line():
                app(arguments)
            return 0 if arguments else 2
        except CycloptsError as error:
            tell(f"Error: {told(error)}")
            return 2
        except SecateurError as error:
            if debug:
                raise
            # Of somebody's own code, where it went wrong may not be enough.
            more = " --debug shows the traceback." if isinstance(error, MethodError) and error.__cause__ else ""
            tell(f"Error: {error}{more}")
            return exit_code(type(error))
        except (MemoryError, RuntimeError) as error:
            # torch.OutOfMemoryError, without importing torch for commands that do without
            if debug or not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"):
                raise
            reason = str(error).partition(". ")[0] or "out of memory"
            tell(
                f"Error: {reason}. What takes less: --batch-size 1, fewer or shorter samples, and for Gram matrices on "
                "a GPU --statistics-device cpu. secateur plan counts it beforehand."
            )
            return 1
        except KeyboardInterrupt as end:  # with a message where something stays on purpose
            number = received()
            ending = "Interrupted" if number == signal.SIGINT else f"Ended by {number.name}"
            message = f"{ending}. {end}" if str(end) else f"{ending}; nothing half-written was left behind."
            log(message)
            with suppress(OSError):  # the terminal may be gone
                print(message, file=sys.stderr)
            return 128 + number
