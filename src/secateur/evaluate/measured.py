"""A figure of the dense and of a pruned model on the same labelled samples."""

from dataclasses import dataclass

from torch import Tensor

from secateur.evaluate.perplexity import standard_error


@dataclass(frozen=True)
class Measured:
    """A figure of both models on the same labelled samples, and the pruned model's minus the dense one's.

    Errors are standard errors over samples, that of the difference over the differences of samples; NaN for a single
    one. `right_to_wrong` and `wrong_to_right` count the samples whose answer flipped, where it is right or wrong.
    """

    dense: float
    dense_error: float
    pruned: float
    pruned_error: float
    difference: float
    difference_error: float
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None


def share_right(dense: Tensor, pruned: Tensor) -> Measured:
    """The shares of samples for which the models are right."""
    own, reference = pruned.double(), dense.double()
    return Measured(
        dense=float(reference.mean()),
        dense_error=standard_error(reference),
        pruned=float(own.mean()),
        pruned_error=standard_error(own),
        difference=float((own - reference).mean()),
        difference_error=standard_error(own - reference),
        right_to_wrong=int((dense & ~pruned).sum()),
        wrong_to_right=int((pruned & ~dense).sum()),
    )
