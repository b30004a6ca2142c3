"""A whole forward of a model over windows of tokens, in the memory of one block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from secateur.calibration import Windows
from secateur.models.memory import trim
from secateur.models.opened import OpenedModel
from secateur.models.skeleton import loaded, read_ahead
from secateur.models.stream import Stream, default_batch_size, states_folder
from secateur.names import unique

Progress = Callable[[str, int, int], None]


@contextmanager
def after_the_last_block(
    opened: OpenedModel,
    windows: Windows,
    *,
    batch_size: int | None = None,
    offload_states: str = "auto",
    progress: Progress = lambda stage, done, total: None,
) -> Iterator[Stream]:
    """The stream of all windows behind the last block, ready for the model's head; its states go at the end."""
    skeleton = opened.skeleton
    skeleton.load_outside()
    needed = windows.input_ids.numel() * skeleton.hidden_size * skeleton.dtype.itemsize
    stream = Stream(
        skeleton,
        windows.input_ids,
        batch_size=batch_size or default_batch_size(windows.length, skeleton.device),
        states_folder=states_folder(offload_states, needed, Path.cwd() / unique("secateur.states")),
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
