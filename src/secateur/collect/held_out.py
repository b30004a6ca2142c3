"""Plans judged before anything is pruned: the loss of the model on held-out windows with each plan's zeros in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from secateur.core import scores
from secateur.core.problem import Problem
from secateur.core.statistics import SquaredNorm
from secateur.errors import NumericalError
from secateur.models.flow.stream import Stream
from secateur.models.opening.opened import OpenedModel
from secateur.models.shape.matrices import Matrix, by_block
from secateur.models.shape.skeleton import loaded
from secateur.models.shape.structure import Block
from secateur.plans.plan import Plan
from secateur.runs.conveyor import Conveyor
from secateur.runs.events import Progress


@torch.no_grad()
def held_out_losses(
    opened: OpenedModel,
    batches: Sequence[Tensor],
    plans: Sequence[Plan],
    norms: Mapping[str, SquaredNorm],
    *,
    states_folder: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> list[Tensor]:
    """The mean cross-entropy of each window in nats, float64, of the model with the zeros of each plan.

    Wanda chooses them, by the `norms` of the dense model's inputs, and weights that are kept stay as they are; a matrix
    without norms stays dense. It takes a forward for each plan, with one block in memory, and changes nothing. Raises
    `NumericalError` for losses that are not finite.
    """
    skeleton = opened.skeleton
    of_block = by_block([matrix for matrix in skeleton.matrices if matrix.name in norms])
    skeleton.load_outside()
    streams = [Stream(skeleton, batches, states_folder=states_folder, predicting=True) for _ in plans]

    def visit(block: Block, tensors: dict[str, Tensor]) -> None:
        own = of_block.get(block.index, [])
        names = [name for group in skeleton.conversion.of(matrix.tensor for matrix in own) for name in group.names]
        # Exact: parameters may lie in the memory of the tensors that they were loaded from, which pruning overwrites.
        dense = {name: tensors[name].clone() for name in names}
        for stream in streams:
            stream.reach(block)
        with loaded(skeleton, block, tensors):
            try:
                for stream, plan in zip(streams, plans, strict=True):
                    skeleton.update(dense | _pruned(own, dense, plan, norms))
                    for batch in range(len(batches)):
                        stream.states.put(batch, stream.run(block, batch))
                    stream.release(block)
            finally:
                if skeleton.resident:
                    skeleton.update(dense)
        progress("compare", block.index + 1, len(skeleton.blocks))

    try:
        Conveyor(skeleton).carry(visit, read=skeleton.read)
        return [_losses(stream) for stream in streams]
    finally:
        for stream in streams:
            stream.close()
        skeleton.unload_outside()


def _pruned(
    matrices: Sequence[Matrix], dense: Mapping[str, Tensor], plan: Plan, norms: Mapping[str, SquaredNorm]
) -> dict[str, Tensor]:
    """The tensors of some matrices with the zeros of a plan."""
    result: dict[str, Tensor] = {}
    for matrix in matrices:
        if matrix.tensor not in result:
            result[matrix.tensor] = dense[matrix.tensor].clone()
        view = matrix.view(result)
        pattern, norm = plan[matrix.name], norms[matrix.name]
        weight = view.to(norm.total.device)
        mask = pattern.mask(scores.wanda(Problem(matrix.name, weight, pattern, {SquaredNorm: norm})))
        view.masked_fill_(~mask.to(view.device), 0)
    return result


def _losses(stream: Stream) -> Tensor:
    found = torch.cat([stream.window_losses(batch) for batch in range(len(stream.batches))])
    if not bool(found.isfinite().all()):
        raise NumericalError(
            f"{int((~found.isfinite()).sum())} of {len(found)} held-out windows have a loss that is not finite. The "
            "model overflows or is damaged; try --dtype float32."
        )
    return found
