"""`eval` and `compare`."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.app import app, epilog
from secateur.cli.display import evaluation_progress, print_json, print_tables, quiet_libraries, write_csv
from secateur.cli.options import (
    BatchOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OffloadOption,
    RevisionOption,
    TrustOption,
    WindowsOption,
)


@app.command(
    name="eval",
    epilog=epilog(
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
    epilog=epilog(
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
