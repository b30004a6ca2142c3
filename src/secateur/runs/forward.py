"""A whole forward of a model over batches of tokens, in the memory of one block."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from secateur.core.batch import Batch
from secateur.models.flow.inputs import tokens_in
from secateur.models.flow.stream import Stream, states_folder
from secateur.models.shape.skeleton import Skeleton, loaded
from secateur.models.shape.structure import Block
from secateur.runs.conveyor import Conveyor
from secateur.runs.events import Progress


@contextmanager
def after_the_last_block(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    *,
    offload_states: str = "auto",
    predicting: bool = True,
    length: int = 1,
    progress: Progress = lambda stage, done, total: None,
) -> Iterator[Stream]:
    """The stream of all batches after the last block, ready for the model's head; its states go at the end.

    `length` is the number of hidden states of an image; with `predicting`, next tokens will be asked for.
    """
    needed = tokens_in(batches, length) * skeleton.hidden_size * skeleton.dtype.itemsize
    skeleton.load_outside()
    stream = Stream(
        skeleton,
        batches,
        states_folder=states_folder(offload_states, needed, Path.cwd()),
        predicting=predicting,
        progress=lambda done, total: progress("record", done, total),
    )

    @torch.no_grad()
    def run(block: Block, tensors: dict[str, Tensor]) -> None:
        stream.reach(block)
        with loaded(skeleton, block, tensors):
            for batch in range(len(stream.batches)):
                stream.states.put(batch, stream.run(block, batch))
        stream.release(block)
        progress("blocks", block.index + 1, len(skeleton.blocks))

    try:
        Conveyor(skeleton).carry(run, read=skeleton.read)
        yield stream
    finally:
        stream.close()
