"""Images: what calibration and evaluation feed a model that reads pixels, through the model's own image processor."""

import hashlib
import os
import random
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from secateur.calibration.labels import files_in
from secateur.errors import CalibrationError
from secateur.files.reading import read_text

PREFIX = "images:"
ENDINGS = (".jpg", ".jpeg", ".png")
ARRAYS = (".npy", ".npz")
DEFAULT_SAMPLES = 128
CAPTION_BYTES = 1 << 16


@dataclass(frozen=True, eq=False)
class Images:
    """Pixel values of shape (samples, channels, height, width), float32 on the CPU, and where they came from.

    `length` is the number of hidden states that the model makes of an image. `folder` and `files` are where they lie,
    where they are files of pictures.
    """

    pixels: torch.Tensor
    provenance: Mapping[str, Any]
    length: int
    folder: Path | None = None
    files: Sequence[Path] = ()

    @property
    def samples(self) -> int:
        """The number of images."""
        return len(self.pixels)

    @property
    def tokens(self) -> int:
        """The number of hidden states of all images."""
        return self.samples * self.length

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the shape as little-endian int64 and then the pixel values as float32."""
        digest = hashlib.sha256(struct.pack("<4q", *self.pixels.shape))
        digest.update(self.pixels.contiguous().numpy().astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    def batches(self, batch_size: int) -> list[torch.Tensor]:
        """All images in their order, at most `batch_size` at a time."""
        return list(torch.split(self.pixels, batch_size))


def images_of(source: Any) -> str | torch.Tensor | None:
    """The path after `images:`, or pixel values that were given as a tensor; None for a source that is none of both."""
    if isinstance(source, Sequence) and not isinstance(source, str) and len(source) == 1:
        source = source[0]
    if isinstance(source, torch.Tensor):
        return source if source.ndim == 4 and source.is_floating_point() else None
    if isinstance(source, str | os.PathLike) and os.fspath(source).startswith(PREFIX):
        return os.fspath(source).removeprefix(PREFIX)
    return None


def read_images(
    source: str | torch.Tensor, processor: Any, samples: int | None, seed: int | None
) -> tuple[torch.Tensor, dict[str, Any], list[Path]]:
    """Pixel values of some images, their provenance, and their files where they are pictures.

    `source` is a folder of .jpg and .png files, a .npy or .npz file with one array, or pixel values. Whole numbers of
    8 bits, of shape (samples, height, width, channels), are images for the processor; floating-point numbers of shape
    (samples, channels, height, width) are pixel values already. Of more images than `samples` as many are drawn with
    the seed; without a seed the first ones are taken, or all.
    """
    if isinstance(source, torch.Tensor):
        kept = source[: samples or len(source)]
        return kept.detach().to("cpu", torch.float32, copy=True), {"source": "images"}, []
    path = Path(source).expanduser()
    facts: dict[str, Any] = {"source": "images", "sources": [{"corpus": path.name, "file": str(path)}]}
    if path.suffix.lower() in ARRAYS and path.is_file():
        found: Sequence[Any] = _array(path)
    elif path.is_dir():
        found = files_in(path, ENDINGS)
    else:
        raise CalibrationError(
            f"{PREFIX}{source}: no such folder or array. Give a folder of {', '.join(ENDINGS)} files, or a file "
            f"{' or '.join(ARRAYS)}."
        )
    if not len(found):
        raise CalibrationError(f"{path}: no image in it. Give a folder of {', '.join(ENDINGS)} files.")
    count = chosen_count(len(found), samples, seed)
    numbers = range(count) if seed is None else random.Random(seed).sample(range(len(found)), count)
    facts |= {"images_there": len(found)} | ({} if seed is None else {"seed": seed})
    if isinstance(found, numpy.ndarray) and found.dtype != numpy.uint8:
        return torch.from_numpy(found[list(numbers)].astype(numpy.float32)), facts, []
    if processor is None:
        raise CalibrationError(
            f"{path}: images need the model's image processor, and it has no preprocessor_config.json. Copy that of "
            "the model there, or give pixel values: a .npy file of floating-point numbers."
        )
    values = [_pixels(found[number], processor, f"{path}, image {number}") for number in numbers]
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) > 1:
        raise CalibrationError(
            f"{path}: the image processor makes images of different sizes of them, {shapes[0]} and {shapes[-1]}. Cut "
            "or scale them to one size first."
        )
    files = [] if isinstance(found, numpy.ndarray) else [found[number] for number in numbers]
    return torch.stack(values), facts, files


def chosen_count(there: int, samples: int | None, seed: int | None) -> int:
    """How many samples are taken of those that there are: as many as asked for; else, where none are drawn, all."""
    return min(samples or (there if seed is None else DEFAULT_SAMPLES), there)


def captioned_images(
    source: str, processor: Any, samples: int | None, seed: int | None
) -> tuple[list[torch.Tensor], list[str], dict[str, Any]]:
    """Pixel values of some images of a folder, the text in the .txt file beside each, and their provenance.

    Those without such a file are left out. Images are chosen as by `read_images`.
    """
    path = Path(source).expanduser()
    there = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS) if path.is_dir() else []
    found = [file for file in there if file.with_suffix(".txt").is_file()]
    if not found:
        raise CalibrationError(
            f"{PREFIX}{source}: {len(there)} images, and none of them with a text. The model reads images and texts: "
            f"give a folder of {', '.join(ENDINGS)} files with a file NAME.txt beside each."
        )
    if processor is None:
        raise CalibrationError(
            f"{path}: images need the model's image processor, and it has no preprocessor_config.json. Copy that of "
            "the model there."
        )
    count = chosen_count(len(found), samples, seed)
    chosen = found[:count] if seed is None else random.Random(seed).sample(found, count)
    texts = [read_text(file.with_suffix(".txt"), limit=CAPTION_BYTES).strip() for file in chosen]
    facts: dict[str, Any] = {"source": "images", "sources": [{"corpus": path.name, "file": str(path)}]}
    facts |= {"images_there": len(there), "with_text": len(found)} | ({} if seed is None else {"seed": seed})
    return [_pixels(file, processor, str(file)) for file in chosen], texts, facts


def _array(path: Path) -> Any:
    """The array of a file. Raises `CalibrationError` for one of another shape or type, or several."""
    try:
        found = numpy.load(path, allow_pickle=False)
        arrays = [found] if isinstance(found, numpy.ndarray) else [found[name] for name in found.files]
    except (OSError, ValueError, EOFError) as error:
        raise CalibrationError(f"{path}: cannot be read as an array of numpy: {error}") from None
    if len(arrays) != 1:
        raise CalibrationError(f"{path}: holds {len(arrays)} arrays, expected one.")
    (array,) = arrays
    if array.ndim != 4 or not (array.dtype == numpy.uint8 or array.dtype.kind == "f"):
        raise CalibrationError(
            f"{path}: got an array of shape {array.shape} and {array.dtype}, expected images (samples, height, width, "
            "channels) in uint8, or pixel values (samples, channels, height, width) in floating point."
        )
    return array


def _pixels(image: Any, processor: Any, where: str) -> torch.Tensor:
    """What the image processor makes of a file or an array."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise CalibrationError('images need the pillow package: pip install "secateur[images]"') from None
    try:
        opened = Image.open(image) if isinstance(image, Path) else Image.fromarray(image)
        value: torch.Tensor = processor(images=opened.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    except (OSError, ValueError, TypeError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise CalibrationError(f"{image if isinstance(image, Path) else where}: cannot be read: {error}") from None
    return value.to(torch.float32)
