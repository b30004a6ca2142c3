"""Images for a certain model, through its own image processor, and how many hidden states it makes of each."""

from pathlib import Path
from typing import Any

import torch

from secateur.calibration.images import Images, images_of, read_images
from secateur.calibration.windows import fewer, require_positive
from secateur.core.batch import Batch, Named
from secateur.errors import CalibrationError
from secateur.models.flow.inputs import input_name
from secateur.models.flow.stream import Stream
from secateur.models.opening.opened import OpenedModel


def model_images(
    opened: OpenedModel, source: Any, *, samples: int | None, length: int | None, seed: int | None, what: str
) -> Images:
    """The images that are asked for. Raises `CalibrationError` for what is none, and for a model that reads others."""
    kind, wanted = type(opened.skeleton.model).__name__, input_name(opened.skeleton.model)
    if wanted != "pixel_values":
        raise CalibrationError(f"{kind} reads {wanted}, and no images.")
    found = images_of(source)
    if found is None:
        raise CalibrationError(f"{kind} reads images, and no text. Give it some: images:FOLDER.")
    if length is not None:
        raise CalibrationError("--length: an image has as many tokens as the model makes of it. Leave --length out.")
    require_positive(samples=samples)
    processor = None if isinstance(found, torch.Tensor) else opened.load_image_processor()
    pixels, facts, files = read_images(found, processor, samples, seed)
    shape = {"samples": len(pixels), "length": hidden_states_of(opened, pixels[:1])[0]}
    folder = Path(found).expanduser() if files and isinstance(found, str) else None
    return Images(pixels, {**facts, **shape, **fewer(what, samples, len(pixels))}, shape["length"], folder, files)


def hidden_states_of(opened: OpenedModel, sample: Batch) -> list[int]:
    """How many hidden states go into the first block of each stack for one sample; for an image, of the first stack."""
    skeleton = opened.skeleton
    skeleton.load_outside(head=False)
    stream = Stream(skeleton, [sample])
    found = []
    try:
        for stack in skeleton.stacks if isinstance(sample, Named) else skeleton.stacks[:1]:
            stream.reach(stack.blocks[0])
            states = stream.states.get(0, stream.device)[0]
            # A map of channels is (channels, height, width), with which the blocks of some models begin.
            channels = states.shape[0] if states.ndim == 3 and states.shape[1] == states.shape[2] else states.shape[-1]
            found.append(states.numel() // channels)
    finally:
        stream.close()
        skeleton.unload_outside()
    return found
