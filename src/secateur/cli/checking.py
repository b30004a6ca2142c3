"""`inspect` and `verify`."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.app import app, epilog
from secateur.cli.display import print_json, print_tables, quiet_libraries, status
from secateur.cli.options import JsonOption, ModelArgument, RevisionOption, TrustOption


@app.command(epilog=epilog("secateur inspect ./pruned", "secateur inspect ./pruned --matrices"))
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


@app.command(epilog=epilog("secateur verify ./pruned", "secateur verify ./pruned --source ./llama"))
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
        from secateur.models.opening.opened import open_source
        from secateur.record.verify import verify as check

        result = check(output, open_source(source) if source is not None else None)
    if as_json:
        print_json({**vars(result), "folder": str(result.folder), "ok": result.ok, "sparsity": result.sparsity})
    else:
        from secateur.report.terminal import verification_tables

        print_tables(verification_tables(result))
    if not result.ok:
        raise typer.Exit(1)
