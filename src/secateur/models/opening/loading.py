"""Whether an output loads: would every parameter that transformers expects get a tensor of the right shape?"""

from pathlib import Path

import torch

from secateur.errors import CheckpointError
from secateur.files.checkpoint import Checkpoint
from secateur.models.opening.opened import OpenedModel
from secateur.models.shape.skeleton import Skeleton


def check_loads(opened: OpenedModel, folder: Path) -> None:
    """Raise `CheckpointError` that names parameters and tensors which do not belong together in a written checkpoint.

    Reads configuration and headers, no weights. Tensors that are unused in the source too are accepted (some files hold
    parts that transformers ignores), and so are buffers for which the source has no tensor either.
    """
    model = opened.expected(folder)
    written = Checkpoint(folder)
    try:
        skeleton = Skeleton(model, written, device=torch.device("cpu"), dtype=torch.float32)
    except (RuntimeError, IndexError) as error:  # shapes that transformers' own conversion cannot join
        raise CheckpointError(f"What was written would not load as {type(model).__name__}: {error}") from None
    unused = sorted(set(skeleton.conversion.unused) - set(opened.skeleton.conversion.unused))
    missing = skeleton.missing + sorted(_buffers_without(skeleton) - _buffers_without(opened.skeleton))
    if missing or unused:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("parameters would get no tensor", missing), ("tensors have no parameter", unused))
            if names
        ]
        raise CheckpointError(
            f"What was written would not load as {type(model).__name__}: {'; '.join(parts)}. Is the model wrapped, or "
            "its configuration that of another model? Give the plain model, or its folder."
        )
    skeleton.check_complete()


def _buffers_without(skeleton: Skeleton) -> set[str]:
    """Names of buffers that a checkpoint should hold and that no tensor of this one makes."""
    persistent = set(skeleton.model.state_dict()) - {name for name, _ in skeleton.model.named_parameters()}
    buffers = {name for name, _ in skeleton.model.named_buffers()} & persistent
    return {name for name in buffers if not skeleton.conversion.making([name])}
