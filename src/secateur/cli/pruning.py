"""`plan`, `prune` and `gradients`."""

import sys
from dataclasses import replace
from typing import Annotated

import typer

from secateur.cli.app import app, epilog
from secateur.cli.display import (
    gradient_progress,
    print_json,
    print_tables,
    progress,
    quiet_libraries,
    since_start,
    status,
)
from secateur.cli.options import (
    AlphaOption,
    BatchOption,
    BosOption,
    CalibrationOption,
    ConfigOption,
    CorrectionOption,
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
    WithinOption,
)


@app.command(
    epilog=epilog(
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
    bos: BosOption = "auto",
    gradient: GradientOption = None,
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
    config: ConfigOption = None,
    as_json: JsonOption = False,
    output: Annotated[str | None, typer.Option("--output", "-o", hidden=True)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", hidden=True)] = False,
) -> None:
    """Show what would be pruned, what not and why, and the memory, disk and time that it would take. Changes nothing.

    Takes every option of `prune`, so that a command can be tried by changing one word.
    """
    with quiet_libraries(), status("Reading the model"):
        from secateur.pruning.forecast import estimate

        started = since_start()  # Python and the libraries take that long for `prune` as well
        result = estimate(
            model,
            method=method,
            norm=norm,  # type: ignore[arg-type]
            alpha=alpha,
            option=option or (),
            sparsity=sparsity,
            pattern=pattern,
            per=per,  # type: ignore[arg-type]
            calibration=calibration or "c4",
            samples=samples,
            length=length,
            seed=seed,
            sampling=sampling,  # type: ignore[arg-type]
            bos=bos,  # type: ignore[arg-type]
            only=only or (),
            skip=skip or (),
            gradient=gradient,
            propagate=propagate,  # type: ignore[arg-type]
            within=within,  # type: ignore[arg-type]
            targets=targets,  # type: ignore[arg-type]
            correction=correction,
            statistics_device=statistics_device,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            offload_states=offload_states,
            output=output,
            overwrite=overwrite,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        result = replace(result, seconds=result.seconds + started)
    if as_json:
        print_json(result.to_json())
    else:
        from secateur.report.terminal import estimate_tables

        print_tables(estimate_tables(result))


@app.command(
    epilog=epilog(
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
    bos: BosOption = "auto",
    gradient: GradientOption = None,
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
    config: ConfigOption = None,
    as_json: JsonOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that Secateur wrote.")] = False,
) -> None:
    """Prune a model and write an ordinary Hugging Face checkpoint with a manifest, secateur.json, beside it.

    The source is never changed, and the output appears under its name only when it is complete.
    """
    with quiet_libraries(), progress() as on_event:
        from secateur.pruning.engine import prune as run

        manifest = run(
            model,
            method=method,
            norm=norm,  # type: ignore[arg-type]
            alpha=alpha,
            option=option or (),
            sparsity=sparsity,
            pattern=pattern,
            per=per,  # type: ignore[arg-type]
            calibration=calibration or "c4",
            samples=samples,
            length=length,
            seed=seed,
            sampling=sampling,  # type: ignore[arg-type]
            bos=bos,  # type: ignore[arg-type]
            only=only or (),
            skip=skip or (),
            gradient=gradient,
            propagate=propagate,  # type: ignore[arg-type]
            within=within,  # type: ignore[arg-type]
            targets=targets,  # type: ignore[arg-type]
            correction=correction,
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
    epilog=epilog(
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
    bos: BosOption = "auto",
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
        from secateur.collect.gradient_pass import gradients as take

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
            sampling=sampling,  # type: ignore[arg-type]
            bos=bos,  # type: ignore[arg-type]
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
