"""A whole forward of a model over batches of tokens, in the memory of one block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from secateur.models.flow.memory import trim
from secateur.models.flow.stream import Stream
from secateur.models.shape.skeleton import Skeleton, loaded, read_ahead

Progress = Callable[[str, int, int], None]


@contextmanager
def after_the_last_block(
    skeleton: Skeleton,
    batches: Sequence[Tensor],
    *,
    states_folder: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Iterator[Stream]:
    """The stream of all batches behind the last block, ready for the model's head; its states go at the end."""
    skeleton.load_outside()
    stream = Stream(
        skeleton,
        batches,
        states_folder=states_folder,
        progress=lambda done, total: progress("record", done, total),
    )
    try:
        with torch.no_grad():
            for block, tensors in read_ahead(skeleton, skeleton.blocks):
                with loaded(skeleton, block, tensors):
                    for batch in range(len(stream.batches)):
                        stream.states.put(batch, stream.run(block, batch))
                stream.release(block)
                del tensors
                trim()
                progress("blocks", block.index + 1, len(skeleton.blocks))
        yield stream
    finally:
        stream.close()
