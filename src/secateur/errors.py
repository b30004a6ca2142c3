"""Every error that Secateur raises on purpose.

SecateurError
 ├─ ModelStructureError (ValueError)     the model is not shaped as a stack of blocks, or a matrix saw no token
 ├─ PatternError (ValueError)            a pattern cannot hold here: width, range, N > M, a glob that matches nothing
 ├─ CalibrationError (ValueError)        no text, text too short, token ids outside the vocabulary, NaN in a statistic
 ├─ MethodError (RuntimeError)           a user's own method raised, or returned something else than expected
 ├─ NumericalError (ArithmeticError)     weights or solutions that are not finite
 ├─ CheckpointError (OSError)            a file is missing, damaged, in the way, or cannot be written
 └─ ProcessError (RuntimeError)          processes that share a run differ, or one of them has ended

A message says where (matrix or file), what was found, what was expected, and what to do next.
"""


class SecateurError(Exception):
    """Base class: `except SecateurError` catches everything that Secateur raises on purpose."""


class ModelStructureError(SecateurError, ValueError):
    """The model cannot be taken apart as a stack of blocks, or a planned matrix saw no token."""


class PatternError(SecateurError, ValueError):
    """A sparsity pattern, plan or selection is impossible as asked."""


class CalibrationError(SecateurError, ValueError):
    """Calibration or evaluation text is missing, too short, or not fit for the model."""


class MethodError(SecateurError, RuntimeError):
    """A method of one's own raised an error, or returned something else than a score or a solution."""


class NumericalError(SecateurError, ArithmeticError):
    """Weights, scores or solutions are not finite."""


class CheckpointError(SecateurError, OSError):
    """A checkpoint cannot be read, or the output cannot be written."""


class ProcessError(SecateurError, RuntimeError):
    """Processes that share a run were not started alike, or one of them has ended."""
