"""`plan`, `prune`, `allocate` and `gradients`."""

import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from secateur.cli.app import Config, Json, command
from secateur.cli.configuration import several_runs
from secateur.cli.display import (
    print_json,
    print_result,
    print_tables,
    progress,
    quiet_libraries,
    stage_progress,
    status,
)
from secateur.cli.processes import LogDir, devices_of, logged, started_for
from secateur.cli.voice import say
from secateur.collect.settings import GradientSettings
from secateur.launched import launched
from secateur.pruning.presets import preset_options, spelled
from secateur.pruning.settings import AllocateSettings, PlanSettings, PruneSettings
from secateur.runs.options import OPTIONS, Option

if TYPE_CHECKING:
    from secateur.record.manifest import Manifest

PushTo = Annotated[
    str | None,
    Option(OPTIONS, "Publish the result in this repository of the hub, as secateur push does: OWNER/NAME."),
]
# What most runs need, in this order.
COMMON = (
    "output",
    "sparsity",
    "pattern",
    "preset",
    "method",
    "calibration",
    "samples",
    "length",
    "device",
    "packed",
    "resume",
)


@command(
    "secateur plan HuggingFaceTB/SmolLM2-135M",
    "secateur plan ./llama --pattern 2:4 --skip '*.down_proj'",
    "secateur plan ./llama --processes 8 --bandwidth 400GB --device-memory 80GB",
    "secateur plan ./llama --json",
    hidden=("output", "overwrite", "resume"),
    common=COMMON,
)
def plan(settings: PlanSettings, config: Config = None, as_json: Json = False) -> None:
    """Show what would be pruned, what not and why, and the memory, disk and time that it would take. Changes nothing.

    Takes every option of `prune`, so that a command can be tried by changing one word.
    """
    _tell_preset(settings)
    with status("Reading the model"), quiet_libraries():
        import psutil

        _tell_of_zeros(settings.model)

        from secateur.pruning.forecast import estimate
        from secateur.report.terminal import estimate_tables

        if len(devices := devices_of(settings.device)) > 1:
            count = settings.processes if settings.processes > 1 else len(devices)
            settings = replace(settings, device=devices[0], processes=count)
        started = time.time() - psutil.Process().create_time()  # Python and its libraries, also for `prune`
        result = estimate(**vars(settings))
        result = replace(result, seconds=result.seconds + started, notes=[*_better(settings), *result.notes])
    print_result(result, estimate_tables, as_json)


@command(
    "secateur prune HuggingFaceTB/SmolLM2-135M -o smollm2-50 --method wanda --sparsity 0.5",
    "secateur prune HuggingFaceTB/SmolLM2-135M -o smollm2-2of4 --pattern 2:4 --push-to somebody/smollm2-2of4",
    "secateur prune ./llama -o ./llama-2of4 --pattern 2:4 --calibration my.jsonl --samples 64 --length 1024",
    "secateur prune ./llama -o ./llama-packed --pattern 2:4 --packed",
    "secateur prune ./llama -o ./llama-60 --preset best --sparsity 0.6",
    "secateur prune ./llama -o ./llama-60 --allocation sensitivity --sparsity 0.6",
    "secateur prune model.gguf -o pruned --calibration python-docs --sampling concat --length 512",
    "secateur prune ./llama -o pruned --method my_methods:my_score",
    "torchrun --nproc-per-node 4 -m secateur prune ./llama -o pruned",
    required=("output",),
    common=COMMON,
    processes=True,
)
def prune(
    settings: PruneSettings,
    push_to: PushTo = None,
    config: Config = None,
    as_json: Json = False,
    log_dir: LogDir = None,
) -> None:
    """Prune a model and write an ordinary Hugging Face checkpoint with a manifest, secateur.json, beside it.

    The source is never changed, and the output appears under its name only when it is complete.
    """
    if several_runs() and (finished := _finished(settings)) is not None:
        say(f"{settings.output}: finished already by this command, and left alone.")
        if as_json:
            print_json(finished.to_json())
        return
    if started_for(settings.device):
        return
    _tell_preset(settings)
    started = time.perf_counter()  # as the bar's clock
    with logged(log_dir) as log, progress() as on_event, quiet_libraries():
        from secateur.pruning.engine import prune as run
        from secateur.report.terminal import manifest_tables

        _tell_of_zeros(settings.model)
        if push_to is not None and launched().rank == 0:
            _check_push(str(settings.model), push_to)
        loading = time.perf_counter() - started
        manifest = run(**vars(settings) | {"on_event": log.beside(on_event)})
    print_result(manifest, partial(manifest_tables, output=str(settings.output), loading=loading), as_json)
    if push_to is not None and launched().rank == 0:
        with status("Verifying and pushing"), quiet_libraries():
            from secateur.cli.evaluation import evaluation_store
            from secateur.report.push import push_lines, push_to_hub

            pushed = push_to_hub(str(settings.output), push_to, evaluations=evaluation_store())
        print_tables(push_lines(pushed), error=as_json)


def _tell_of_zeros(model: Any) -> None:
    """Say in a line that a model was pruned before."""
    from secateur.errors import CheckpointError
    from secateur.record.manifest import FILE_NAME, read_manifest

    folder = Path(str(model)).expanduser()
    if not (folder / FILE_NAME).is_file():
        return
    with suppress(CheckpointError):  # opening the model tells of it
        manifest = read_manifest(folder)
        if manifest.removes:
            say(
                f"{folder} was pruned already, with {manifest.method}, to sparsity {manifest.totals['sparsity']:.4f}: "
                "its zeros count among those that are asked for now. For a lower sparsity, or another method, prune "
                f"{manifest.source.get('path') or 'the dense model'} again."
            )


def _check_push(model: str, repository: str) -> None:
    """Raise `CheckpointError` before any work for what a push would refuse after it."""
    from secateur.errors import CheckpointError
    from secateur.record.publication import base_model
    from secateur.report.push import signed_in

    if base_model({"path": model}) is None:
        raise CheckpointError(
            f"--push-to {repository}: {model} has no known name on the hub, and whoever finds the result there must "
            "know what it is made of. Prune first, then: secateur push OUTPUT REPOSITORY --base-model OWNER/NAME"
        )
    signed_in(repository)


@command(
    "secateur allocate ./llama -o plan.json --allocation sensitivity --sparsity 0.6",
    "secateur allocate ./llama -o plan.json --allocation owl --allocation-option width=0.1 --pattern 4:8",
    required=("allocation",),
)
def allocate(settings: AllocateSettings, config: Config = None, as_json: Json = False) -> None:
    """Divide the zeros of a pattern among the matrices of a model, and write the plan for `prune --plan`.

    As many weights are removed as with the same sparsity everywhere. One of eight calibration windows is held out:
    where the plan is not better than the uniform one there, the file holds the uniform one. Nothing is pruned.
    """
    with stage_progress(lines=True) as show, quiet_libraries():
        from secateur.pruning.allocating import allocate as run
        from secateur.report.terminal import allocation_tables

        made = run(**vars(settings) | {"progress": show})
    print_result(made, partial(allocation_tables, output=str(settings.output)), as_json)


@command(
    "secateur gradients ./llama -o llama-gradients.safetensors --norm l1",
    "secateur gradients ./llama -o g.safetensors --norm l1,l2 --calibration my.jsonl --samples 64 --length 1024",
    processes=True,
)
def gradients(settings: GradientSettings, config: Config = None, as_json: Json = False, log_dir: LogDir = None) -> None:
    """Take the norm of every weight's gradient over calibration samples, in the memory of one block, into a file.

    For several runs: give it to `prune --method gblm --gradient FILE` with the same calibration options. Without a
    file, prune takes the gradients that it needs itself.
    """
    if started_for(settings.device):
        return
    with logged(log_dir) as log, stage_progress(lines=True) as show, quiet_libraries():
        from secateur.collect.gradient_pass import gradients as take
        from secateur.report.terminal import gradient_table

        file = take(**vars(settings) | {"progress": log.stages_beside(show)})
    if as_json:
        print_json({"file": str(file.path), "matrices": len(file.matrices), **file.provenance})
    else:
        print_tables(gradient_table(file))


def _finished(settings: PruneSettings) -> "Manifest | None":
    """The manifest of the output where that is there already, made by the same command, however it was told."""
    from secateur.record.manifest import FILE_NAME, read_manifest

    output = Path(str(settings.output)).expanduser()
    if not (output / FILE_NAME).is_file():
        return None
    manifest = read_manifest(output)
    made, asked = (
        [word for word in command or () if word != "--json"] for command in (manifest.command, settings.command)
    )
    return manifest if made == asked else None


def _better(settings: PruneSettings) -> list[str]:
    """What somebody who chose no way of pruning should know of the default."""
    default = PruneSettings(settings.model)
    same = all(getattr(settings, name) == getattr(default, name) for name in ("preset", "method", "within", "targets"))
    advice = (
        "Wanda, the default, is quick and leaves every kept weight as it was, bit for bit. --preset best loses less "
        "quality: it updates them too, and takes longer."
    )
    return [advice] if same else []


def _tell_preset(settings: PruneSettings) -> None:
    """Say what a preset stands for, before the work starts."""
    if settings.preset is not None:
        print(f"--preset {settings.preset} is {spelled(preset_options(vars(settings)))}", file=sys.stderr)
