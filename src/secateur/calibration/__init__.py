"""Calibration and evaluation text: corpora, and the token windows cut from them."""

from secateur.calibration.corpora import load_corpus
from secateur.calibration.documents import Corpus
from secateur.calibration.drawing import calibration_windows, evaluation_windows
from secateur.calibration.packing import training_windows
from secateur.calibration.text import bos_text, check_bos
from secateur.calibration.windows import (
    Windows,
    check_length,
    check_predictions,
    check_vocabulary,
)

__all__ = [
    "Corpus",
    "Windows",
    "bos_text",
    "calibration_windows",
    "check_bos",
    "check_length",
    "check_predictions",
    "check_vocabulary",
    "evaluation_windows",
    "load_corpus",
    "training_windows",
]
