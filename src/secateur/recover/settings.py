"""How to train: what can be set, and the presets that set it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from secateur.errors import CalibrationError, PatternError

METHODS = ("lora", "sparse-lora", "full")
ADAPTER_OPTIONS = ("rank", "alpha", "dropout", "targets")
FULL_OPTIONS = ("only", "skip")


@dataclass(frozen=True)
class Settings:
    """Everything that is set for a recovery. Defaults are the preset "paper" for LoRA.

    Source: Wanda, `lora_ft/finetune_lm.py` and its README: rank 8, alpha 16, dropout 0.05 on the q and v projections,
    30,000 windows of 1,024 tokens of C4, one at a time, learning rate 1e-4 falling linearly to zero, AdamW without
    weight decay, gradients clipped at 1. The script loads half-precision weights and trains in them; here adapters
    are in float32.
    """

    steps: int | None = None
    minutes: float | None = None
    windows: int = 30_000  # the budget where neither steps nor minutes are given, and the most that minutes draw from
    length: int = 1024
    held_out: int = 128
    batch_size: int = 1
    accumulation: int = 1
    lr: float = 1e-4
    schedule: str = "linear"
    warmup: float = 0.0  # share of the steps
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw_torch"  # a name of the Trainer's, or module:Class
    optimizer_args: str | None = None  # name=value,...
    seed: int = 0
    eval_every: int | None = None  # steps; a tenth of the run where not given
    patience: int | None = None
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    distill_weight: float = 0.5
    temperature: float = 1.0
    gradient_checkpointing: bool = False

    @property
    def total_steps(self) -> int | None:
        """How many steps, or None where the clock decides."""
        if self.minutes is not None:
            return None
        return self.steps or max(1, self.windows // (self.batch_size * self.accumulation))

    @property
    def training_windows(self) -> int:
        """How many windows to draw, at most."""
        if self.steps is None:
            return self.windows
        return self.steps * self.batch_size * self.accumulation


_SHORT: dict[str, Any] = {"steps": 500, "accumulation": 8, "schedule": "cosine", "warmup": 0.05}

# What a preset sets for each method, where it differs from Settings. No code or figures were published for full
# training; its learning rates are ours.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "paper": {"lora": {}, "sparse-lora": {}, "full": {"lr": 1e-5}},
    "short": {
        "lora": {**_SHORT, "lr": 2e-4, "targets": ("all-linear",)},
        "sparse-lora": {**_SHORT, "lr": 2e-4, "targets": ("all-linear",)},
        "full": {**_SHORT, "lr": 2e-5},
    },
}


def require_one_process() -> None:
    """Raise `PatternError` when torchrun has started several processes."""
    import torch  # not for --help

    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        raise PatternError(
            "recover runs in one process, and torchrun started several. For several GPUs use a Trainer of your own, "
            "with callbacks=[secateur.SparsityCallback()]."
        )


def choose(method: str, preset: str, given: Mapping[str, Any]) -> Settings:
    """The settings of a preset with those that were given (not None) in their place.

    Raises `PatternError` for unknown names, options of another method and values out of range.
    """
    if method not in METHODS:
        raise PatternError(f'--method: got "{method}", expected {", ".join(METHODS[:-1])} or {METHODS[-1]}.')
    if preset not in PRESETS:
        raise PatternError(f'--preset: got "{preset}", expected {" or ".join(PRESETS)}.')
    unknown = sorted(set(given) - {field.name for field in fields(Settings)})
    if unknown:
        raise PatternError(
            f'no setting "{unknown[0]}"; there are {", ".join(field.name for field in fields(Settings))}.'
        )
    chosen = {name: value for name, value in given.items() if value is not None}
    for option in FULL_OPTIONS if method != "full" else ADAPTER_OPTIONS:
        if chosen.get(option):
            others = "full" if method != "full" else "lora and sparse-lora"
            raise PatternError(f"--{option}: has no meaning for --method {method}; {others} would use it.")
    if "steps" in chosen and "minutes" in chosen:
        raise PatternError("--steps and --minutes were both given; one of them says when to stop.")
    values = dict(PRESETS[preset][method]) | chosen
    if "minutes" in chosen:
        values.pop("steps", None)
    settings = replace(Settings(), **values)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    for name in ("steps", "length", "held_out", "batch_size", "accumulation", "eval_every", "patience", "rank"):
        value = getattr(settings, name)
        least = 2 if name == "length" else 1
        if value is not None and value < least:
            raise CalibrationError(f"--{name.replace('_', '-')}: got {value}, expected at least {least}.")
    for name in ("minutes", "lr", "alpha", "clip", "temperature"):
        value = getattr(settings, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise PatternError(f"--{name}: got {value:g}, expected a positive number.")
    for name, below in (("warmup", 1.0), ("dropout", 1.0), ("distill_weight", None)):
        value = getattr(settings, name)
        if value < 0 or (below is not None and value >= below) or (below is None and value > 1):
            end = "at most 1" if below is None else "below 1"
            raise PatternError(f"--{name.replace('_', '-')}: got {value:g}, expected at least 0 and {end}.")
    if settings.weight_decay < 0:
        raise PatternError(f"--weight-decay: got {settings.weight_decay:g}, expected at least 0.")


def to_json(settings: Settings, method: str) -> dict[str, Any]:
    """The settings that matter for a method."""
    leave_out = FULL_OPTIONS if method != "full" else ADAPTER_OPTIONS
    values = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in leave_out}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
