"""Gradients of the norm of each block's own output, taken on inputs that come through the pruned blocks before it."""

import math

import torch
from torch import Tensor

from secateur.collect.collector import Collector, Cost, Evidence, Extent
from secateur.collect.gradient_pass import accumulator_bytes, check_gradient, gradient_batch_size, graph_bytes
from secateur.core.gradients import GradientKind, GradientNorm
from secateur.models.flow.backward import GradientTap, regional_gradient
from secateur.models.shape.matrices import Matrix
from secateur.models.shape.skeleton import Skeleton
from secateur.runs.processes import Processes


class RegionalGradients(Collector):
    """Regional gradients, in the forwards of the statistics and a backward through the block after each."""

    def __init__(self, kind: GradientKind) -> None:
        self.needs = frozenset({kind})
        self.kind = kind

    def batch_size(self, skeleton: Skeleton, length: int, batch_size: int | None) -> int | None:
        """One sample where tokens are routed to experts. Raises `CalibrationError` when more are asked for."""
        return gradient_batch_size(skeleton, length, self.kind.granularity, batch_size)

    def cost(self, extent: Extent) -> Cost:
        """Sums of gradients and the graph of a batch, and two forwards' work."""
        batch = accumulator_bytes(extent.matrices)
        batch += graph_bytes(extent.matrices, extent.batch_tokens, extent.skeleton.dtype.itemsize)
        joined = 8.0 * sum(math.prod(matrix.shape) for matrix in extent.matrices)
        return Cost(batch=batch, forwards=2.0, joined=joined)

    def start(self) -> None:
        """Begin with sums that are zero."""
        self._tap = GradientTap(self.place.parameters, [self.kind.norm], self.kind.granularity)
        self._found: dict[str, GradientNorm] = {}
        self.runs = self.whole = bool(self.place.matrices)

    def run(self, batch: int) -> Tensor:
        """What the block makes of a batch, while gradients are taken."""
        return regional_gradient(self.place.stream, self.place.block, batch, self._tap)

    def join(self, processes: Processes) -> None:
        """Join the sums. All processes have the same parameters."""
        processes.join(self._tap.sums.values())

    def finished(self) -> None:
        """Raise for gradients that are zero throughout, or not finite."""
        samples, tokens = self.place.samples, self.place.tokens
        totals = self._tap.totals()
        for matrix in self.place.matrices:
            whole = totals[matrix.parameter, self.kind.norm]
            total = matrix.of_parameter(whole, self.place.layout[matrix.parameter])
            check_gradient(matrix.name, total, samples, self.exempt)
            self._found[matrix.name] = GradientNorm(self.kind, total, tokens, samples)
        del self._tap  # Memory: its buffers

    def of(self, matrix: Matrix, device: torch.device) -> Evidence:
        """The gradients of a matrix."""
        return {self.kind: self._found[matrix.name]}
