"""The command line: strings to objects, printing, exit codes. Heavy imports wait for the command that needs them."""

import importlib
import inspect as inspection
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import secateur
from secateur.errors import NumericalError, PatternError, SecateurError

if TYPE_CHECKING:
    from secateur.core.patterns import Pattern
    from secateur.core.problem import Method
    from secateur.engine import Event

METHOD_NAMES = ("magnitude", "wanda", "wanda-variant")  # a test keeps this equal to secateur.methods.METHODS

app = typer.Typer(
    name="secateur",
    help="Prune pretrained large language models in one shot, block by block, without retraining.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _epilog(*commands: str) -> str:
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


def _load_config(context: typer.Context, value: Path | None) -> Path | None:
    """Use a YAML file as defaults for the options that are not given. Unknown keys are errors."""
    if value is None:
        return None
    import difflib

    import yaml

    try:
        # Values stay the text they are, as on a command line: YAML 1.1 would read `pattern: 2:4` as the number 124.
        content = yaml.load(value.read_text(), Loader=yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{value} cannot be read ({getattr(error, 'strerror', 'not text')}).") from None
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{value} is not YAML: {error}") from None
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "text"
        raise typer.BadParameter(f"{value}: expected keys and values, found {kind}.")
    known = {
        max(parameter.opts, key=len).lstrip("-").replace("-", "_"): parameter
        for parameter in context.command.params
        if parameter.name not in ("config", "help")
    }
    defaults: dict[str, Any] = {}
    for key, item in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f' Did you mean "{near[0]}"?' if near else f" Known keys: {', '.join(sorted(known))}."
            raise typer.BadParameter(f'{value}: unknown key "{key}".{hint}')
        if item in ("", "null", "~"):
            continue
        if getattr(known[name], "multiple", False) and not isinstance(item, list):
            item = [item]
        defaults[str(known[name].name)] = item
    context.default_map = {**(context.default_map or {}), **defaults}
    return value


ModelArgument = Annotated[str, typer.Argument(help="A folder, a hub id, or a GGUF file.", show_default=False)]
MethodOption = Annotated[
    str,
    typer.Option(
        "--method",
        "-m",
        help=f"{', '.join(METHOD_NAMES)}, or MODULE:FUNCTION for a method of your own.",
        rich_help_panel="What to prune",
    ),
]
SparsityOption = Annotated[
    float | None,
    typer.Option(
        "--sparsity",
        "-s",
        help="Fraction of weights to remove, at least 0 and below 1 [default: 0.5].",
        rich_help_panel="What to prune",
        show_default=False,
    ),
]
PatternOption = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        "-p",
        help="N:M, such as 2:4: keep at most 2 of every 4 weights, instead of --sparsity.",
        rich_help_panel="What to prune",
        show_default=False,
    ),
]
PerOption = Annotated[
    str | None,
    typer.Option(
        "--per",
        help="Compare weights within each row, the whole matrix, or by the row search of Wanda's "
        "variant: row, matrix or search [default: the method's].",
        rich_help_panel="What to prune",
        show_default=False,
    ),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        help="Prune only matrices that this glob matches; may be repeated.",
        rich_help_panel="What to prune",
        show_default=False,
    ),
]
SkipOption = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        help='Leave matrices dense that this glob matches, such as "*.down_proj"; may be repeated.',
        rich_help_panel="What to prune",
        show_default=False,
    ),
]
CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        "-c",
        help="c4, wikitext2, python-docs, hf:NAME[:CONFIG][:SPLIT][:FIELD], a .txt, .jsonl[:FIELD], .parquet[:FIELD] "
        "file, or .safetensors with input_ids. Repeat with weights to mix: 0.7*c4 [default: c4].",
        rich_help_panel="Calibration",
        show_default=False,
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        "--samples",
        "-n",
        min=1,
        help="Calibration samples: token windows [default: 128].",
        rich_help_panel="Calibration",
        show_default=False,
    ),
]
LengthOption = Annotated[
    int | None, typer.Option("--length", "-l", min=2, help="Tokens in each window [default: 2048].", show_default=False)
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the sampling.", rich_help_panel="Calibration")]
SamplingOption = Annotated[
    str | None,
    typer.Option(
        "--sampling",
        help="document: windows within one long document, as in the papers; concat: within all "
        "text packed together [default: as in the papers].",
        rich_help_panel="Calibration",
        show_default=False,
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Samples that run through a block at once [default: auto].",
        rich_help_panel="How to run",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...", rich_help_panel="How to run")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="To compute in: auto, float32, bfloat16, float16. The output keeps the source's.",
        rich_help_panel="How to run",
    ),
]
OffloadOption = Annotated[
    str,
    typer.Option(
        "--offload-states",
        help="Hidden states in memory-mapped files: auto, never, or a folder.",
        rich_help_panel="How to run",
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision", help="Branch, tag or commit on the hub.", rich_help_panel="How to run", show_default=False
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the code that the model brings along.", rich_help_panel="How to run"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with these options as keys; options given here win over it.",
        callback=_load_config,
        is_eager=True,
        show_default=False,
    ),
]


@app.command(
    epilog=_epilog(
        "secateur plan HuggingFaceTB/SmolLM2-135M",
        "secateur plan ./llama --pattern 2:4 --skip '*.down_proj'",
        "secateur plan ./llama --json",
    )
)
def plan(
    model: ModelArgument,
    method: MethodOption = "wanda",
    sparsity: SparsityOption = None,
    pattern: PatternOption = None,
    per: PerOption = None,
    only: OnlyOption = None,
    skip: SkipOption = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    seed: SeedOption = 0,
    sampling: SamplingOption = None,
    propagate: Annotated[str, typer.Option("--propagate", hidden=True)] = "pruned",
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    offload_states: OffloadOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    output: Annotated[str | None, typer.Option("--output", "-o", hidden=True)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", hidden=True)] = False,
) -> None:
    """Show what would be pruned, what not and why, and the memory, disk and time that it would take. Changes nothing.

    Takes every option of `prune`, so that a command can be tried by changing one word.
    """
    chosen = _pattern(sparsity, pattern, per)
    solver = _method(method)
    with _quiet_libraries(), _status("Reading the model"):
        from secateur.forecast import estimate

        result = estimate(
            model,
            method=solver,
            pattern=chosen,
            samples=samples,
            length=length,
            only=only or (),
            skip=skip or (),
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        _print_json(result.to_json())
    else:
        from secateur.report.terminal import estimate_tables

        _print(estimate_tables(result))


@app.command(
    epilog=_epilog(
        "secateur prune HuggingFaceTB/SmolLM2-135M -o smollm2-50 --method wanda --sparsity 0.5",
        "secateur prune ./llama -o ./llama-2of4 --pattern 2:4 --calibration my.jsonl --samples 64 --length 1024",
        "secateur prune model.gguf -o pruned --calibration python-docs --sampling concat --length 512",
        "secateur prune ./llama -o pruned --method my_methods:my_score",
    )
)
def prune(
    model: ModelArgument,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the pruned checkpoint.", show_default=False)
    ],
    method: MethodOption = "wanda",
    sparsity: SparsityOption = None,
    pattern: PatternOption = None,
    per: PerOption = None,
    only: OnlyOption = None,
    skip: SkipOption = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    seed: SeedOption = 0,
    sampling: SamplingOption = None,
    propagate: Annotated[
        str,
        typer.Option(
            "--propagate",
            help="Each block sees the outputs of the pruned blocks before it, as published, "
            "or of the dense ones: pruned or dense.",
            rich_help_panel="Calibration",
        ),
    ] = "pruned",
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    offload_states: OffloadOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that Secateur wrote.")] = False,
) -> None:
    """Prune a model and write an ordinary Hugging Face checkpoint with a manifest, secateur.json, beside it.

    The source is never changed, and the output appears under its name only when it is complete.
    """
    chosen = _pattern(sparsity, pattern, per)
    solver = _method(method)
    with _quiet_libraries(), _progress() as on_event:
        from secateur.engine import prune as run

        manifest = run(
            model,
            method=solver,
            pattern=chosen,
            calibration=calibration or "c4",
            samples=samples,
            length=length,
            seed=seed,
            sampling=sampling,
            only=only or (),
            skip=skip or (),
            propagate=propagate,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            offload_states=offload_states,
            output=output,
            overwrite=overwrite,
            revision=revision,
            trust_remote_code=trust_remote_code,
            command=["secateur", *sys.argv[1:]],
            on_event=on_event,
        )
    if as_json:
        _print_json(manifest.to_json())
    else:
        from secateur.report.terminal import manifest_tables

        _print(manifest_tables(manifest, output))


@app.command(
    name="eval",
    epilog=_epilog(
        "secateur eval HuggingFaceTB/SmolLM2-135M --data wikitext2 --length 2048",
        "secateur eval ./pruned --data my.txt --length 1024 --windows 40",
        "secateur eval ./pruned --data python-docs --length 512 --json",
    ),
)
def evaluate(
    model: ModelArgument,
    data: Annotated[
        str, typer.Option("--data", "-d", help="wikitext2, c4, python-docs (its held-out part), hf:NAME..., or a file.")
    ] = "wikitext2",
    length: LengthOption = None,
    windows: Annotated[
        int | None,
        typer.Option("--windows", "-w", min=1, help="Use only the first windows [default: all].", show_default=False),
    ] = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    offload_states: OffloadOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity in the convention of the pruning papers, in the memory of one block."""
    with _quiet_libraries(), _evaluation_progress() as progress:
        from secateur.evaluate.perplexity import perplexity

        result = perplexity(
            model,
            data,
            length=length,
            windows=windows,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            offload_states=offload_states,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        _print_json(result.to_json())
    else:
        from secateur.report.terminal import perplexity_table

        _print(perplexity_table(result))


@app.command(epilog=_epilog("secateur inspect ./pruned", "secateur inspect ./pruned --matrices"))
def inspect(
    model: ModelArgument,
    matrices: Annotated[bool, typer.Option("--matrices", help="One row for every matrix.")] = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show the sparsity and the detected pattern of a model's matrices, by block and by kind, whoever pruned it."""
    with _quiet_libraries(), _status("Counting zeros"):
        from secateur.report.inspect import inspect as measure

        result = measure(model, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(result.to_json())
    else:
        from secateur.report.terminal import inspection_tables

        _print(inspection_tables(result, every_matrix=matrices))


@app.command(epilog=_epilog("secateur verify ./pruned", "secateur verify ./pruned --source ./llama"))
def verify(
    output: Annotated[Path, typer.Argument(help="A checkpoint that Secateur wrote.", show_default=False)],
    source: Annotated[
        str | None,
        typer.Option(
            "--source", help="The dense model: compare every tensor with it, byte for byte.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove from the files alone that a pruned checkpoint is what its manifest says. Exits with 1 when it is not."""
    with _quiet_libraries(), _status("Verifying"):
        from secateur.manifest import verify as check
        from secateur.models.opened import open_source

        result = check(output, open_source(source) if source is not None else None)
    if as_json:
        _print_json({**vars(result), "folder": str(result.folder), "ok": result.ok, "sparsity": result.sparsity})
    else:
        from secateur.report.terminal import verification_tables

        _print(verification_tables(result))
    if not result.ok:
        raise typer.Exit(1)


def _pattern(sparsity: float | None, pattern: str | None, per: str | None) -> "Pattern":
    from secateur.core.patterns import Unstructured, parse_pattern

    if pattern is not None:
        if sparsity is not None:
            raise PatternError(
                f"--sparsity {sparsity:g} and --pattern {pattern} were both given; "
                "the pattern sets the sparsity. Drop one."
            )
        if per is not None:
            raise PatternError(f"--per {per} has no meaning for --pattern {pattern}: N:M compares within groups of M.")
        return parse_pattern(pattern)
    return Unstructured(0.5 if sparsity is None else sparsity, per)  # type: ignore[arg-type]  # checked there


def _method(name: str) -> "Method":
    from secateur.core.problem import Method
    from secateur.methods import METHODS

    if name in METHODS:
        return METHODS[name]()
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        import difflib

        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise PatternError(
            f'unknown method "{name}".{hint} Known: {", ".join(METHODS)}; or MODULE:FUNCTION for one of your own.'
        )
    sys.path.insert(0, os.getcwd())
    try:
        home = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise PatternError(f"--method {name}: {error}. Looked in {os.getcwd()} and on the Python path.") from None
    if not hasattr(home, attribute):
        raise PatternError(f'--method {name}: the module {module} has no "{attribute}".')
    found = getattr(home, attribute)
    if not isinstance(found, Method) and callable(found):
        try:
            inspection.signature(found).bind()
        except TypeError as error:
            raise PatternError(
                f"--method {name}: expected a secateur.Method, or a function without arguments that returns one, and "
                f"this one cannot be called so ({error}). See docs/methods.md."
            ) from None
        found = found()
    if not isinstance(found, Method):
        raise PatternError(f"--method {name}: gives a {type(found).__name__}, expected a secateur.Method.")
    return found


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the progress bars and advice of other libraries away from our own output."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield


def _print(content: Any) -> None:
    from rich.console import Console

    # A pipe has no width; lines are then as long as they need to be.
    Console(width=None if sys.stdout.isatty() else 200, soft_wrap=not sys.stdout.isatty()).print(content)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


@contextmanager
def _status(text: str) -> Iterator[None]:
    """A spinner on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def _bar() -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
        console=Console(stderr=True),
    ) as progress:
        yield progress


@contextmanager
def _progress() -> Iterator[Callable[["Event"], None]]:
    """A bar over blocks with the stage and time left on a terminal; one line per block in a pipe."""
    started = time.perf_counter()
    if not sys.stderr.isatty():

        def plain(event: "Event") -> None:
            elapsed = time.perf_counter() - started
            if event.stage == "calibrate" and not event.total:
                typer.echo("drawing calibration samples", err=True)
            elif event.stage == "write":
                typer.echo(f"block {event.block + 1} of {event.blocks} pruned, {elapsed:.1f} s", err=True)

        yield plain
        return
    with _bar() as bar:
        task = bar.add_task("opening", total=None, detail="")

        def show(event: "Event") -> None:
            if event.stage == "calibrate":
                bar.update(task, description="calibration", total=event.total or None, completed=event.done, detail="")
            elif event.stage == "record":
                bar.update(task, description="recording calls", total=event.total, completed=event.done, detail="")
            elif event.blocks:
                detail = event.matrix or f"{event.stage} {event.done}/{event.total}" if event.total else event.stage
                finished = event.block + (event.stage == "write")
                bar.update(task, description="blocks", total=event.blocks, completed=finished, detail=detail)

        yield show


@contextmanager
def _evaluation_progress() -> Iterator[Callable[[str, int, int], None]]:
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    with _bar() as bar:
        task = bar.add_task("opening", total=None, detail="")
        yield lambda stage, done, total: bar.update(task, description=stage, total=total, completed=done, detail="")


def main() -> None:
    """Run the command line. Exits with 2 for the user's mistake, 1 for a failure, 130 for an interruption."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # wherever it stands
    try:
        app(args=arguments)
    except SecateurError as error:
        if len(arguments) < len(sys.argv[1:]):
            raise
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1 if isinstance(error, NumericalError) else 2)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # typer's own code for an interruption
            raise
        typer.secho("Interrupted; nothing was left behind.", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
