"""`inspect` and `verify`."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

from secateur.cli.app import Json, command
from secateur.cli.display import print_json, print_result, print_tables, quiet_libraries, status
from secateur.collect.settings import Revision, Trust
from secateur.runs.options import ARGUMENTS, OPTIONS, Option


@command("secateur inspect ./pruned", "secateur inspect ./pruned --matrices")
def inspect(
    model: Annotated[str, Option(ARGUMENTS, "A folder, a hub id, or a GGUF file.")],
    *,
    matrices: Annotated[bool, Option(OPTIONS, "One row for every matrix.")] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show the sparsity and the detected pattern of a model's matrices, by block and by kind, whoever pruned it."""
    with quiet_libraries(), status("Counting zeros"):
        from secateur.report.inspect import inspect as measure
        from secateur.report.terminal import inspection_tables

        result = measure(model, revision=revision, trust_remote_code=trust_remote_code)
    print_result(result, partial(inspection_tables, every_matrix=matrices), as_json)


@command("secateur verify ./pruned", "secateur verify ./pruned --source ./llama")
def verify(
    output: Annotated[str, Option(ARGUMENTS, "A checkpoint that Secateur wrote.")],
    *,
    source: Annotated[
        str | None, Option(OPTIONS, "The dense model: compare every tensor with it, byte for byte.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove from the files alone that a pruned checkpoint is what its manifest says. Exits with 1 when it is not."""
    with quiet_libraries(), status("Verifying"):
        from secateur.models.opening.opened import open_source
        from secateur.record.verify import verify as check
        from secateur.report.terminal import verification_tables

        result = check(Path(output), open_source(source) if source is not None else None)
    if as_json:
        print_json({**vars(result), "folder": str(result.folder), "ok": result.ok, "sparsity": result.sparsity})
    else:
        print_tables(verification_tables(result))
    if not result.ok:
        sys.exit(1)
