"""All evidence of a run: what its needs ask for, each kind by the collector that answers it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from secateur.collect.collector import (
    Collected,
    Collector,
    Cost,
    Extent,
    Place,
    reach_site,
    run_batches,
)
from secateur.collect.dense_products import DenseProducts
from secateur.collect.dense_twin import DenseTwin
from secateur.collect.drift import ResidualDrift
from secateur.collect.gradient_file import GradientFile
from secateur.collect.input_sums import InputSums
from secateur.collect.model_gradients import ModelGradients
from secateur.collect.regional_gradients import RegionalGradients
from secateur.collect.sites import Site
from secateur.collect.survey import Survey
from secateur.core.gram import CrossGram
from secateur.core.needs import Drift, Need, gradient_kind, input_statistics
from secateur.errors import MethodError
from secateur.models.flow.stream import Stream
from secateur.models.flow.waiting import WaitingForwards
from secateur.models.shape.matrices import Matrix
from secateur.models.shape.skeleton import Skeleton
from secateur.models.shape.structure import Block


def collectors_of(needs: frozenset[Need], gradients: GradientFile | None, survey: Survey | None) -> list[Collector]:
    """A collector for every kind of needs. Raises `MethodError` for a need that nothing answers."""
    found: list[Collector] = []
    kind = gradient_kind(needs)
    if kind is not None and kind.scope == "block" and gradients is None:
        found.append(RegionalGradients(kind))
    elif kind is not None:
        found.append(ModelGradients(kind, gradients))
    if CrossGram in needs:
        found.append(DenseProducts(frozenset({CrossGram})))
    if kinds := input_statistics(needs - {CrossGram}):
        found.append(InputSums(kinds, survey))
    found += [ResidualDrift(need) for need in needs if isinstance(need, Drift)]
    for need in needs.difference(*(own.needs for own in found)):
        raise MethodError(f"needs: nothing collects {need!r}; expected a class of statistics or a GradientKind.")
    return found


@dataclass
class RunEvidence:
    """The evidence that a run collects, block by block, as its needs ask for it.

    A run may be given a file of `gradients`, and a `survey`: statistics that runs share. Sums are kept on `device`, if
    not where inputs are. Raises `MethodError` for a need that nothing answers.
    """

    needs: frozenset[Need]
    gradients: GradientFile | None = None
    survey: Survey | None = None
    device: torch.device | None = None

    def __post_init__(self) -> None:
        self.collectors = collectors_of(self.needs, self.gradients, self.survey)
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

    def collect(
        self,
        block: Block,
        matrices: Sequence[Matrix],
        stream: Stream,
        twin: DenseTwin | None,
        *,
        keep_outputs: bool,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Collected:
        """Run all batches through a loaded block, and collect what is asked of these matrices; see `run_batches`."""
        place = Place(block, matrices, stream, twin, self.device)
        collectors = [own.at(place) for own in self.collectors if own.forwards]
        return run_batches(place, collectors, keep_outputs=keep_outputs, progress=progress)

    def collect_at(
        self,
        site: Site,
        forwards: WaitingForwards,
        twin: DenseTwin | None,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Collected:
        """Let forwards go on to a site, and collect what is asked of its matrices; see `reach_site`."""
        place = Place(forwards.block, site.matrices, forwards.stream, twin, self.device)
        collectors = [own.at(place) for own in self.collectors if own.forwards]
        return reach_site(place, collectors, site, forwards, progress=progress)

    def of(self, matrix: Matrix, collected: Collected | None, device: torch.device) -> dict[Need, Any]:
        """All evidence of a matrix; what has to be read first is read to `device`."""
        evidence: dict[Need, Any] = {}
        waiting = [own for own in self.collectors if not own.forwards]
        for own in [*waiting, *(collected.collectors if collected is not None else ())]:
            evidence |= own.of(matrix, device)
        return evidence
