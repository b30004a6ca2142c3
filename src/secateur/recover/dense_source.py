"""The dense model that a pruned checkpoint was made from, with every tensor checked."""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from secateur.errors import CheckpointError
from secateur.files.checkpoint import tensor_digest
from secateur.models.opening.opened import open_model, open_source
from secateur.models.shape.skeleton import Skeleton, Source
from secateur.record.manifest import Manifest

ADVICE = "Give the dense model that was pruned (--dense)."


class DenseSource:
    """The tensors of the dense model, each checked to be the one that the pruned checkpoint was made from."""

    def __init__(self, folder: Path, manifest: Manifest, dense: str | os.PathLike[str] | None) -> None:
        """`folder` and `manifest` are those of the pruned checkpoint. Raises `CheckpointError`."""
        origin = manifest.source
        self.folder, self._manifest = folder, manifest
        if dense is None and not origin.get("path"):
            raise CheckpointError(
                f"{folder}: was pruned from a module in memory, so that its manifest names no dense model. Give a "
                "checkpoint of it (--dense)."
            )
        self.path = os.fspath(dense) if dense is not None else str(origin["path"])
        try:
            self.source: Source = (
                # Exact: dequantised to the dtype that pruning saw.
                open_model(self.path, device="cpu", dtype=manifest.settings["dtype"]).skeleton.source
                if self.path.endswith(".gguf")
                else open_source(self.path, origin.get("revision") if dense is None else None)
            )
        except CheckpointError as error:
            if dense is not None:
                raise
            raise CheckpointError(
                f"{error} The manifest of {folder} names it as the dense model; if it has moved, say where (--dense)."
            ) from None

    def check(self, skeleton: Skeleton) -> None:
        """Raise `CheckpointError` for other names, shapes or dtypes, and for other tensors outside the blocks.

        The two models share these: the dense blocks run on the pruned checkpoint's embeddings.
        """
        there = set(self.source.names)
        for name in skeleton.source.names:
            if name not in there:
                raise CheckpointError(f"{self.path}: has no tensor {name}, which {self.folder} has. {ADVICE}")
            found = (self.source.shape(name), self.source.dtype(name))
            expected = (skeleton.source.shape(name), skeleton.source.dtype(name))
            if found != expected:
                raise CheckpointError(
                    f"{self.path}: {name} is {found[0]} {found[1]}, and {self.folder} has {expected[0]} {expected[1]}. "
                    f"{ADVICE}"
                )
        for name in skeleton.outside_tensors:
            self.read([name])

    def read(self, names: Sequence[str], *, pin: bool = False) -> dict[str, Tensor]:
        """The named tensors. Raises `CheckpointError` for one that is not what was pruned."""
        tensors = self.source.read(names, pin=pin)
        for name, tensor in tensors.items():
            expected = self._manifest.source_tensors.get(name) or self._manifest.tensors.get(name, "none")
            found = tensor_digest(tensor)
            if found != expected:
                raise CheckpointError(
                    f"{self.path}: {name} is not what {self.folder} was made from (sha256 {found[:12]}, expected "
                    f"{expected[:12]}). {ADVICE}"
                )
        return tensors
