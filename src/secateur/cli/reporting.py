"""`report`."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.app import app, epilog
from secateur.cli.display import evaluation_progress, quiet_libraries


@app.command(
    epilog=epilog(
        "secateur report ./pruned --open",
        "secateur report ./pruned --evaluation compared.json",
        "secateur report ./my-sweep",
    )
)
def report(
    output: Annotated[
        Path, typer.Argument(help="A checkpoint that Secateur wrote, or the folder of a sweep.", show_default=False)
    ],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluation",
            "-e",
            help="A file with what secateur eval --json or compare --json printed; repeat it. Its figures also go into "
            "the model card.",
            show_default=False,
        ),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Write one page that shows what a run did: figures, sparsity, errors, and the mask of every matrix.

    The page is OUTPUT/report/index.html, a single file that fetches nothing; its pictures lie beside it. The weights
    are read, and nothing but the report and the figures in the model card is written.
    """
    with quiet_libraries(), evaluation_progress() as show:
        from secateur.report.sweep_page import build_sweep, is_sweep

        notes = []
        if is_sweep(output):
            if evaluation:
                raise typer.BadParameter(f"{output} is a sweep; its sweep.json has the figures of every run.")
            page = build_sweep(output, show)
        else:
            from secateur.card import refresh_card
            from secateur.manifest import read_manifest
            from secateur.report.checkpoint_page import build
            from secateur.report.evaluations import read_evaluations

            found = [item for file in evaluation or () for item in read_evaluations(file, output)]
            page = build(output, found, show)
            if found and not refresh_card(output, read_manifest(output), found):
                notes.append("README.md has no place for figures any more and was left as it is.")
    typer.echo(f"Report: {page}")
    for note in notes:
        typer.echo(note)
    if open_page:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            typer.echo("No browser could be started here; open the page yourself.")
