"""Images with their texts for a model that reads both, through its own image processor and tokenizer."""

from typing import Any

import torch

from secateur.calibration.images import PREFIX, captioned_images, images_of
from secateur.calibration.named import NamedSamples
from secateur.calibration.windows import fewer, require_positive
from secateur.errors import CalibrationError
from secateur.models.opening.opened import OpenedModel

# Facts that a model does not tell about itself: what texts are padded to their longest length, and read with it.
PADDED_TEXTS = {"siglip", "siglip2"}


def model_pairs(
    opened: OpenedModel,
    source: Any,
    *,
    samples: int | None,
    length: int | None,
    seed: int | None,
    what: str,
    write: bool = True,
) -> NamedSamples:
    """Images of a folder, each with the text beside it. Raises `CalibrationError` for a source that is none.

    Texts are cut at the model's positions. Nothing is padded but the texts of models that were trained with padding.
    """
    model: Any = opened.skeleton.model
    kind, folder = type(model).__name__, images_of(source)
    if not isinstance(folder, str):
        raise CalibrationError(
            f"{kind} reads images and texts. Give it {PREFIX}FOLDER, with NAME.txt beside each image."
        )
    if length is not None:
        raise CalibrationError("--length: an image and its text are as long as they are. Leave --length out.")
    require_positive(samples=samples)
    tokenizer = opened.load_tokenizer()
    if tokenizer is None:
        raise CalibrationError(
            f"{kind}: texts need the model's tokenizer, and it has none. Copy that of the model there."
        )
    pixels, texts, facts = captioned_images(folder, opened.load_image_processor(), samples, seed)
    longest = opened.skeleton.positions
    padding = "max_length" if model.config.model_type in PADDED_TEXTS else False
    ids = [tokenizer(text, truncation=True, max_length=longest, padding=padding)["input_ids"] for text in texts]
    each = [{"pixel_values": image, "input_ids": torch.tensor(own)} for image, own in zip(pixels, ids, strict=True)]
    return NamedSamples(each, {**facts, **fewer(what, samples, len(each))})
