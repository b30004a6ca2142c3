"""`recover` and `merge`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.app import Interrupted, app, epilog
from secateur.cli.display import (
    evaluation_progress,
    print_json,
    print_tables,
    progress,
    quiet_libraries,
    recovery_progress,
)
from secateur.cli.options import ConfigOption, DeviceOption, JsonOption, TrustOption, WindowsOption
from secateur.errors import CalibrationError, PatternError
from secateur.recover.settings import METHODS

WHAT, TEXT, HOW_LONG, HOW = "What to train", "Text", "How long and how fast", "How to run"
WAYS = (*METHODS, "block")
BLOCK_ONLY = ("dense", "samples", "bos", "epochs")


def option(*names: str, panel: str, help: str) -> Any:
    """An option in one of the panels of the help, whose text tells of its default."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


PrunedArgument = Annotated[str, typer.Argument(help="A pruned checkpoint that Secateur wrote.", show_default=False)]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an output that Secateur wrote.")]


@app.command(
    epilog=epilog(
        "secateur recover ./pruned -o ./adapter --minutes 60",
        "secateur recover ./pruned -o ./adapter --method sparse-lora --targets all-linear --rank 16 --steps 1000",
        "secateur recover ./pruned -o ./recovered --method full --data my.jsonl --steps 2000 --distill ./dense",
        "secateur recover ./pruned -o ./recovered --method block --samples 128 --length 1024",
        "secateur recover ./pruned -o ./adapter --minutes 60 --resume",
    )
)
def recover(
    pruned: PrunedArgument,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the adapter or the checkpoint.", show_default=False)
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            rich_help_panel=WHAT,
            help="lora: an adapter; sparse-lora: one whose product is masked, so that merging is exact; "
            "full: the kept weights; block: the kept weights, one block at a time, to give what dense blocks give.",
        ),
    ] = "lora",
    preset: Annotated[
        str, typer.Option("--preset", rich_help_panel=WHAT, help="paper: Wanda's LoRA script; short: 500 larger steps.")
    ] = "paper",
    targets: Annotated[
        list[str] | None,
        option(
            "--targets",
            panel=WHAT,
            help="Matrices that get an adapter: the last part of a name, a glob, or all-linear; repeat it "
            "[default: peft's choice, q_proj and v_proj of most].",
        ),
    ] = None,
    rank: Annotated[int | None, option("--rank", panel=WHAT, help="Rank of the adapters [default: 8].")] = None,
    alpha: Annotated[
        float | None, option("--alpha", panel=WHAT, help="Adapters are scaled by alpha / rank [default: 16].")
    ] = None,
    dropout: Annotated[
        float | None, option("--dropout", panel=WHAT, help="On the input of adapters [default: 0.05].")
    ] = None,
    only: Annotated[
        list[str] | None,
        option("--only", panel=WHAT, help="full, block: train only what this glob matches; repeat it."),
    ] = None,
    skip: Annotated[
        list[str] | None, option("--skip", panel=WHAT, help="full, block: leave what this glob matches; repeat it.")
    ] = None,
    dense: Annotated[
        str | None,
        option("--dense", panel=WHAT, help="block: the dense model [default: where the manifest says]."),
    ] = None,
    distill: Annotated[
        str | None, option("--distill", panel=WHAT, help="Learn from the predictions of this dense model as well.")
    ] = None,
    distill_weight: Annotated[
        float | None, option("--distill-weight", panel=WHAT, help="Its share of the loss, 0 to 1 [default: 0.5].")
    ] = None,
    temperature: Annotated[
        float | None, option("--temperature", panel=WHAT, help="Of both predictions there [default: 1].")
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            rich_help_panel=TEXT,
            help="Text to train on: as --calibration of prune. A part of its windows is held out.",
        ),
    ] = "c4",
    length: Annotated[
        int | None,
        option(
            "--length",
            "-l",
            panel=TEXT,
            help="Tokens in each window [default: 1024, or what the model takes; block: 2048].",
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        option(
            "--held-out",
            panel=TEXT,
            help="Windows that are not trained on but measured [default: 128; block: an eighth of the samples].",
        ),
    ] = None,
    samples: Annotated[
        int | None, option("--samples", panel=TEXT, help="block: windows in all [default: 128].")
    ] = None,
    bos: Annotated[
        str | None,
        option("--bos", panel=TEXT, help="block: auto, papers, always or never, as for prune [default: auto]."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", rich_help_panel=TEXT, help="Of adapters, order and dropout.")] = 0,
    steps: Annotated[
        int | None,
        option("--steps", "-n", panel=HOW_LONG, help="Steps of the optimizer [default: one pass over 30,000 windows]."),
    ] = None,
    minutes: Annotated[
        float | None,
        option("--minutes", panel=HOW_LONG, help="Train for so long at most; the learning rate falls with the clock."),
    ] = None,
    epochs: Annotated[
        int | None, option("--epochs", panel=HOW_LONG, help="block: passes over the windows, at most [default: 10].")
    ] = None,
    batch_size: Annotated[
        int | None,
        option("--batch-size", panel=HOW_LONG, help="Windows at a time [default: 1; block: 4 in each step]."),
    ] = None,
    accumulation: Annotated[
        int | None, option("--accumulation", panel=HOW_LONG, help="Batches whose gradients make one step [default: 1].")
    ] = None,
    lr: Annotated[
        float | None,
        option(
            "--lr",
            panel=HOW_LONG,
            help="Peak learning rate [default: 1e-4 for adapters, 1e-5 for full; for block 0.03 of the weights' size].",
        ),
    ] = None,
    schedule: Annotated[
        str | None, option("--schedule", panel=HOW_LONG, help="linear, cosine, constant, ...: as the Trainer names it.")
    ] = None,
    warmup: Annotated[
        float | None, option("--warmup", panel=HOW_LONG, help="Share of the run to warm up in [default: 0].")
    ] = None,
    weight_decay: Annotated[
        float | None, option("--weight-decay", panel=HOW_LONG, help="Weight decay [default: 0].")
    ] = None,
    clip: Annotated[
        float | None, option("--clip", panel=HOW_LONG, help="Clip the gradient's norm at this [default: 1].")
    ] = None,
    optimizer: Annotated[
        str | None,
        option(
            "--optimizer",
            panel=HOW_LONG,
            help="adamw_torch, adafactor, sgd, adamw_8bit, ...: any of the Trainer's, or module:Class "
            "[default: adamw_torch].",
        ),
    ] = None,
    optimizer_args: Annotated[
        str | None,
        option("--optimizer-args", panel=HOW_LONG, help="Its arguments, such as momentum=0.9,nesterov=True."),
    ] = None,
    eval_every: Annotated[
        int | None,
        option("--eval-every", panel=HOW_LONG, help="Steps between evaluations [default: a tenth of the run]."),
    ] = None,
    patience: Annotated[
        int | None, option("--patience", panel=HOW_LONG, help="Stop after so many evaluations without a better one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", rich_help_panel=HOW, help="Go on from the last checkpoint of an unfinished run.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", rich_help_panel=HOW, help="Less memory, a third more time."),
    ] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            rich_help_panel=HOW,
            help="To compute products in: auto, float32, bfloat16. What is trained is in float32.",
        ),
    ] = "auto",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a pruned model, with zeros that stay zero: an adapter beside it, or the kept weights themselves.

    The loss and the perplexity on held-out windows are shown while it runs; the best checkpoint is the result. Training
    is that of transformers' Trainer. An interrupted run goes on with --resume.
    """
    settings = {
        "preset": None if preset == "paper" else preset,
        "targets": None if targets is None else tuple(targets),
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "only": None if only is None else tuple(only),
        "skip": None if skip is None else tuple(skip),
        "dense": dense,
        "distill": distill,
        "distill_weight": distill_weight,
        "temperature": temperature,
        "length": length,
        "held_out": held_out,
        "samples": samples,
        "bos": bos,
        "steps": steps,
        "minutes": minutes,
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "lr": lr,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip": clip,
        "optimizer": optimizer,
        "optimizer_args": optimizer_args,
        "eval_every": eval_every,
        "patience": patience,
        "resume": resume or None,
        "gradient_checkpointing": gradient_checkpointing or None,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    run = {
        "data": data,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "overwrite": overwrite,
        "command": ["secateur", *sys.argv[1:]],
    }
    if method not in WAYS:
        raise PatternError(f'--method: got "{method}", expected {", ".join(WAYS[:-1])} or {WAYS[-1]}.')
    if method == "block":
        _tune_blocks(pruned, output, given, run, as_json)
    else:
        _train(method, pruned, output, given, run, as_json)


def _train(
    method: str, pruned: str, output: str, given: Mapping[str, Any], run: Mapping[str, Any], as_json: bool
) -> None:
    """Adapters and full training, by a Trainer."""
    for name in BLOCK_ONLY:
        if name in given:
            raise PatternError(f"--{name}: has no meaning for --method {method}; block would use it.")
    try:
        with quiet_libraries(), recovery_progress() as (show, say):
            from secateur.recover.fine_tuning import fine_tune
            from secateur.report.recovery import forecast_table, recovery_tables

            result = fine_tune(
                pruned,
                output,
                method=method,
                **run,
                **given,
                announce=lambda forecast: say(forecast_table(forecast)),
                progress=show,
            )
    except KeyboardInterrupt:
        from secateur.recover.training import last_checkpoint
        from secateur.runs.output import resolved

        last = last_checkpoint(Path(f"{resolved(output)}.training"))
        if last is None:
            raise
        raise Interrupted(
            f"Interrupted. {last} is the last checkpoint; go on with the same command and --resume."
        ) from None
    if as_json:
        print_json(result.to_json())
    else:
        print_tables(recovery_tables(result))


def _tune_blocks(pruned: str, output: str, given: Mapping[str, Any], run: Mapping[str, Any], as_json: bool) -> None:
    """Block by block, without a Trainer."""
    taken = {"only", "skip", "length", "held_out", "samples", "epochs", "minutes"}
    taken |= {"batch_size", "lr", "patience", "dense", "bos"}
    for name in given:
        if name not in taken:
            known = ", ".join(f"--{other.replace('_', '-')}" for other in sorted(taken))
            raise PatternError(f"--{name.replace('_', '-')}: has no meaning for --method block, which takes {known}.")
    names = {"lr": "learning_rate", "batch_size": "step"}
    values = {names.get(name, name): value for name, value in given.items()}
    samples, epochs = values.get("samples", 128), values.get("epochs", 10)
    if samples < 1:
        raise CalibrationError(f"--samples: got {samples}, expected at least 1.")
    if "held_out" in values:
        if not 0 < values["held_out"] < samples:
            raise CalibrationError(
                f"--held-out: got {values['held_out']} of {samples} windows, expected at least 1 and fewer than all."
            )
        values["held_out"] /= samples
    values["calibration"] = run["data"]
    values |= {name: value for name, value in run.items() if name != "data"}
    latest = ""

    def on_block(record: Mapping[str, Any]) -> None:
        nonlocal latest
        latest = f", held-out loss {record['before']:.4f} to {record['after']:.4f}"

    with quiet_libraries(), progress(done="tuned", note=lambda: latest) as on_event:
        from secateur.recover.block import forwards, reconstruct
        from secateur.report.recovery import block_tables

        most = forwards(epochs, 1 - values.get("held_out", 0.125))
        within = f", within {values['minutes']:g} minutes" if "minutes" in values else ""
        typer.echo(f"at most {most:.1f} forwards of {samples} samples through the blocks{within}", err=True)
        manifest = reconstruct(pruned, output=output, on_event=on_event, on_block=on_block, **values)
    if as_json:
        print_json(manifest.to_json())
    else:
        print_tables(block_tables(manifest, output))


@app.command(
    epilog=epilog(
        "secateur merge ./adapter --base ./pruned -o ./merged",
        "secateur merge ./adapter --base ./pruned -o ./merged --data wikitext2 --windows 40",
        "secateur merge ./adapter --base ./pruned -o ./dense --mask drop --no-eval",
    )
)
def merge(
    adapter: Annotated[str, typer.Argument(help="A LoRA adapter that peft saved.", show_default=False)],
    base: Annotated[
        str, typer.Option("--base", "-b", help="The pruned checkpoint that it belongs to.", show_default=False)
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the merged checkpoint.", show_default=False)
    ],
    mask: Annotated[
        str, typer.Option("--mask", help="keep: pruned weights stay zero; drop: zeros are filled and sparsity is lost.")
    ] = "keep",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="Text to measure the cost on, as for eval [default: what was held out in training, else wikitext2].",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", "-l", min=2, help="Tokens in each window [default: as held out].", show_default=False),
    ] = None,
    windows: WindowsOption = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not measure perplexity.")] = False,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Windows at a time [default: auto].", show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", rich_help_panel=HOW, help="To evaluate in: auto, float32, bfloat16, float16.")
    ] = "auto",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge a LoRA adapter into its pruned base, tensor by tensor, and keep the zeros.

    What that costs is measured: the perplexity of the base, of base and adapter side by side, and of the result.
    """
    with quiet_libraries(), evaluation_progress() as show:
        from secateur.recover.merge import merge as run

        result = run(
            adapter,
            base,
            output,
            mask=mask,
            data=data,
            length=length,
            windows=windows,
            evaluate=not no_eval,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            command=["secateur", *sys.argv[1:]],
            progress=show,
        )
    if as_json:
        print_json(result.to_json())
    else:
        from secateur.report.recovery import merge_tables

        print_tables(merge_tables(result))
