"""`sweep`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.app import app, epilog
from secateur.cli.display import print_json, print_tables, quiet_libraries, sweep_progress
from secateur.cli.options import (
    METHOD_NAMES,
    REFINEMENT_NAMES,
    BatchOption,
    BosOption,
    CalibrationOption,
    ConfigOption,
    CorrectionOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    OffloadOption,
    OnlyOption,
    PerOption,
    PropagateOption,
    RevisionOption,
    SamplesOption,
    SamplingOption,
    SeedOption,
    SkipOption,
    StatisticsDeviceOption,
    TargetsOption,
    TrustOption,
    WithinOption,
)

EVALUATION = "Evaluation"


@app.command(
    epilog=epilog(
        "secateur sweep ./llama -o table --methods magnitude,wanda,sparsegpt --sparsity 0.5,0.6 --pattern 2:4",
        "secateur sweep ./llama -o table --methods wanda,wanda+least_squares --data wikitext2 --data c4 --dry-run",
        "secateur sweep ./llama -o table --methods l1=gblm,l2=gblm --option l2.norm=l2 --keep best",
    )
)
def sweep(
    model: ModelArgument,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="Folder for the tables and cells; started again there, goes on.", show_default=False
        ),
    ],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "-m",
            help=f"Separated by commas, or repeated: {', '.join(METHOD_NAMES)}, or MODULE:FUNCTION or "
            f"FILE.py:FUNCTION; with a plus, a refinement: {', '.join(REFINEMENT_NAMES)}. LABEL=METHOD gives it "
            "another name "
            "[default: magnitude,wanda,sparsegpt].",
            rich_help_panel="What to prune",
            show_default=False,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            help="METHOD.NAME=VALUE or METHOD.REFINEMENT.NAME=VALUE, such as sparsegpt.damping=0.02; repeat it.",
            rich_help_panel="What to prune",
            show_default=False,
        ),
    ] = None,
    sparsity: Annotated[
        list[str] | None,
        typer.Option(
            "--sparsity",
            "-s",
            help="Fractions of weights to remove, such as 0.5,0.6 [default: 0.5, without --pattern].",
            rich_help_panel="What to prune",
            show_default=False,
        ),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern",
            "-p",
            help="N:M patterns, such as 2:4,4:8, beside the sparsities.",
            rich_help_panel="What to prune",
            show_default=False,
        ),
    ] = None,
    per: PerOption = None,
    only: OnlyOption = None,
    skip: SkipOption = None,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            help="Pruned checkpoints that stay: none, best (for each pattern, on the first data set), or all.",
            rich_help_panel="What to prune",
        ),
    ] = "none",
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="As for eval; repeat it for several texts [default: wikitext2].",
            rich_help_panel=EVALUATION,
            show_default=False,
        ),
    ] = None,
    eval_length: Annotated[
        int | None,
        typer.Option(
            "--eval-length",
            min=2,
            help="Tokens in each window of the evaluation [default: 2048].",
            rich_help_panel=EVALUATION,
            show_default=False,
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            "--windows",
            "-w",
            min=1,
            help="Use only the first windows [default: all].",
            rich_help_panel=EVALUATION,
            show_default=False,
        ),
    ] = None,
    agreement: Annotated[
        bool,
        typer.Option(
            "--agreement",
            help="Also compare predictions with the dense model's; takes two more forwards for each cell.",
            rich_help_panel=EVALUATION,
        ),
    ] = False,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            "-l",
            min=2,
            help="Tokens in each calibration sample [default: 2048].",
            rich_help_panel="Calibration",
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = 0,
    sampling: SamplingOption = None,
    bos: BosOption = "auto",
    propagate: PropagateOption = "pruned",
    within: WithinOption = "block",
    targets: TargetsOption = "pruned",
    correction: CorrectionOption = None,
    statistics_device: StatisticsDeviceOption = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    offload_states: OffloadOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    again: Annotated[
        list[str] | None,
        typer.Option(
            "--again",
            help="Run the cells of these methods again, whose code or options have changed.",
            rich_help_panel="How to run",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the cells and the estimate, and change nothing.")
    ] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prune a model with every method in every pattern, evaluate it each time, and print the papers' table.

    Started again with the same folder, it runs only what is missing. A cell that fails does not stop the others.
    """
    with quiet_libraries():
        from secateur.report.terminal import sweep_estimate_tables, sweep_table_groups
        from secateur.runs.options import listed
        from secateur.sweeps.estimate import SweepEstimate
        from secateur.sweeps.grid import grid
        from secateur.sweeps.run import run
        from secateur.sweeps.settings import SweepSettings

        estimates: list[SweepEstimate] = []
        with sweep_progress() as (on_event, print_above):

            def on_estimate(estimate: SweepEstimate) -> None:
                estimates.append(estimate)
                if not dry_run:
                    print_above(sweep_estimate_tables(estimate))

            settings = SweepSettings(
                model,
                methods=methods or ("magnitude", "wanda", "sparsegpt"),
                option=option or (),
                sparsity=sparsity or (),
                patterns=pattern or (),
                per=per,  # type: ignore[arg-type]
                output=output,
                data=data or "wikitext2",
                eval_length=eval_length,
                windows=windows,
                agreement=agreement,
                keep=keep,  # type: ignore[arg-type]
                calibration=calibration or "c4",
                samples=samples,
                length=length,
                seed=seed,
                sampling=sampling,  # type: ignore[arg-type]
                bos=bos,  # type: ignore[arg-type]
                only=only or (),
                skip=skip or (),
                propagate=propagate,  # type: ignore[arg-type]
                within=within,  # type: ignore[arg-type]
                targets=targets,  # type: ignore[arg-type]
                correction=correction,
                statistics_device=statistics_device,
                batch_size=batch_size,
                device=device,
                dtype=dtype,
                offload_states=offload_states,
                revision=revision,
                trust_remote_code=trust_remote_code,
                again=listed(again or ()),
                dry_run=dry_run,
                command=["secateur", *sys.argv[1:]],
                on_estimate=on_estimate,
                on_event=on_event,
            )
            result = run(settings)
    if dry_run:
        if as_json:
            print_json(estimates[0].to_json())
        else:
            print_tables(sweep_estimate_tables(estimates[0]))
        return
    if as_json:
        print_json(result.to_json())
    else:
        print_tables(sweep_table_groups(result))
    asked = {(task.cell.method, task.cell.pattern) for task in grid(settings)}
    if result.failed:
        typer.secho(f"{len(result.failed)} of {len(result.cells)} cells failed:", fg=typer.colors.RED, err=True)
        for cell in result.failed:
            earlier = "" if (cell.method, cell.pattern) in asked else " (earlier, and not asked for this time)"
            typer.secho(f"  {cell.name}{earlier}: {cell.error}", fg=typer.colors.RED, err=True)
    if len(result.failed) < len(result.cells):
        _report(Path(output))
    if result.failed:
        raise typer.Exit(1)


def _report(output: Path) -> None:
    """The page of a finished sweep, with its curves, where the libraries for it are installed."""
    from secateur.errors import SecateurError
    from secateur.report.sweep_page import build_sweep

    try:
        with quiet_libraries():
            page = build_sweep(output)
    except SecateurError as error:
        typer.echo(f"No page with curves was written: {error}", err=True)
    else:
        typer.echo(f"Curves and sortable tables: {page}", err=True)
