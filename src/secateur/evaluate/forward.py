"""A whole forward of a model over windows of tokens, in the memory of one block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.calibration import Windows
from secateur.files.names import unique
from secateur.models.flow import forward
from secateur.models.flow.stream import Stream, default_batch_size, states_folder
from secateur.models.opening.opened import OpenedModel

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
    needed = windows.tokens * skeleton.hidden_size * skeleton.dtype.itemsize
    with forward.after_the_last_block(
        skeleton,
        windows.batches(batch_size or default_batch_size(windows.length, skeleton.device)),
        states_folder=states_folder(offload_states, needed, Path.cwd() / unique("secateur.states")),
        progress=progress,
    ) as stream:
        yield stream
