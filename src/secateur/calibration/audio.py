"""Recordings: what calibration and evaluation feed a model of speech, read from files of sound."""

import os
import random
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from secateur.calibration.images import chosen_count
from secateur.calibration.labels import files_in
from secateur.errors import CalibrationError
from secateur.files.reading import read_text

PREFIX = "audio:"
ENDINGS = (".wav", ".flac")
TRANSCRIPT_BYTES = 1 << 20


@dataclass(frozen=True)
class Recording:
    """A file of sound, and what is said in it, where a file with the ending .txt beside it says so."""

    file: Path
    transcript: str | None

    def sound(self, rate: int) -> numpy.ndarray[Any, Any]:
        """Its sound as float32 between -1 and 1, channels averaged. Raises `CalibrationError` for another rate."""
        values, found = _flac(self.file) if self.file.suffix.lower() == ".flac" else _wav(self.file)
        if found != rate:
            raise CalibrationError(
                f"{self.file}: has {found:,} values per second, and the model hears {rate:,}. Convert it first, as "
                f"with ffmpeg -i {self.file.name} -ar {rate} NEW.wav."
            )
        if not len(values):
            raise CalibrationError(f"{self.file}: has no sound in it. Leave it out.")
        sound: numpy.ndarray[Any, Any] = values.mean(axis=1)
        return sound


def audio_of(source: Any) -> str | None:
    """The folder after `audio:`, or None for another source."""
    if isinstance(source, Sequence) and not isinstance(source, str) and len(source) == 1:
        source = source[0]
    if isinstance(source, str | os.PathLike) and os.fspath(source).startswith(PREFIX):
        return os.fspath(source).removeprefix(PREFIX)
    return None


def recordings(source: str, samples: int | None, seed: int | None) -> tuple[list[Recording], Mapping[str, Any]]:
    """Some recordings of a folder, and their provenance.

    Of more than `samples` as many are drawn with the seed; without a seed the first ones are taken, or all.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        raise CalibrationError(f"{PREFIX}{source}: no such folder. Give a folder of {' and '.join(ENDINGS)} files.")
    found = files_in(path, ENDINGS)
    if not found:
        raise CalibrationError(f"{path}: no recording in it. Give a folder of {' and '.join(ENDINGS)} files.")
    count = chosen_count(len(found), samples, seed)
    chosen = found[:count] if seed is None else random.Random(seed).sample(found, count)
    facts = {
        "source": "recordings",
        "sources": [{"corpus": path.name, "file": str(path)}],
        "recordings_there": len(found),
        **({} if seed is None else {"seed": seed}),
    }
    return [Recording(file, _transcript(file.with_suffix(".txt"))) for file in chosen], facts


def _transcript(file: Path) -> str | None:
    return read_text(file, limit=TRANSCRIPT_BYTES).strip() if file.is_file() else None


def _wav(file: Path) -> tuple[numpy.ndarray[Any, Any], int]:
    """(values of shape (values, channels), values per second) of a file of whole numbers."""
    try:
        with wave.open(str(file), "rb") as opened:
            channels, width, rate = opened.getnchannels(), opened.getsampwidth(), opened.getframerate()
            data = opened.readframes(opened.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise CalibrationError(f"{file}: cannot be read as sound: {error}") from None
    if width == 3:  # no type of numpy has three bytes: they become the upper ones of four
        wide = numpy.zeros((len(data) // 3, 4), numpy.uint8)
        wide[:, 1:] = numpy.frombuffer(data, numpy.uint8)[: 3 * len(wide)].reshape(-1, 3)
        data, width = wide.tobytes(), 4
    kinds: dict[int, Any] = {1: numpy.uint8, 2: numpy.dtype("<i2"), 4: numpy.dtype("<i4")}
    if width not in kinds:
        raise CalibrationError(f"{file}: has {width} bytes for each value, expected 1 to 4.")
    found = numpy.frombuffer(data[: len(data) // (width * channels) * width * channels], kinds[width])
    values = found.astype(numpy.float32) / 2.0 ** (8 * width - 1) - (1 if width == 1 else 0)
    return values.reshape(-1, channels).astype(numpy.float32), rate


def _flac(file: Path) -> tuple[numpy.ndarray[Any, Any], int]:
    try:
        import soundfile
    except ImportError:
        raise CalibrationError(
            f'{file}: reading .flac needs the soundfile package: pip install "secateur[audio]". .wav needs none.'
        ) from None
    try:
        values, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise CalibrationError(f"{file}: cannot be read as sound: {error}") from None
    return values, int(rate)
