"""Calibration samples for a certain model: drawn, and checked to be something that it can read."""

import os
from typing import Any

from torch import Tensor

from secateur.calibration import Windows, calibration_windows, check_length, check_vocabulary
from secateur.calibration.corpora import is_token_file
from secateur.calibration.windows import Progress
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


def _is_text(calibration: Any) -> bool:
    """Whether some of it has to be tokenised."""
    if isinstance(calibration, Tensor | Windows):
        return False
    specs = [calibration] if isinstance(calibration, str | os.PathLike) else calibration
    return not all(isinstance(spec, str | os.PathLike) and is_token_file(os.fspath(spec)) for spec in specs)
