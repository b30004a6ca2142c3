"""Matrices that a run leaves dense, or prunes by their weights alone, because nothing usable is known of them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.core.choices import OnNonfinite, Unseen
from secateur.errors import SecateurError


@dataclass
class Exempt:
    """What becomes of matrices that cannot be solved as asked; by default the first one ends the run.

    `skipped` are the matrices that stay dense, each with the reason, and `by_magnitude` those that no token reached and
    whose smallest weights are removed instead. Both grow while a run goes on.
    """

    on_nonfinite: OnNonfinite = "error"
    unseen: Unseen = "error"
    skipped: dict[str, str] = field(default_factory=dict)
    by_magnitude: set[str] = field(default_factory=set)

    def to_json(self, matrices: Collection[str] | None = None) -> dict[str, Any]:
        """Both, of all matrices or of these, as JSON, for a run that goes on later."""
        skipped = {name: why for name, why in self.skipped.items() if matrices is None or name in matrices}
        unseen = [name for name in self.by_magnitude if matrices is None or name in matrices]
        return {"skipped": skipped, "by_magnitude": sorted(unseen)}

    def add(self, record: Mapping[str, Any]) -> None:
        """Add what `to_json` returned in an earlier process."""
        self.skipped |= record["skipped"]
        self.by_magnitude |= set(record["by_magnitude"])

    def nonfinite(self, matrix: str, error: SecateurError) -> None:
        """A matrix of which something is not finite: leave it dense, or raise the error."""
        if self.on_nonfinite == "error":
            raise error
        self.skipped.setdefault(matrix, str(error))

    def no_token(self, matrices: Sequence[str], error: SecateurError) -> None:
        """Matrices that no calibration token reached: note them, or raise the error."""
        if self.unseen == "error":
            raise error
        if self.unseen == "magnitude":
            self.by_magnitude.update(matrices)
            return
        for matrix in matrices:
            self.skipped.setdefault(matrix, f"{matrix}: saw no token of the calibration samples.")
