"""`sweep`."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

from secateur.cli.app import Config, Json, command
from secateur.cli.display import print_json, print_result, print_tables, quiet_libraries, sweep_progress
from secateur.cli.streams import print_error
from secateur.cli.voice import say
from secateur.runs.options import ARGUMENTS, Option
from secateur.sweeps.settings import SweepSettings


@command(
    "secateur sweep ./llama -o table --methods magnitude,wanda,sparsegpt --sparsity 0.5,0.6 --pattern 2:4",
    "secateur sweep ./llama -o table --methods wanda,wanda+least_squares --data wikitext2 --data c4 --dry-run",
    "secateur sweep ./llama -o table --methods magnitude,wanda,sparsegpt --sparsity 0.5,0.6 --ray",
    "secateur sweep ./llama -o table --methods wanda,gblm --seeds 0,1,2 --latex",
    "secateur sweep ./llama -o table --methods wanda,sparsegpt --tasks commonsense7 --limit 200",
    "secateur sweep ./llama-1b ./llama-3b -o table --methods wanda,sparsegpt --pattern 2:4",
    "secateur sweep ./llama -o table --methods l1=gblm,l2=gblm --option l2.norm=l2 --keep best",
)
def sweep(
    settings: SweepSettings,
    others: Annotated[
        tuple[str, ...], Option(ARGUMENTS, "Further models: one table then has a column for each.", name="models")
    ] = (),
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Prune a model with every method in every pattern, evaluate it each time, and print the papers' table.

    Started again with the same folder, it runs only what is missing. A cell that fails does not stop the others.
    Several models each have a folder inside of that.
    """
    with quiet_libraries():
        from secateur.report.terminal import sweep_estimate_tables, sweep_table_groups, sweeps_table_groups
        from secateur.sweeps.estimate import SweepEstimate
        from secateur.sweeps.grid import grid
        from secateur.sweeps.run import sweep as run
        from secateur.sweeps.several import Sweeps, model_names, sweep_models

        estimates: list[SweepEstimate] = []
        # Ray prints to stdout what it notices of its machines, and the result alone belongs there.
        with redirect_stdout(sys.stderr), sweep_progress() as (on_event, print_above):

            def on_estimate(estimate: SweepEstimate) -> None:
                estimates.append(estimate)
                if not settings.dry_run:
                    print_above(sweep_estimate_tables(estimate))

            options = vars(settings) | {"on_estimate": on_estimate, "on_event": on_event}
            models = [options.pop("model"), *others]
            found = sweep_models(models, **options) if others else run(*models, **options)
    if settings.dry_run and others:
        named = dict(zip(model_names(models), estimates, strict=True))
        if as_json:
            print_json({"models": {name: estimate.to_json() for name, estimate in named.items()}})
        for name, estimate in named.items() if not as_json else ():
            print_tables(f"{name}:")
            print_tables(sweep_estimate_tables(estimate))
        return
    if settings.dry_run:
        print_result(estimates[0], sweep_estimate_tables, as_json)
        return
    print_result(found, sweeps_table_groups if isinstance(found, Sweeps) else sweep_table_groups, as_json)
    sweeps = found.sweeps if isinstance(found, Sweeps) else {"": found}
    asked = {task.cell.folder for task in grid(settings)}
    failed = [(name, cell) for name, own in sweeps.items() for cell in own.failed]
    if failed:
        print_error(f"{len(failed)} of {sum(len(own.cells) for own in sweeps.values())} cells failed:")
        for name, cell in failed:
            earlier = "" if cell.folder in asked else " (earlier, and not asked for this time)"
            print_error(f"  {', '.join(filter(None, [name, cell.name]))}{earlier}: {cell.error}")
    for own in sweeps.values():
        if len(own.failed) < len(own.cells):
            _report(own.folder)
    if failed:
        sys.exit(1)


def _report(output: Path) -> None:
    """The page of a finished sweep, with its curves, where the libraries for it are installed."""
    from secateur.errors import SecateurError
    from secateur.report.sweep_page import build_sweep

    try:
        with quiet_libraries():
            page = build_sweep(output)
    except SecateurError as error:
        say(f"No page with curves was written: {error}")
    else:
        say(f"Curves and sortable tables: {page}")
