"""Calibration and evaluation text: corpora, and the token windows cut from them."""

from secateur.calibration.corpora import Corpus, load_corpus
from secateur.calibration.packing import training_windows
from secateur.calibration.windows import (
    Windows,
    calibration_windows,
    check_length,
    check_predictions,
    check_vocabulary,
    evaluation_windows,
)

__all__ = [
    "Corpus",
    "Windows",
    "calibration_windows",
    "check_length",
    "check_predictions",
    "check_vocabulary",
    "evaluation_windows",
    "load_corpus",
    "training_windows",
]
