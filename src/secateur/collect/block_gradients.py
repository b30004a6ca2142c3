"""Gradients of all blocks, one block in memory: forwards through them, and back."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from secateur.core.batch import Batch
from secateur.models.flow.backward import (
    Labels,
    Place,
    SavedInputs,
    StateGradients,
    backward,
    forward_saving_inputs,
    head_gradients,
    next_tokens,
    own_loss_gradients,
    places_of_made,
    regional_gradient,
    to_the_stack_before,
)
from secateur.models.flow.stream import Stream
from secateur.models.flow.tap import BackwardTap
from secateur.models.shape.skeleton import Skeleton, loaded
from secateur.models.shape.structure import Block
from secateur.runs.conveyor import Conveyor
from secateur.runs.events import Progress
from secateur.runs.processes import ALONE, Processes

TapT = TypeVar("TapT", bound=BackwardTap)
Parameters = Mapping[str, tuple[Tensor, bool]]


@dataclass(frozen=True)
class GradientPass(Generic[TapT]):
    """Passes over a model that call `take` with each block from `first` on and the tap that has its sums.

    Blocks whose numbers are `finished` only pass states and gradients on. `parameters(block)` are those of interest of
    a loaded block, which `tap` taps; `labels` are the tokens whose loss is taken, or None for the loss that the model
    itself takes of labels among its inputs. Batches are those of `Stream`, the part of this process; the sums are those
    of all `processes`. `folder` is where hidden states go, if not into memory.

    Raises `NumericalError` for gradients that are not finite, `ModelStructureError` where they cannot be taken.
    """

    skeleton: Skeleton
    parameters: Callable[[Block], Parameters]
    take: Callable[[Block, TapT], None]
    tap: Callable[[Parameters], TapT]
    labels: Labels | None = next_tokens
    first: int = 0
    finished: Collection[int] = ()
    progress: Progress = lambda stage, done, total: None
    processes: Processes = ALONE

    def of_model(self, batches: Sequence[Batch], folder: Path | None = None) -> None:
        """Take gradients of the model's loss, from the last block to the first.

        The loss of a sample is the mean cross-entropy of its next-token predictions, or its own. Equal to full autograd
        up to rounding.
        """
        skeleton, blocks = self.skeleton, self.skeleton.blocks
        conveyor = Conveyor(skeleton)
        skeleton.load_outside()
        stream = self._stream(batches, folder, predicting=self.labels is not None, and_back=True)
        saved: dict[int, SavedInputs] = {}
        outgoing: StateGradients | None = None
        number = len(skeleton.stacks) - 1  # of the stack that is gone back through
        made: dict[int, set[Place]] = {}

        @torch.no_grad()
        def forwards(block: Block, tensors: dict[str, Tensor]) -> None:
            stream.reach(block)
            with loaded(skeleton, block, tensors):
                saved[block.index] = forward_saving_inputs(stream, block, folder)
            if block.index < self.first:
                saved.pop(block.index).states.close()
            self.progress("forward", block.index + 1, len(blocks))

        def backwards(block: Block, tensors: dict[str, Tensor]) -> None:
            nonlocal number, made
            assert outgoing is not None
            if skeleton.stack_of(block) < number:
                with skeleton.outside():
                    to_the_stack_before(stream, skeleton.stacks[number], outgoing)
                    number -= 1
                    made = places_of_made(stream, skeleton.stacks[number]) if number else {}
            with loaded(skeleton, block, tensors):
                wanted = {} if block.index in self.finished else self.parameters(block)
                tap = self.tap(wanted)
                own = saved.pop(block.index)
                try:
                    for batch in range(len(stream.batches)):
                        backward(stream, block, batch, own, outgoing, tap, made.get(block.index, ()))
                finally:
                    own.states.close()
                stream.release(block)
                if block.index not in self.finished:
                    self.processes.join(tap.sums.values())
                    self.take(block, tap)
            self.progress("backward", len(blocks) - block.index, len(blocks) - self.first)

        try:
            conveyor.carry(forwards, read=skeleton.read)
            if self.labels is None:
                outgoing = own_loss_gradients(stream, folder, self.progress)
            else:
                outgoing = head_gradients(stream, folder, self.progress, self.labels)
            if number and skeleton.stack_of(blocks[self.first]) < number:
                made = places_of_made(stream, skeleton.stacks[number])
            skeleton.unload_outside()
            stream.states.close()
            conveyor.carry(backwards, read=skeleton.read, blocks=blocks[self.first :][::-1])
        finally:
            for rest in saved.values():
                rest.states.close()
            if outgoing is not None:
                outgoing.states.close()
            stream.close()

    def of_blocks(self, batches: Sequence[Batch], folder: Path | None = None) -> None:
        """Take gradients of each block's own output norm, from the first block to the last.

        The loss of a sample is the Euclidean norm of the block's output for it; blocks see the outputs of the dense
        blocks before them. One pass: nothing is saved.

        Source: the regional gradient of Wanda++ (arXiv 2503.04992), section 4.1.
        """
        skeleton = self.skeleton
        skeleton.load_outside(head=False)
        stream = self._stream(batches, folder)
        skeleton.unload_outside()

        def both(block: Block, tensors: dict[str, Tensor]) -> None:
            stream.reach(block)
            with loaded(skeleton, block, tensors):
                taken = block.index >= self.first and block.index not in self.finished
                tap = self.tap(self.parameters(block)) if taken else None
                for batch in range(len(stream.batches)):
                    stream.states.put(batch, regional_gradient(stream, block, batch, tap))
                stream.release(block)
                if tap is not None:
                    self.processes.join(tap.sums.values())
                    self.take(block, tap)
            self.progress("forward and backward", block.index + 1, len(skeleton.blocks))

        try:
            Conveyor(skeleton).carry(both, read=skeleton.read)
        finally:
            stream.close()

    def _stream(
        self, batches: Sequence[Batch], folder: Path | None, *, predicting: bool = False, and_back: bool = False
    ) -> Stream:
        return Stream(
            self.skeleton,
            batches,
            states_folder=folder,
            predicting=predicting,
            and_back=and_back,
            progress=lambda done, total: self.progress("record", done, total),
        )
