"""A figure of the dense and of a pruned model on the same labelled samples, and how it is shown."""

from dataclasses import dataclass

from torch import Tensor

from secateur.evaluate.perplexity import plus_minus, standard_error


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


@dataclass(frozen=True)
class Form:
    """How a figure is shown: its heading, what it is multiplied by, the format of its decimals."""

    heading: str
    scale: float = 100
    form: str = ".1f"

    def cell(self, value: float, error: float, sign: str = "") -> str:
        """A value and its error."""
        return f"{self.scale * value:{sign}{self.form}}{plus_minus(self.scale * error, self.form)}"


FIGURES = {
    "top1": Form("top-1 %"),
    "top5": Form("top-5 %"),
    "accuracy": Form("accuracy %"),
    "wer": Form("word errors %"),
    "chrf": Form("chrF", scale=1),
}
