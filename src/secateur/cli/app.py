"""The commands. Heavy imports wait for the command that needs them."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import secateur
from secateur.cli.display import (
    evaluation_progress,
    gradient_progress,
    print_json,
    print_tables,
    progress,
    quiet_libraries,
    status,
    write_csv,
)
from secateur.cli.options import (
    AlphaOption,
    BatchOption,
    CalibrationOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    GradientOption,
    JsonOption,
    LengthOption,
    MethodOption,
    MethodOptionsOption,
    ModelArgument,
    NormOption,
    OffloadOption,
    OnlyOption,
    PatternOption,
    PerOption,
    PropagateOption,
    RevisionOption,
    SamplesOption,
    SamplingOption,
    SeedOption,
    SkipOption,
    SparsityOption,
    StatisticsDeviceOption,
    TargetsOption,
    TrustOption,
    WindowsOption,
    WithinOption,
)
from secateur.errors import NumericalError, SecateurError

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
    norm: NormOption = None,
    alpha: AlphaOption = None,
    option: MethodOptionsOption = None,
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
    gradient: GradientOption = None,
    propagate: PropagateOption = "pruned",
    within: WithinOption = "block",
    targets: TargetsOption = "pruned",
    statistics_device: StatisticsDeviceOption = None,
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
    from secateur.cli.parsing import method_of, pattern_of

    chosen = pattern_of(sparsity, pattern, per)
    solver = method_of(method, option or (), norm=norm, alpha=alpha)
    with quiet_libraries(), status("Reading the model"):
        from secateur.forecast import estimate

        result = estimate(
            model,
            method=solver,
            pattern=chosen,
            samples=samples,
            length=length,
            only=only or (),
            skip=skip or (),
            gradient=gradient,
            propagate=propagate,
            within=within,
            targets=targets,
            statistics_device=statistics_device,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            offload_states=offload_states,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        print_json(result.to_json())
    else:
        from secateur.report.terminal import estimate_tables

        print_tables(estimate_tables(result))


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
    norm: NormOption = None,
    alpha: AlphaOption = None,
    option: MethodOptionsOption = None,
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
    gradient: GradientOption = None,
    propagate: PropagateOption = "pruned",
    within: WithinOption = "block",
    targets: TargetsOption = "pruned",
    statistics_device: StatisticsDeviceOption = None,
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
    from secateur.cli.parsing import method_of, pattern_of

    chosen = pattern_of(sparsity, pattern, per)
    solver = method_of(method, option or (), norm=norm, alpha=alpha)
    with quiet_libraries(), progress() as on_event:
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
            gradient=gradient,
            propagate=propagate,
            within=within,
            targets=targets,
            statistics_device=statistics_device,
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
        print_json(manifest.to_json())
    else:
        from secateur.report.terminal import manifest_tables

        print_tables(manifest_tables(manifest, output))


@app.command(
    epilog=_epilog(
        "secateur gradients ./llama -o llama-gradients.safetensors --norm l1",
        "secateur gradients ./llama -o g.safetensors --norm l1,l2 --calibration my.jsonl --samples 64 --length 1024",
    )
)
def gradients(
    model: ModelArgument,
    output: Annotated[str, typer.Option("--output", "-o", help="File for the gradients.", show_default=False)],
    norm: Annotated[str, typer.Option("--norm", help="l1, l2, or both as l1,l2 (one pass makes both).")] = "l1",
    granularity: Annotated[
        str, typer.Option("--granularity", help="A gradient for each sample, as published, or for each token.")
    ] = "sample",
    scope: Annotated[
        str, typer.Option("--scope", help="Of the model's loss, or of the output norm of each block: model or block.")
    ] = "model",
    only: OnlyOption = None,
    skip: SkipOption = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    seed: SeedOption = 0,
    sampling: SamplingOption = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    offload_states: OffloadOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Take the norm of every weight's gradient over calibration samples, in the memory of one block, into a file.

    For several runs: give it to `prune --method gblm --gradient FILE` with the same calibration options. Without a
    file, prune takes the gradients that it needs itself.
    """
    with quiet_libraries(), gradient_progress() as show:
        from secateur.gradient_pass import gradients as take

        file = take(
            model,
            output,
            norms=[part.strip() for part in norm.split(",")],  # type: ignore[misc]  # checked there
            granularity=granularity,  # type: ignore[arg-type]
            scope=scope,  # type: ignore[arg-type]
            only=only or (),
            skip=skip or (),
            calibration=calibration or "c4",
            samples=samples,
            length=length,
            seed=seed,
            sampling=sampling,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            offload_states=offload_states,
            overwrite=overwrite,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
    if as_json:
        print_json({"file": str(file.path), "matrices": len(file.matrices), **file.provenance})
    else:
        from secateur.report.terminal import gradient_table

        print_tables(gradient_table(file))


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
    windows: WindowsOption = None,
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
    with quiet_libraries(), evaluation_progress() as show:
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
            progress=show,
        )
    if as_json:
        print_json(result.to_json())
    else:
        from secateur.report.terminal import perplexity_table

        print_tables(perplexity_table(result))


@app.command(
    epilog=_epilog(
        "secateur compare ./llama ./pruned --data wikitext2",
        "secateur compare ./llama ./wanda ./gblm --data wikitext2 --data c4 --windows 40 --csv table.csv",
    )
)
def compare(
    dense: Annotated[str, typer.Argument(help="The dense model: folder, hub id, or GGUF file.", show_default=False)],
    pruned: Annotated[list[str], typer.Argument(help="Pruned models to compare with it.", show_default=False)],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help="As for eval; repeat it for several texts [default: wikitext2]."),
    ] = None,
    length: LengthOption = None,
    windows: WindowsOption = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    offload_states: OffloadOption = "auto",
    trust_remote_code: TrustOption = False,
    config: ConfigOption = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Also write the table to this CSV file.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare pruned models with the dense one on the same tokens: perplexity, divergence, first choices.

    Differences are paired window by window. The models run one after the other, each in the memory of one block.
    """
    with quiet_libraries(), evaluation_progress() as show:
        from secateur.evaluate.agreement import agreement

        results = [
            agreement(
                dense,
                pruned,
                text,
                length=length,
                windows=windows,
                batch_size=batch_size,
                device=device,
                dtype=dtype,
                offload_states=offload_states,
                trust_remote_code=trust_remote_code,
                progress=show,
            )
            for text in data or ["wikitext2"]
        ]
    rows = [row.to_json() for text in results for row in text]
    if csv is not None:
        write_csv(csv, rows)
    if as_json:
        print_json({"dense": dense, "results": rows})
    else:
        from secateur.report.terminal import comparison_table

        print_tables(comparison_table(results))


@app.command(epilog=_epilog("secateur inspect ./pruned", "secateur inspect ./pruned --matrices"))
def inspect(
    model: ModelArgument,
    matrices: Annotated[bool, typer.Option("--matrices", help="One row for every matrix.")] = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show the sparsity and the detected pattern of a model's matrices, by block and by kind, whoever pruned it."""
    with quiet_libraries(), status("Counting zeros"):
        from secateur.report.inspect import inspect as measure

        result = measure(model, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(result.to_json())
    else:
        from secateur.report.terminal import inspection_tables

        print_tables(inspection_tables(result, every_matrix=matrices))


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
    with quiet_libraries(), status("Verifying"):
        from secateur.manifest import verify as check
        from secateur.models.opened import open_source

        result = check(output, open_source(source) if source is not None else None)
    if as_json:
        print_json({**vars(result), "folder": str(result.folder), "ok": result.ok, "sparsity": result.sparsity})
    else:
        from secateur.report.terminal import verification_tables

        print_tables(verification_tables(result))
    if not result.ok:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line. Exits with 2 for the user's mistake, 1 for a failure, 130 for an interruption."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # wherever it stands
    try:
        app(args=arguments, prog_name="secateur")
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
