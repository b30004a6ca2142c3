"""`report`, `push`, `inspect` and `verify`."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from secateur.cli.app import Config, Json, command
from secateur.cli.display import print_json, print_result, print_tables, quiet_libraries, stage_progress, status
from secateur.cli.evaluation import evaluation_store
from secateur.collect.settings import Revision, Trust
from secateur.errors import CheckpointError, SecateurError
from secateur.report.settings import PushSettings
from secateur.runs.options import ARGUMENTS, OPTIONS, Option

if TYPE_CHECKING:
    from secateur.evaluate.results import Record
    from secateur.record.manifest import Manifest


@command(
    "secateur report ./pruned --open",
    "secateur report ./pruned --evaluation compared.json",
    "secateur report ./my-sweep",
)
def report(
    folder: Annotated[
        str, Option(ARGUMENTS, "A checkpoint that Secateur wrote, or the folder of a sweep.", name="output")
    ],
    *,
    evaluation: Annotated[
        tuple[str, ...],
        Option(
            OPTIONS,
            "A file with what secateur eval --json or compare --json printed, for evaluations made elsewhere; repeat "
            "it.",
            "-e",
        ),
    ] = (),
    open_page: Annotated[bool, Option(OPTIONS, "Show the page in the browser.", name="open")] = False,
) -> None:
    """Write one page that shows what a run did: figures, sparsity, errors, and the mask of every matrix.

    It shows what eval and compare found of this checkpoint on this machine, and puts it into the model card. The page
    is OUTPUT/report/index.html, a single file that fetches nothing; its pictures lie beside it. The weights are read,
    and nothing but the report and the figures in the model card is written.
    """
    output = Path(folder)
    with stage_progress() as show, quiet_libraries():
        from secateur.report.sweep_page import build_sweep
        from secateur.sweeps.folder import SWEEP_FILE
        from secateur.sweeps.several import SWEEPS_FILE, Sweeps

        refreshed = True
        if (output / SWEEP_FILE).is_file():
            if evaluation:
                raise CheckpointError(f"{output} is a sweep; its sweep.json has the figures of every run.")
            page = build_sweep(output, show)
        elif (output / SWEEPS_FILE).is_file():
            raise CheckpointError(
                f"{output} has a sweep for each of several models: "
                f"{', '.join(str(own.folder) for own in Sweeps.read(output).sweeps.values())}. Report one of them."
            )
        else:
            from secateur.files.digest import model_digest
            from secateur.record.card import refresh_card
            from secateur.record.manifest import read_manifest
            from secateur.report.checkpoint_page import build
            from secateur.report.evaluations import kept_evaluations, read_evaluations, with_dense

            manifest = read_manifest(output)
            found = kept_evaluations(evaluation_store().of(model_digest(output)))
            found += [item for file in evaluation for item in read_evaluations(Path(file), output)]
            if any(item["kind"] == "perplexity" for item in found):
                found = with_dense(found, _kept_of_dense(manifest))
            page = build(output, found, show)
            refreshed = not found or refresh_card(output, manifest, found)
    print(f"Report: {page}")
    if not refreshed:
        print("README.md has no place for figures any more and was left as it is.")
    if open_page:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            print("No browser could be started here; open the page yourself.")


def _kept_of_dense(manifest: "Manifest") -> "list[Record]":
    """What the store keeps of the dense model, if that is still where the manifest says, and still the same."""
    from secateur.files.checkpoint import Checkpoint, tensor_digest
    from secateur.files.digest import model_digest

    path = Path(str(manifest.source.get("path") or ""))
    try:
        if not path.is_absolute() or not path.exists():
            return []
        records = evaluation_store().of(model_digest(path))
        if not records or not path.is_dir():
            return records
        source = Checkpoint(path)
        same = all(
            name in source.tensors and tensor_digest(source.read([name])[name]) == digest
            for name, digest in manifest.source_tensors.items()
        )
        return records if same else []
    except SecateurError:
        return []


@command(
    "secateur push ./pruned somebody/llama-2of4",
    "secateur push ./pruned somebody/llama-2of4 --base-model meta-llama/Llama-3.2-1B --private",
    "secateur push ./pruned somebody/llama-2of4 --create-pr --message 'Calibrated on more text'",
)
def push(settings: PushSettings, config: Config = None, as_json: Json = False) -> None:
    """Publish a checkpoint on the Hugging Face Hub, once it is proved to be what its manifest says.

    The model card and the manifest go there without the names of folders of this machine; the card has what eval and
    compare found of this checkpoint here. Sign in first, with hf auth login. Nothing in the folder changes.
    """
    with status("Verifying and pushing"), quiet_libraries():
        from secateur.report.push import push_lines, push_to_hub

        settings = replace(settings, evaluations=settings.evaluations or evaluation_store())
        result = push_to_hub(**vars(settings))
    if as_json:
        print_json(result.to_json())
        return
    print_tables(push_lines(result))


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
    with status("Counting zeros"), quiet_libraries():
        from secateur.report.inspect import inspect as measure
        from secateur.report.terminal import inspection_tables

        result = measure(model, revision=revision, trust_remote_code=trust_remote_code)
    print_result(result, partial(inspection_tables, every_matrix=matrices), as_json)


@command(
    "secateur verify ./pruned",
    "secateur verify ./pruned --source ./llama",
    "secateur verify somebody/llama-2of4",
)
def verify(
    output: Annotated[str, Option(ARGUMENTS, "A checkpoint that Secateur wrote: a folder, or a hub id.")],
    *,
    revision: Revision = None,
    source: Annotated[
        str | None, Option(OPTIONS, "The dense model: compare every tensor with it, byte for byte.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove from the files alone that a pruned checkpoint is what its manifest says. Exits with 1 when it is not."""
    with status("Verifying"), quiet_libraries():
        from secateur.files.folders import locate
        from secateur.record.publication import hub_id
        from secateur.record.verify import verify as check
        from secateur.report.terminal import verification_tables

        folder = locate(output, revision, whole=True) if hub_id(output) and not Path(output).exists() else Path(output)
        result = check(folder, source)
    if as_json:
        print_json({**vars(result), "folder": str(result.folder), "ok": result.ok, "sparsity": result.sparsity})
    else:
        print_tables(verification_tables(result))
    if not result.ok:
        sys.exit(1)
