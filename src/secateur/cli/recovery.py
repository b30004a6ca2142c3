"""`recover` and `merge`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.cli.app import Config, Interrupted, Json, command
from secateur.cli.display import (
    evaluation_progress,
    print_json,
    print_tables,
    progress,
    quiet_libraries,
    recovery_progress,
)
from secateur.errors import CalibrationError, PatternError
from secateur.recover.options import MergeSettings, RecoverSettings

BLOCK_ONLY = ("dense", "samples", "bos", "epochs")


@command(
    "secateur recover ./pruned -o ./adapter --minutes 60",
    "secateur recover ./pruned -o ./adapter --method sparse-lora --targets all-linear --rank 16 --steps 1000",
    "secateur recover ./pruned -o ./recovered --method full --data my.jsonl --steps 2000 --distill ./dense",
    "secateur recover ./pruned -o ./recovered --method block --samples 128 --length 1024",
    "secateur recover ./pruned -o ./adapter --minutes 60 --resume",
)
def recover(settings: RecoverSettings, config: Config = None, as_json: Json = False) -> None:
    """Train a pruned model, with zeros that stay zero: an adapter beside it, or the kept weights themselves.

    The loss and the perplexity on held-out windows are shown while it runs; the best checkpoint is the result. Training
    is that of transformers' Trainer. An interrupted run goes on with --resume.
    """
    given = {name: value for name, value in vars(settings).items() if value is not None and value != ()}
    for name, usual in (("resume", False), ("gradient_checkpointing", False), ("preset", "paper")):
        if given[name] == usual:
            del given[name]
    method, pruned, output = (given.pop(name) for name in ("method", "pruned", "output"))
    shared = ("data", "seed", "device", "dtype", "trust_remote_code", "overwrite")
    run = {name: given.pop(name) for name in shared} | {"command": ["secateur", *sys.argv[1:]]}
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
        print(f"at most {most:.1f} forwards of {samples} samples through the blocks{within}", file=sys.stderr)
        manifest = reconstruct(pruned, output=output, on_event=on_event, on_block=on_block, **values)
    if as_json:
        print_json(manifest.to_json())
    else:
        print_tables(block_tables(manifest, output))


@command(
    "secateur merge ./adapter --base ./pruned -o ./merged",
    "secateur merge ./adapter --base ./pruned -o ./merged --data wikitext2 --windows 40",
    "secateur merge ./adapter --base ./pruned -o ./dense --mask drop --no-eval",
)
def merge(settings: MergeSettings, config: Config = None, as_json: Json = False) -> None:
    """Merge a LoRA adapter into its pruned base, tensor by tensor, and keep the zeros.

    What that costs is measured: the perplexity of the base, of base and adapter side by side, and of the result.
    """
    with quiet_libraries(), evaluation_progress() as show:
        from secateur.recover.merge import merge as run

        options = dict(vars(settings))
        evaluate = not options.pop("no_eval")
        result = run(**options, evaluate=evaluate, command=["secateur", *sys.argv[1:]], progress=show)
    if as_json:
        print_json(result.to_json())
    else:
        from secateur.report.recovery import merge_tables

        print_tables(merge_tables(result))
