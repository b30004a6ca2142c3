"""Gradients of all blocks, one block in memory: forwards through them, and back."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.core.choices import Granularity, Norm
from secateur.models.flow.backward import (
    GradientTap,
    SavedInputs,
    StateGradients,
    backward,
    forward_saving_inputs,
    head_gradients,
    regional_gradient,
)
from secateur.models.flow.stream import Stream
from secateur.models.shape.skeleton import Skeleton, loaded
from secateur.models.shape.structure import Block
from secateur.runs.conveyor import Conveyor
from secateur.runs.events import Progress

Parameters = Callable[[Block], Mapping[str, tuple[nn.Parameter, bool]]]
Take = Callable[[Block, Mapping[tuple[str, Norm], Tensor]], None]
"""Is given a block and its gradients by parameter and norm, laid out like the parameter."""


def model_gradients(
    skeleton: Skeleton,
    batches: Sequence[Tensor],
    parameters: Parameters,
    take: Take,
    *,
    norms: Collection[Norm],
    granularity: Granularity = "sample",
    first: int = 0,
    states_folder: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Call `take` with the gradient norms of the language-model loss, block by block from the last to `first`.

    The loss of a sample is the mean cross-entropy of its next-token predictions. `batches` are those of `Stream`,
    `parameters(block)` the parameters of interest of a loaded block. Equal to full autograd up to rounding.

    Raises `NumericalError` for gradients that are not finite, `ModelStructureError` where they cannot be taken.
    """
    blocks = skeleton.blocks
    conveyor = Conveyor(skeleton)
    skeleton.load_outside()
    stream = Stream(
        skeleton,
        batches,
        states_folder=_within(states_folder, "0"),
        progress=lambda done, total: progress("record", done, total),
    )
    saved: dict[int, SavedInputs] = {}
    outgoing: StateGradients | None = None

    @torch.no_grad()
    def forwards(block: Block, tensors: dict[str, Tensor]) -> None:
        with loaded(skeleton, block, tensors):
            saved[block.index] = forward_saving_inputs(stream, block, _within(states_folder, str(block.index + 1)))
        if block.index < first:
            saved.pop(block.index).states.close()
        progress("forward", block.index + 1, len(blocks))

    def backwards(block: Block, tensors: dict[str, Tensor]) -> None:
        assert outgoing is not None
        with loaded(skeleton, block, tensors):
            tap = GradientTap(parameters(block), norms, granularity)
            own = saved.pop(block.index)
            try:
                for batch in range(len(stream.batches)):
                    backward(stream, block, batch, own, outgoing, tap)
            finally:
                own.states.close()
            stream.release(block)
            take(block, tap.totals)
        progress("backward", len(blocks) - block.index, len(blocks) - first)

    try:
        conveyor.carry(forwards, read=skeleton.read)
        outgoing = head_gradients(stream, _within(states_folder, "head"), progress)
        skeleton.unload_outside()
        stream.states.close()
        conveyor.carry(backwards, read=skeleton.read, blocks=blocks[first:][::-1])
    finally:
        for rest in saved.values():
            rest.states.close()
        if outgoing is not None:
            outgoing.states.close()
        stream.close()


def regional_gradients(
    skeleton: Skeleton,
    batches: Sequence[Tensor],
    parameters: Parameters,
    take: Take,
    *,
    norms: Collection[Norm],
    granularity: Granularity = "sample",
    first: int = 0,
    states_folder: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Call `take` with the gradient norms of each block's own output norm, block by block from `first` to the last.

    The loss of a sample is the Euclidean norm of the block's output for it; blocks see the outputs of the dense
    blocks before them. One pass: nothing is saved. Parameters and errors are those of `model_gradients`.

    Source: the regional gradient of Wanda++ (arXiv 2503.04992), section 4.1.
    """
    skeleton.load_outside(head=False)
    stream = Stream(
        skeleton,
        batches,
        states_folder=states_folder,
        progress=lambda done, total: progress("record", done, total),
    )
    skeleton.unload_outside()

    def both(block: Block, tensors: dict[str, Tensor]) -> None:
        with loaded(skeleton, block, tensors):
            tap = GradientTap(parameters(block), norms, granularity) if block.index >= first else None
            for batch in range(len(stream.batches)):
                stream.states.put(batch, regional_gradient(stream, block, batch, tap))
            stream.release(block)
            if tap is not None:
                take(block, tap.totals)
        progress("forward and backward", block.index + 1, len(skeleton.blocks))

    try:
        Conveyor(skeleton).carry(both, read=skeleton.read)
    finally:
        stream.close()


def _within(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name
