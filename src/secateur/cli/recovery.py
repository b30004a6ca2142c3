"""`recover` and `merge`."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from secateur.cli.app import Config, Json, command
from secateur.cli.display import print_result, progress, quiet_libraries, recovery_progress, stage_progress
from secateur.cli.processes import LogDir, logged, started_for
from secateur.cli.voice import say
from secateur.errors import CalibrationError, PatternError
from secateur.recover.settings import MergeSettings, RecoverSettings
from secateur.runs.options import OPTIONS, Option, options

# The options of `recover` that apply to the method block, with the names that `reconstruct` gives them.
SHARED = {name: name for name in ("pruned", "output", "seed", "device", "dtype", "trust_remote_code")}
SHARED |= {"overwrite": "overwrite", "resume": "resume"}
TAKEN = {name: name for name in ("only", "skip", "length", "held_out", "samples", "epochs", "minutes")}
TAKEN |= {"batch_size": "step", "lr": "learning_rate", "patience": "patience", "dense": "dense", "bos": "bos"}


@command(
    "secateur recover ./pruned -o ./adapter --minutes 60",
    "secateur recover ./pruned -o ./adapter --method sparse-lora --targets all-linear --rank 16 --steps 1000",
    "secateur recover ./pruned -o ./recovered --method full --data my.jsonl --steps 2000 --distill ./dense",
    "secateur recover ./pruned -o ./recovered --method block --samples 128 --length 1024",
    "secateur recover ./pruned -o ./adapter --minutes 60 --resume",
    "torchrun --nproc-per-node 4 -m secateur recover ./pruned -o ./recovered --method block",
    processes=True,
)
def recover(settings: RecoverSettings, config: Config = None, as_json: Json = False, log_dir: LogDir = None) -> None:
    """Train a pruned model, with zeros that stay zero: an adapter beside it, or the kept weights themselves.

    The loss and the perplexity on held-out windows are shown while it runs; the best checkpoint is the result. Training
    is that of transformers' Trainer. An interrupted run goes on with --resume.
    """
    if settings.method == "block":
        if not started_for(settings.device):
            _tune_blocks(settings, as_json, log_dir)
        return
    if log_dir is not None:
        raise PatternError("--log-dir: is for --method block, which several processes can share.")
    try:
        with recovery_progress() as (show, say), quiet_libraries():
            from secateur.recover.fine_tuning import fine_tune
            from secateur.report.recovery import forecast_table, recovery_tables

            result = fine_tune(
                **vars(replace(settings, announce=lambda forecast: say(forecast_table(forecast)), progress=show))
            )
    except KeyboardInterrupt:
        from secateur.recover.training import last_checkpoint
        from secateur.runs.output import resolved

        last = last_checkpoint(Path(f"{resolved(settings.output)}.training"))
        if last is None:
            raise
        raise KeyboardInterrupt(f"{last} is the last checkpoint; go on with the same command and --resume.") from None
    print_result(result, recovery_tables, as_json)


def _tune_blocks(settings: RecoverSettings, as_json: bool, log_dir: str | None) -> None:
    """Block by block, without a Trainer."""
    values: dict[str, Any] = {}
    for field in options(RecoverSettings):
        value = getattr(settings, field.name)
        if value == field.default or field.name in ("method", "data"):
            continue
        if field.name == "accumulation":
            values |= {"batch_size": settings.batch_size, "step": settings.batch_size * settings.accumulation}
            continue
        if field.name not in SHARED | TAKEN:
            known = ", ".join(f"--{other.replace('_', '-')}" for other in sorted({*TAKEN, "accumulation"}))
            raise PatternError(f"{field.flag}: has no meaning for --method block, which takes {known}.")
        values[(SHARED | TAKEN)[field.name]] = value
    samples, epochs = settings.samples or 128, settings.epochs or 10
    if "held_out" in values:
        if not values["held_out"] < samples:
            raise CalibrationError(
                f"--held-out: got {values['held_out']} of {samples} windows, expected at least 1 and fewer than all."
            )
        values["held_out"] /= samples
    latest = ""

    def on_block(record: Mapping[str, Any]) -> None:
        nonlocal latest
        latest = f", held-out loss {record['before']:.4f} to {record['after']:.4f}"

    with logged(log_dir) as log, progress(done="tuned", note=lambda: latest) as on_event, quiet_libraries():
        from secateur.recover.block import forwards, reconstruct
        from secateur.report.recovery import block_tables

        most = forwards(epochs, 1 - values.get("held_out", 0.125))
        within = f", within {values['minutes']:g} minutes" if "minutes" in values else ""
        say(f"at most {most:.1f} forwards of {samples} samples through the blocks{within}")
        manifest = reconstruct(
            **values,
            calibration=settings.data,
            command=settings.command,
            on_event=log.beside(on_event),
            on_block=on_block,
        )
    print_result(manifest, partial(block_tables, output=str(settings.output)), as_json)


@command(
    "secateur merge ./adapter --base ./pruned -o ./merged",
    "secateur merge ./adapter --base ./pruned -o ./merged --data wikitext2 --windows 40",
    "secateur merge ./adapter --base ./pruned -o ./dense --mask drop --no-eval",
)
def merge(
    settings: MergeSettings,
    *,
    no_eval: Annotated[bool, Option(OPTIONS, "Do not measure perplexity.")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Merge a LoRA adapter into its pruned base, tensor by tensor, and keep the zeros.

    What that costs is measured: the perplexity of the base, of base and adapter side by side, and of the result.
    """
    with stage_progress() as show, quiet_libraries():
        from secateur.recover.merge import merge as merge_adapter
        from secateur.report.recovery import merge_tables

        result = merge_adapter(**vars(replace(settings, evaluate=not no_eval, progress=show)))
    print_result(result, merge_tables, as_json)
