"""What a recovery will train and take, before it starts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from secateur.calibration.windows import Windows
from secateur.models.opening.opened import open_source
from secateur.models.shape.skeleton import Source
from secateur.pruning.forecast_time import forward_seconds
from secateur.recover.ways import Way

# Bytes of moments for each trainable weight where it is not two numbers in float32, by the Trainer's name.
MOMENT_BYTES: Mapping[str, int] = {
    "adafactor": 0,
    "adagrad": 4,
    "rmsprop": 4,
    "sgd": 0,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_32bit": 4,
    "lion_8bit": 1,
}


@dataclass(frozen=True)
class Forecast:
    """A dry run. `passes` says how often each training window is seen; None where the clock decides.

    `seconds` is about how long the steps take, evaluation not counted; None where the clock decides.
    """

    way: Way
    windows: int
    held_out: int
    passes: float | None
    seconds: float | None
    parameters: int
    device: str
    dtype: str
    memory: Mapping[str, int]  # bytes by what they hold; activations come on top, and grow with batch size and length


def forecast(way: Way, train: Windows, held: Windows, device: torch.device, computing: torch.dtype) -> Forecast:
    """The dry run of a recovery, from shapes and a moment's measurement of the machine."""
    settings, skeleton = way.settings, way.opened.skeleton
    parameters = count_parameters(skeleton.source)
    steps = settings.total_steps
    per_step = settings.batch_size * settings.accumulation
    full = settings.method == "full"
    allocated = way.trainable + way.kept
    dense = 0 if settings.distill is None else count_parameters(open_source(str(settings.distill)))
    # A backward is one forward's work for what comes in, and another for what is trained.
    forwards = (3 if full else 2) + settings.gradient_checkpointing + (settings.distill is not None)
    return Forecast(
        way=way,
        windows=train.samples,
        held_out=held.samples,
        passes=None if steps is None else steps * per_step / train.samples,
        seconds=None if steps is None else forwards * forward_seconds(skeleton, steps * per_step * train.length),
        parameters=parameters,
        device=str(device),
        dtype=str(computing).removeprefix("torch."),
        memory={
            "weights": 4 * parameters if full else computing.itemsize * parameters + 4 * allocated,
            "gradients": 4 * allocated,
            "moments": MOMENT_BYTES.get(settings.optimizer, 8) * allocated,
            "masks": way.mask_bytes,
            "dense model": computing.itemsize * dense,
        },
    )


def count_parameters(source: Source) -> int:
    """The weights of a model, counted in its checkpoint, where those that are tied stand once."""
    return sum(math.prod(source.shape(name)) for name in source.names)
