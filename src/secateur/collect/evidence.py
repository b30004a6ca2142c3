"""All evidence of a run: what its needs ask for, each kind by the collector that answers it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.collect.collector import Collected, Collector, Cost, Extent, Place
from secateur.collect.dense_products import DenseProducts
from secateur.collect.drift import ResidualDrift
from secateur.collect.exempt import Exempt
from secateur.collect.gradient_file import GradientFile
from secateur.collect.input_sums import InputSums
from secateur.collect.model_gradients import ModelGradients
from secateur.collect.regional_gradients import RegionalGradients
from secateur.collect.survey import Survey
from secateur.core.gram import CrossGram
from secateur.core.needs import Drift, Need, gradient_kind, input_statistics
from secateur.errors import MethodError
from secateur.models.flow.stream import Stream
from secateur.models.shape.matrices import Matrix
from secateur.models.shape.skeleton import Skeleton
from secateur.models.shape.structure import Block


@dataclass
class RunEvidence:
    """The evidence that a run collects, block by block, as its needs ask for it.

    A run may be given a file of `gradients`, and a `survey`: statistics that runs share. Sums are kept on `device`, if
    not where inputs are; `exempt` says what becomes of matrices of which nothing can be known. Raises `MethodError` for
    a need that nothing answers.
    """

    needs: frozenset[Need]
    gradients: GradientFile | None = None
    survey: Survey | None = None
    device: torch.device | None = None
    exempt: Exempt = field(default_factory=Exempt)

    def __post_init__(self) -> None:
        kind = gradient_kind(self.needs)
        self.collectors: list[Collector] = []
        if kind is not None and kind.scope == "block" and self.gradients is None:
            self.collectors.append(RegionalGradients(kind))
        elif kind is not None:
            self.collectors.append(ModelGradients(kind, self.gradients))
        if CrossGram in self.needs:
            self.collectors.append(DenseProducts(frozenset({CrossGram})))
        if kinds := input_statistics(self.needs - {CrossGram}):
            self.collectors.append(InputSums(kinds, self.survey))
        self.collectors += [ResidualDrift(need) for need in self.needs if isinstance(need, Drift)]
        for need in self.needs.difference(*(own.needs for own in self.collectors)):
            raise MethodError(f"needs: nothing collects {need!r}; expected a class of statistics or a GradientKind.")
        for own in self.collectors:
            own.exempt = self.exempt
        self.looks_at_samples = any(own.looks_at_samples for own in self.collectors)
        running = [own for own in self.collectors if own.forwards]
        self.forwards = bool(running)  # samples run through the blocks while they are pruned
        self.beside_dense = any(own.beside_dense for own in running)
        self.known = all(own.known for own in running)  # so that only the first batch has to run

    def batch_size(self, skeleton: Skeleton, length: int, batch_size: int | None) -> int | None:
        """Samples that have to go through a block at once, or what was asked for; raises where that cannot be."""
        for own in self.collectors:
            batch_size = own.batch_size(skeleton, length, batch_size)
        return batch_size

    def cost(self, extent: Extent) -> Cost:
        """What all of it takes in a run."""
        return sum((own.cost(extent) for own in self.collectors), Cost())

    def solving(self, in_features: int) -> int:
        """Numbers that are held beside it while a matrix of this width is solved."""
        return sum(own.solving(in_features) for own in self.collectors)

    @property
    def watched(self) -> set[str]:
        """Submodules of the block that was entered, whose inputs have to be kept while forwards wait in it."""
        return {path for own in self.collectors for path in own.watched}

    def enter(self, block: Block, matrices: Sequence[Matrix], stream: Stream) -> dict[str, Any]:
        """Get to know a loaded block before anything in it changes; returns what the manifest says of it."""
        record: dict[str, Any] = {}
        for own in self.collectors:
            record |= own.enter(block, matrices, stream)
        return record

    def at(self, place: Place) -> list[Collector]:
        """What collects at a place, with nothing collected yet."""
        return [own.at(place) for own in self.collectors if own.forwards]

    def of(self, matrix: Matrix, collected: Collected | None, device: torch.device) -> dict[Need, Any]:
        """All evidence of a matrix; what has to be read first is read to `device`."""
        evidence: dict[Need, Any] = {}
        waiting = [own for own in self.collectors if not own.forwards]
        for own in [*waiting, *(collected.collectors if collected is not None else ())]:
            evidence |= own.of(matrix, device)
        return evidence
