"""The words that options of the mathematics and of the calibration may be. No torch: a command line lists them fast."""

from typing import Literal

Group = Literal["row", "matrix", "search"]  # weights that are compared with each other
Norm = Literal["l1", "l2"]  # of a weight's gradients over the samples
Granularity = Literal["sample", "token"]  # whose gradients
Scope = Literal["model", "block"]  # of which loss
Sampling = Literal["document", "concat"]  # where windows of text are drawn from
OnNonfinite = Literal["error", "skip-matrix"]  # what becomes of a matrix with NaN or infinity
Unseen = Literal["error", "magnitude", "skip"]  # of one that no calibration token reached
Bos = Literal["papers", "always", "never"]  # where the token stands that begins a text
