"""How sparse a checkpoint is, and in which pattern: measured on its weights, whoever pruned it."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from secateur.arguments import calling
from secateur.files.packed import PackedCheckpoint
from secateur.models.opening.opened import OpenedModel, open_model
from secateur.models.shape.matrices import Matrix
from secateur.models.shape.skeleton import Source
from secateur.shown import Shown, counted

# Patterns worth a name, the strictest first.
KNOWN_PATTERNS = ((1, 4), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32))


@dataclass(frozen=True)
class MatrixSparsity:
    """One matrix: its zeros, and the pattern that they were found to obey."""

    name: str
    block: int
    kind: str
    shape: tuple[int, int]
    zeros: int
    pattern: str

    @property
    def weights(self) -> int:
        """Number of entries."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / max(self.weights, 1)


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """Every prunable matrix of a model, with its sparsity, and how much of the checkpoint is packed."""

    model: str
    matrices: list[MatrixSparsity]
    packed: dict[str, Any] | None = None  # tensors, bytes, plain_bytes, compressed, values; None where it is not

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all prunable matrices."""
        return sum(m.zeros for m in self.matrices) / max(sum(m.weights for m in self.matrices), 1)

    def grouped(self, key: str) -> dict[Any, list[MatrixSparsity]]:
        """The matrices grouped by one of their fields, such as "kind" or "block", in order."""
        groups: dict[Any, list[MatrixSparsity]] = {}
        for matrix in self.matrices:
            groups.setdefault(getattr(matrix, key), []).append(matrix)
        return groups

    def to_json(self) -> dict[str, Any]:
        """All matrices, and the sparsity overall."""
        rows = [{**asdict(matrix), "sparsity": matrix.sparsity} for matrix in self.matrices]
        packed = {} if self.packed is None else {"packed": self.packed}
        return {"model": self.model, "sparsity": self.sparsity, **packed, "matrices": rows}


@calling
def inspect(
    model: str | os.PathLike[str] | nn.Module | OpenedModel,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | bool | None = None,
) -> Inspection:
    """The sparsity and the detected pattern of every prunable matrix, read block by block."""
    opened = open_model(model, device="cpu", revision=revision, trust_remote_code=trust_remote_code)
    skeleton = opened.skeleton
    rows = []
    with counted(progress, "reading") as tell:
        for block in skeleton.blocks:
            matrices = [matrix for matrix in skeleton.matrices if matrix.block == block.index]
            tensors = skeleton.source.read(sorted({matrix.tensor for matrix in matrices}))
            rows += [_measure(matrix, matrix.view(tensors)) for matrix in matrices]
            tell(block.index + 1, len(skeleton.blocks))
    return Inspection(str(opened.origin.get("path")), rows, _packed(skeleton.source))


def _packed(source: Source) -> dict[str, Any] | None:
    checkpoint = getattr(source, "checkpoint", source)  # the one below, of one that is dequantised
    if not isinstance(checkpoint, PackedCheckpoint):
        return None
    return {
        "tensors": len(checkpoint.record.matrices),
        "bytes": checkpoint.packed_bytes,
        "plain_bytes": checkpoint.plain_bytes,
        "compressed": checkpoint.compressed,
        "values": checkpoint.record.values,
    }


def _measure(matrix: Matrix, weight: Tensor) -> MatrixSparsity:
    kept = weight != 0
    zeros = kept.numel() - int(kept.sum())
    return MatrixSparsity(matrix.name, matrix.block, matrix.kind, matrix.shape, zeros, detect_pattern(kept))


def detect_pattern(kept: Tensor) -> str:
    """The pattern that a mask obeys, in words: an N:M that holds everywhere, equal rows, unstructured, or dense."""
    rows, width = kept.shape
    zeros = kept.numel() - int(kept.sum())
    if zeros == 0:
        return "dense"
    if zeros == kept.numel():
        return "all zero"
    for n, m in KNOWN_PATTERNS:
        if width % m == 0 and int(kept.view(rows, -1, m).sum(dim=2).max()) <= n:
            return f"{n}:{m}"
    per_row = kept.sum(dim=1)
    if rows > 1 and int(per_row.max()) == int(per_row.min()):
        return "unstructured, equal rows"
    return "unstructured"
