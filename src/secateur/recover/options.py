"""What `recover` and `merge` take on the command line."""

from dataclasses import dataclass
from typing import Annotated, Literal

from secateur.collect.settings import HOW, BosChoice, DeviceSettings
from secateur.errors import CalibrationError
from secateur.runs.options import ARGUMENTS, OPTIONS, Option

TRAIN, TEXT, HOW_LONG = "What to train", "Text", "How long and how fast"
OVERWRITE = Option(OPTIONS, "Replace an output that Secateur wrote.")


@dataclass(frozen=True, kw_only=True, eq=False)
class RecoverSettings(DeviceSettings):
    """What `recover` takes. What is None, empty or False is left to the method and its preset."""

    pruned: Annotated[str, Option(ARGUMENTS, "A pruned checkpoint that Secateur wrote.")]
    output: Annotated[str, Option(OPTIONS, "Folder for the adapter or the checkpoint.", "-o")]
    method: Annotated[
        Literal["lora", "sparse-lora", "full", "block"],
        Option(
            TRAIN,
            "lora: an adapter; sparse-lora: one whose product is masked, so that merging is exact; full: the kept "
            "weights; block: the kept weights, one block at a time, fitted to the outputs of the dense blocks.",
            "-m",
        ),
    ] = "lora"
    preset: Annotated[
        Literal["paper", "short"], Option(TRAIN, "paper: Wanda's LoRA script; short: 500 larger steps.")
    ] = "paper"
    targets: Annotated[
        tuple[str, ...],
        Option(
            TRAIN,
            "Matrices that get an adapter: the last part of a name, a glob, or all-linear; repeat it [default: peft's "
            "choice, q_proj and v_proj of most].",
        ),
    ] = ()
    rank: Annotated[int | None, Option(TRAIN, "Rank of the adapters [default: 8].")] = None
    alpha: Annotated[float | None, Option(TRAIN, "Adapters are scaled by alpha / rank [default: 16].")] = None
    dropout: Annotated[float | None, Option(TRAIN, "On the input of adapters [default: 0.05].")] = None
    only: Annotated[tuple[str, ...], Option(TRAIN, "full, block: train only what this glob matches; repeat it.")] = ()
    skip: Annotated[tuple[str, ...], Option(TRAIN, "full, block: leave what this glob matches; repeat it.")] = ()
    dense: Annotated[str | None, Option(TRAIN, "block: the dense model [default: where the manifest says].")] = None
    distill: Annotated[str | None, Option(TRAIN, "Learn from the predictions of this dense model as well.")] = None
    distill_weight: Annotated[float | None, Option(TRAIN, "Its share of the loss, 0 to 1 [default: 0.5].")] = None
    temperature: Annotated[float | None, Option(TRAIN, "Of both predictions there [default: 1].")] = None
    data: Annotated[
        str, Option(TEXT, "Text to train on: as --calibration of prune. A part of its windows is held out.", "-d")
    ] = "c4"
    length: Annotated[
        int | None,
        Option(TEXT, "Tokens in each window [default: 1024, or what the model takes; block: 2048].", "-l"),
    ] = None
    held_out: Annotated[
        int | None,
        Option(TEXT, "Windows that are not trained on but measured [default: 128; block: an eighth of the samples]."),
    ] = None
    samples: Annotated[int | None, Option(TEXT, "block: windows in all [default: 128].")] = None
    bos: Annotated[
        BosChoice | None,
        Option(
            TEXT,
            "block: where windows have the token that begins a text, as for prune [default: auto].",
            error=CalibrationError,
        ),
    ] = None
    seed: Annotated[int, Option(TEXT, "Of adapters, order and dropout.")] = 0
    steps: Annotated[
        int | None, Option(HOW_LONG, "Steps of the optimizer [default: one pass over 30,000 windows].", "-n")
    ] = None
    minutes: Annotated[
        float | None, Option(HOW_LONG, "Train for so long at most; the learning rate falls with the clock.")
    ] = None
    epochs: Annotated[int | None, Option(HOW_LONG, "block: passes over the windows, at most [default: 10].")] = None
    batch_size: Annotated[int | None, Option(HOW_LONG, "Windows at a time [default: 1; block: 4 in each step].")] = None
    accumulation: Annotated[int | None, Option(HOW_LONG, "Batches whose gradients make one step [default: 1].")] = None
    lr: Annotated[
        float | None,
        Option(
            HOW_LONG,
            "Peak learning rate [default: 1e-4 for adapters, 1e-5 for full; for block 0.03 of the weights' size].",
        ),
    ] = None
    schedule: Annotated[str | None, Option(HOW_LONG, "linear, cosine, constant, ...: as the Trainer names it.")] = None
    warmup: Annotated[float | None, Option(HOW_LONG, "Share of the run to warm up in [default: 0].")] = None
    weight_decay: Annotated[float | None, Option(HOW_LONG, "Weight decay [default: 0].")] = None
    clip: Annotated[float | None, Option(HOW_LONG, "Clip the gradient's norm at this [default: 1].")] = None
    optimizer: Annotated[
        str | None,
        Option(
            HOW_LONG,
            "adamw_torch, adafactor, sgd, adamw_8bit, ...: any of the Trainer's, or module:Class "
            "[default: adamw_torch].",
        ),
    ] = None
    optimizer_args: Annotated[str | None, Option(HOW_LONG, "Its arguments, such as momentum=0.9,nesterov=True.")] = None
    eval_every: Annotated[int | None, Option(HOW_LONG, "Steps between evaluations [default: a tenth of the run].")] = (
        None
    )
    patience: Annotated[int | None, Option(HOW_LONG, "Stop after so many evaluations without a better one.")] = None
    resume: Annotated[bool, Option(HOW, "Go on from the last checkpoint of an unfinished run.")] = False
    gradient_checkpointing: Annotated[bool, Option(HOW, "Less memory, a third more time.")] = False
    dtype: Annotated[
        str, Option(HOW, "To compute products in: auto, float32, bfloat16. What is trained is in float32.")
    ] = "auto"
    overwrite: Annotated[bool, OVERWRITE] = False


@dataclass(frozen=True, kw_only=True, eq=False)
class MergeSettings(DeviceSettings):
    """What `merge` takes."""

    adapter: Annotated[str, Option(ARGUMENTS, "A LoRA adapter that peft saved.")]
    base: Annotated[str, Option(OPTIONS, "The pruned checkpoint that it belongs to.", "-b")]
    output: Annotated[str, Option(OPTIONS, "Folder for the merged checkpoint.", "-o")]
    mask: Annotated[
        Literal["keep", "drop"],
        Option(OPTIONS, "keep: pruned weights stay zero; drop: zeros are filled and sparsity is lost."),
    ] = "keep"
    data: Annotated[
        str | None,
        Option(
            OPTIONS,
            "Text to measure the cost on, as for eval [default: what was held out in training, else wikitext2].",
            "-d",
        ),
    ] = None
    length: Annotated[int | None, Option(OPTIONS, "Tokens in each window [default: as held out].", "-l", least=2)] = (
        None
    )
    windows: Annotated[int | None, Option(OPTIONS, "Use only the first windows [default: all].", "-w", least=1)] = None
    no_eval: Annotated[bool, Option(OPTIONS, "Do not measure perplexity.")] = False
    batch_size: Annotated[int | None, Option(OPTIONS, "Windows at a time [default: auto].", least=1)] = None
    dtype: Annotated[str, Option(HOW, "To evaluate in: auto, float32, bfloat16, float16.")] = "auto"
    overwrite: Annotated[bool, OVERWRITE] = False
