"""Gradients that come from a file: one that was given, or one that the run takes of the dense model first."""

import math

import torch

from secateur.collect.collector import Collector, Cost, Evidence, Extent, PassBefore
from secateur.collect.gradient_file import GradientFile
from secateur.collect.gradient_pass import (
    accumulator_bytes,
    check_gradient,
    chunk_sizes,
    gradient_batch_size,
    graph_bytes,
)
from secateur.core.gradients import GradientKind
from secateur.errors import CalibrationError
from secateur.models.flow.stream import LOGITS_BYTES
from secateur.models.shape.matrices import Matrix
from secateur.models.shape.skeleton import Skeleton


class ModelGradients(Collector):
    """Gradients in a file, read matrix by matrix; without a file they are still to be taken, before any block."""

    forwards = False

    def __init__(self, kind: GradientKind, file: GradientFile | None) -> None:
        self.needs = frozenset({kind})
        self.kind, self.file = kind, file
        self.looks_at_samples = file is None

    def batch_size(self, skeleton: Skeleton, length: int, batch_size: int | None) -> int | None:
        """What was asked for, checked where gradients are still to be taken."""
        if self.file is None:
            if length < 2 and self.kind.scope == "model":
                raise CalibrationError(
                    "--length: got 1, expected at least 2: the loss is that of predicting the next token."
                )
            gradient_batch_size(skeleton, length, self.kind.granularity, batch_size)
        return batch_size

    def cost(self, extent: Extent) -> Cost:
        """The gradients of one matrix while it is solved; and the pass that takes them.

        That is a forward, and a backward of about three. The head runs forwards and back, with logits that pass about
        six times through memory. Every sample's gradients are added up once, and the model is hashed. The inputs of all
        blocks are saved for as many samples at once as fit.
        """
        skeleton, matrices = extent.skeleton, extent.matrices
        sizes = [math.prod(matrix.shape) for matrix in matrices]
        if self.file is not None:
            return Cost(reading=4 * max(sizes))
        logits, weights = extent.tokens * skeleton.logits_per_token, sum(sizes)
        batch = gradient_batch_size(skeleton, extent.length, self.kind.granularity, extent.batch_size)
        first = min(matrix.block for matrix in matrices)
        chunk = chunk_sizes(skeleton, extent.samples, extent.length, batch, self.kind.scope, extent.offload, first)
        tokens = min(extent.batch_tokens, chunk.samples * extent.length)
        graph = graph_bytes(matrices, tokens, skeleton.dtype.itemsize)
        before = PassBefore(
            working=accumulator_bytes(matrices) + 4 * max(sizes) + graph,
            head=3 * LOGITS_BYTES,
            saved=chunk.bytes,
            samples=chunk.samples,
            passes=math.ceil(extent.samples / chunk.samples),
            folder=chunk.folder,
        )
        return Cost(
            reading=4 * max(sizes),
            file=4 * weights * (1 + (before.passes > 1)),  # each pass adds up what the one before has written
            forwards=4.0,
            computing=3 * logits * skeleton.hidden_size,
            moved=24 * logits + 16 * weights * extent.samples,
            hashings=1,
            joined=8.0 * weights,
            before=(before,),
        )

    def of(self, matrix: Matrix, device: torch.device) -> Evidence:
        """The gradients of a matrix. Raises `CheckpointError` when they are not what was written.

        Raises `CalibrationError` where they are not finite, or zero throughout, unless the matrix is exempt.
        """
        assert self.file is not None
        read = self.file.read(matrix.name, self.kind, device)
        check_gradient(matrix.name, read.total, read.samples, self.exempt)
        return {self.kind: read}
