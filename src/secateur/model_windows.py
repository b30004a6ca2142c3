"""Calibration samples for a certain model: drawn, and checked to be something that it can read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.calibration import Windows, calibration_windows, check_length, check_vocabulary
from secateur.calibration.corpora import is_token_file
from secateur.calibration.quick import quick_windows
from secateur.calibration.windows import DEFAULT_LENGTH, DEFAULT_SAMPLES, Progress
from secateur.models.opened import OpenedModel


def model_windows(
    opened: OpenedModel,
    calibration: Any,
    tokenizer: Any,
    *,
    samples: int | None,
    length: int | None,
    seed: int,
    sampling: str | None,
    progress: Progress,
) -> Windows:
    """`calibration_windows` for an opened model, with its own tokenizer where there is text and none is given.

    Raises `CalibrationError` for token ids outside its vocabulary, and for windows longer than its positions.
    """
    windows = calibration_windows(
        calibration,
        opened.load_tokenizer() if tokenizer is None and _is_text(calibration) else tokenizer,
        samples=samples,
        length=length,
        seed=seed,
        sampling=sampling,  # type: ignore[arg-type]  # checked there
        progress=progress,
    )
    check_vocabulary(windows, opened.skeleton.vocabulary_size)
    check_length(windows, opened.skeleton.positions)
    return windows


@dataclass(frozen=True)
class Foreseen:
    """Calibration windows that are drawn, or only how many of which length there will be.

    `unchecked` are sentences on what only drawing them shows.
    """

    windows: Windows | None
    samples: int
    length: int
    unchecked: Sequence[str]


def foreseen_windows(
    opened: OpenedModel,
    calibration: Any,
    tokenizer: Any,
    *,
    samples: int | None,
    length: int | None,
    seed: int,
    sampling: str | None,
    progress: Progress,
) -> Foreseen:
    """What `model_windows` would draw, as far as it is quick to find out; raises the same where that shows an error.

    Without `calibration` only the length is checked.
    """
    unchecked: Sequence[str] = ()
    windows = None
    if calibration is not None:
        if tokenizer is None and _is_text(calibration):
            tokenizer = opened.load_tokenizer()
        windows, unchecked = quick_windows(
            calibration, tokenizer, samples=samples, length=length, seed=seed, sampling=sampling
        )
    if windows is None:
        samples, length = samples or DEFAULT_SAMPLES, length or DEFAULT_LENGTH
        check_length(Windows(torch.zeros(1, length, dtype=torch.int64), {}), opened.skeleton.positions)
        return Foreseen(None, samples, length, unchecked)
    check_vocabulary(windows, opened.skeleton.vocabulary_size)
    check_length(windows, opened.skeleton.positions)
    return Foreseen(windows, windows.samples, windows.length, unchecked)


def _is_text(calibration: Any) -> bool:
    """Whether some of it has to be tokenised."""
    if isinstance(calibration, Tensor | Windows):
        return False
    specs = [calibration] if isinstance(calibration, str | os.PathLike) else calibration
    return not all(isinstance(spec, str | os.PathLike) and is_token_file(os.fspath(spec)) for spec in specs)
