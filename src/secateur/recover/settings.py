"""What `recover`, `reconstruct` and `merge` take, and the presets of training. Nothing heavy is imported."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from secateur.collect.settings import (
    AUTO,
    HOW,
    BatchSettings,
    BosChoice,
    CalibrationSettings,
    DeviceSettings,
    DtypeSettings,
    File,
    SelectionSettings,
    take_in,
)
from secateur.errors import CalibrationError, PatternError, ProcessError
from secateur.launched import launched
from secateur.runs.options import ARGUMENTS, OPTIONS, Option, ProgressSettings

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.calibration.documents import Corpus
    from secateur.calibration.windows import Windows
    from secateur.recover.forecast import Forecast
    from secateur.runs.events import OnEvent, Progress

    TrainingText = str | Tensor | Windows | Corpus | Iterable[Any]
    Announce = Callable[[Forecast], None]
else:
    TrainingText = str
    Announce = OnEvent = Progress = Any

TrainingProgress = Callable[[str, int, int, str], None]  # stage, done, in all, note

TRAIN, TEXT, HOW_LONG = "What to train", "Text", "How long and how fast"
OVERWRITE = Option(OPTIONS, "Replace an output that Secateur wrote.")
PRESET: Any = None  # where a setting is left to the method's preset
ADAPTER_OPTIONS, FULL_OPTIONS = ("rank", "alpha", "dropout", "targets"), ("only", "skip")
BLOCK_OPTIONS = ("dense", "samples", "bos", "epochs")

# Source: Wanda, `lora_ft/finetune_lm.py` and its README: rank 8, alpha 16, dropout 0.05 on the q and v projections,
# 30,000 windows of 1,024 tokens of C4, one at a time, learning rate 1e-4 falling linearly to zero, AdamW without weight
# decay, gradients clipped at 1. The script loads half-precision weights and trains in them; here adapters are in
# float32.
PAPER: Mapping[str, Any] = {
    "steps": None,
    "minutes": None,
    "windows": 30_000,
    "length": 1024,
    "held_out": 128,
    "batch_size": 1,
    "accumulation": 1,
    "lr": 1e-4,
    "schedule": "linear",
    "warmup": 0.0,
    "weight_decay": 0.0,
    "clip": 1.0,
    "optimizer": "adamw_torch",
    "optimizer_args": None,
    "seed": 0,
    "eval_every": None,
    "patience": None,
    "rank": 8,
    "alpha": 16,
    "dropout": 0.05,
    "targets": (),
    "only": (),
    "skip": (),
    "distill_weight": 0.5,
    "temperature": 1.0,
    "gradient_checkpointing": False,
}
_SHORT: dict[str, Any] = {"steps": 500, "accumulation": 8, "schedule": "cosine", "warmup": 0.05}

# What a preset sets for each method, where it differs from the paper. No code or figures were published for full
# training; its learning rates are ours.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "paper": {"lora": {}, "sparse-lora": {}, "full": {"lr": 1e-5}},
    "short": {
        "lora": {**_SHORT, "lr": 2e-4, "targets": ("all-linear",)},
        "sparse-lora": {**_SHORT, "lr": 2e-4, "targets": ("all-linear",)},
        "full": {**_SHORT, "lr": 2e-5},
    },
}


@dataclass(frozen=True, kw_only=True, eq=False)
class RecoverSettings(DeviceSettings):
    """What `recover` and `fine_tune` take. What is left out is left to the method and its preset."""

    pruned: Annotated[File, Option(ARGUMENTS, "A pruned checkpoint that Secateur wrote.")] = field(kw_only=False)
    output: Annotated[File, Option(OPTIONS, "Folder for the adapter or the checkpoint.", "-o")] = field(kw_only=False)
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
    rank: Annotated[int, Option(TRAIN, "Rank of the adapters [default: 8].", least=1)] = PRESET
    alpha: Annotated[float, Option(TRAIN, "Adapters are scaled by alpha / rank [default: 16].", positive=True)] = PRESET
    dropout: Annotated[float, Option(TRAIN, "On the input of adapters [default: 0.05].")] = PRESET
    only: Annotated[tuple[str, ...], Option(TRAIN, "full, block: train only what this glob matches; repeat it.")] = ()
    skip: Annotated[tuple[str, ...], Option(TRAIN, "full, block: leave what this glob matches; repeat it.")] = ()
    dense: Annotated[str | None, Option(TRAIN, "block: the dense model [default: where the manifest says].")] = None
    distill: Annotated[File | None, Option(TRAIN, "Learn from the predictions of this dense model as well.")] = None
    distill_weight: Annotated[float, Option(TRAIN, "Its share of the loss, 0 to 1 [default: 0.5].")] = PRESET
    temperature: Annotated[float, Option(TRAIN, "Of both predictions there [default: 1].", positive=True)] = PRESET
    data: Annotated[
        TrainingText,
        Option(
            TEXT, "Text to train on: as --calibration of prune, auto included. A part of its windows is held out.", "-d"
        ),
    ] = AUTO
    length: Annotated[
        int,
        Option(TEXT, "Tokens in each window [default: 1024, or what the model takes; block: 2048].", "-l", least=2),
    ] = PRESET
    held_out: Annotated[
        int,
        Option(
            TEXT,
            "Windows that are not trained on but measured [default: 128; block: an eighth of the samples].",
            least=1,
        ),
    ] = PRESET
    samples: Annotated[int | None, Option(TEXT, "block: windows in all [default: 128].", least=1)] = None
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
        int | None, Option(HOW_LONG, "Steps of the optimizer [default: one pass over 30,000 windows].", "-n", least=1)
    ] = None
    minutes: Annotated[
        float | None,
        Option(HOW_LONG, "Train for at most so many minutes; the learning rate falls with the clock.", positive=True),
    ] = None
    epochs: Annotated[
        int | None, Option(HOW_LONG, "block: passes over the windows, at most [default: 10].", least=1)
    ] = None
    batch_size: Annotated[int, Option(HOW_LONG, "Windows at a time [default: 1; block: 4 in each step].", least=1)] = (
        PRESET
    )
    accumulation: Annotated[int, Option(HOW_LONG, "Batches whose gradients make one step [default: 1].", least=1)] = (
        PRESET
    )
    lr: Annotated[
        float,
        Option(
            HOW_LONG,
            "Peak learning rate [default: 1e-4 for adapters, 1e-5 for full; for block 0.03 of the weights' size].",
            positive=True,
        ),
    ] = PRESET
    schedule: Annotated[str, Option(HOW_LONG, "linear, cosine, constant, ...: as the Trainer names it.")] = PRESET
    warmup: Annotated[float, Option(HOW_LONG, "Share of the run to warm up in [default: 0].")] = PRESET
    weight_decay: Annotated[float, Option(HOW_LONG, "Weight decay [default: 0].")] = PRESET
    clip: Annotated[float, Option(HOW_LONG, "Clip the gradient's norm at this [default: 1].", positive=True)] = PRESET
    optimizer: Annotated[
        str,
        Option(
            HOW_LONG,
            "adamw_torch, adafactor, sgd, adamw_8bit, ...: any of the Trainer's, or module:Class "
            "[default: adamw_torch].",
        ),
    ] = PRESET
    optimizer_args: Annotated[str | None, Option(HOW_LONG, "Its arguments, such as momentum=0.9,nesterov=True.")] = None
    eval_every: Annotated[
        int | None, Option(HOW_LONG, "Steps between evaluations [default: a tenth of the run].", least=1)
    ] = None
    patience: Annotated[
        int | None, Option(HOW_LONG, "Stop after so many evaluations without a better one.", least=1)
    ] = None
    resume: Annotated[bool, Option(HOW, "Go on from the last checkpoint of an unfinished run.")] = False
    gradient_checkpointing: Annotated[bool, Option(HOW, "Less memory, a third more time.")] = False
    dtype: Annotated[
        str, Option(HOW, "To compute products in: auto, float32, bfloat16. What is trained is in float32.")
    ] = "auto"
    overwrite: Annotated[bool, OVERWRITE] = False
    windows: int = PRESET  # the budget where neither steps nor minutes are given, and the most that minutes draw from
    command: Sequence[str] | None = None
    announce: Announce = lambda forecast: None
    progress: TrainingProgress | bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        take_in(self, "data", None)
        for name, most in (("warmup", "below 1"), ("dropout", "below 1"), ("distill_weight", "at most 1")):
            value = getattr(self, name)
            if value is not None and not (0 <= value < 1 or (value == 1 and most == "at most 1")):
                raise PatternError(f"--{name.replace('_', '-')}: got {value:g}, expected at least 0 and {most}.")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise PatternError(f"--weight-decay: got {self.weight_decay:g}, expected at least 0.")

    def tell(self, stage: str, done: int, total: int, note: str) -> None:
        """Tell how far it is."""
        if callable(self.progress):
            self.progress(stage, done, total, note)

    @property
    def total_steps(self) -> int | None:
        """How many steps, or None where the clock decides."""
        if self.minutes is not None:
            return None
        return self.steps or max(1, self.windows // (self.batch_size * self.accumulation))

    def to_json(self) -> dict[str, Any]:
        """The settings of training that matter for the method."""
        others = FULL_OPTIONS if self.method != "full" else ADAPTER_OPTIONS
        values = {name: getattr(self, name) for name in PAPER if name not in others}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def with_preset(settings: RecoverSettings) -> RecoverSettings:
    """The settings of a training, with the preset's in the place of what was left out.

    Raises `PatternError` for options of another method, and when both steps and minutes are given.
    """
    method = settings.method
    if method == "block":
        raise PatternError('--method: got "block", expected lora, sparse-lora or full.')
    groups = ((BLOCK_OPTIONS, ("block",)), (ADAPTER_OPTIONS, ("lora", "sparse-lora")), (FULL_OPTIONS, ("full",)))
    for names, users in groups:
        for name in names if method not in users else ():
            if getattr(settings, name):
                raise PatternError(
                    f"--{name}: has no meaning for --method {method}; {' and '.join(users)} would use it."
                )
    if settings.steps is not None and settings.minutes is not None:
        raise PatternError("--steps and --minutes were both given; one of them says when to stop.")
    values = {**PAPER, **PRESETS[settings.preset][method]}
    if settings.minutes is not None:
        values["steps"] = None
    return replace(settings, **{name: value for name, value in values.items() if getattr(settings, name) in (None, ())})


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSettings(ProgressSettings, BatchSettings, DtypeSettings, CalibrationSettings, SelectionSettings):
    """What `reconstruct` takes."""

    pruned: File = field(kw_only=False)
    dense: File | None = field(default=None, kw_only=False)
    epochs: Annotated[int, Option(HOW_LONG, "Passes over the samples, at most.", least=1)] = 10
    minutes: Annotated[
        float | None, Option(HOW_LONG, "Tune for so long at most.", positive=True, error=CalibrationError)
    ] = None
    learning_rate: Annotated[
        float,
        Option(HOW_LONG, "Relative to the weights' size.", name="lr", positive=True, error=CalibrationError),
    ] = 0.03
    step: Annotated[int, Option(HOW_LONG, "Samples in each step.", name="batch-size", least=1)] = 4
    held_out: float = 0.125
    patience: Annotated[int, Option(HOW_LONG, "Stop after so many epochs without a better one.", least=1)] = 3
    targets: Annotated[
        Literal["dense", "pruned"], Option(TRAIN, "What a block's outputs are fitted to.", error=CalibrationError)
    ] = "dense"
    output: File | None = None
    overwrite: bool = False
    resume: bool = False
    command: Sequence[str] | None = None
    on_event: OnEvent = lambda event: None
    on_block: Callable[[Mapping[str, Any]], None] = lambda record: None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.held_out < 1:
            raise CalibrationError(f"--held-out: got {self.held_out}, expected a share between 0 and 1, such as 0.125.")


@dataclass(frozen=True, kw_only=True, eq=False)
class MergeSettings(ProgressSettings, DeviceSettings):
    """What `merge` takes."""

    adapter: Annotated[File, Option(ARGUMENTS, "A LoRA adapter that peft saved.")] = field(kw_only=False)
    base: Annotated[File, Option(OPTIONS, "The pruned checkpoint that it belongs to.", "-b")] = field(kw_only=False)
    output: Annotated[File, Option(OPTIONS, "Folder for the merged checkpoint.", "-o")] = field(kw_only=False)
    mask: Annotated[
        Literal["keep", "drop"],
        Option(OPTIONS, "keep: pruned weights stay zero; drop: zeros are filled and sparsity is lost."),
    ] = "keep"
    data: Annotated[
        TrainingText | None,
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
    batch_size: Annotated[int | None, Option(OPTIONS, "Windows at a time [default: auto].", least=1)] = None
    dtype: Annotated[str, Option(HOW, "To evaluate in: auto, float32, bfloat16, float16.")] = "auto"
    overwrite: Annotated[bool, OVERWRITE] = False
    evaluate: bool = True
    command: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        take_in(self, "data", self.windows)


def require_one_process() -> None:
    """Raise `ProcessError` when a launcher such as torchrun has started several processes."""
    if (count := launched().count) > 1:
        raise ProcessError(
            f"recover trains in one process, and a launcher has started {count}. For several GPUs use --method block, "
            "or a Trainer of your own with callbacks=[secateur.SparsityCallback()]."
        )
