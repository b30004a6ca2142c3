"""Gradient statistics on disk: one safetensors file, and the proof of which model and which tokens they are of."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core.gradients import GradientKind, GradientNorm, Norm
from secateur.errors import CalibrationError, CheckpointError
from secateur.models.checkpoint import TensorRecord, read_header, read_tensor
from secateur.models.writer import CheckpointWriter, writing

FORMAT = 1
REVISION = 1  # of how gradients are taken; raise it when the same model and tokens give others
_KEY = "secateur_gradients"


class GradientFile:
    """A finished file of gradient statistics, read matrix by matrix.

    `provenance` holds norms, granularity, scope, samples, length, the digest of the tokens, where they came from, and
    the sha256 of every checkpoint tensor whose gradients these are.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises `CheckpointError` for a file that is missing, damaged, or something else."""
        self.path = Path(path).expanduser()
        header = read_header(self.path)
        self._records = header.tensors
        try:
            self.provenance: dict[str, Any] = json.loads(header.metadata[_KEY])
            version = self.provenance["format"]
        except (KeyError, ValueError, TypeError):
            raise CheckpointError(
                f"{self.path}: holds no gradients. Make such a file with secateur gradients MODEL -o FILE."
            ) from None
        if version != FORMAT:
            raise CheckpointError(f"{self.path}: format {version}, expected {FORMAT}; another version wrote it.")
        if self.provenance.get("revision") != REVISION:
            raise CheckpointError(
                f"{self.path}: its gradients were taken in another way (revision {self.provenance.get('revision')}, "
                f"expected {REVISION}). Remove the file, and take them anew."
            )

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices whose gradients it holds."""
        return list(dict.fromkeys(name.partition(":")[2] for name in self._records))

    def check_kind(self, kind: GradientKind) -> None:
        """Raise `CalibrationError` unless the file holds gradients of this kind."""
        held = self.provenance
        for option, found, expected in (
            ("norm", held["norms"], kind.norm),
            ("granularity", [held["granularity"]], kind.granularity),
            ("scope", [held["scope"]], kind.scope),
        ):
            if expected not in found:
                raise CalibrationError(
                    f"{self.path}: holds gradients with {option} {', '.join(found)}, and the method needs {expected}. "
                    f"Make another file with secateur gradients --{option} {expected}."
                )

    def check_tokens(self, digest: str, samples: int, length: int) -> None:
        """Raise `CalibrationError` unless the gradients were taken on the tokens with this digest."""
        held = self.provenance
        if held["tokens_digest"] != digest:
            raise CalibrationError(
                f"{self.path}: its gradients are of other tokens: {held['samples']} samples of {held['length']} with "
                f"digest {held['tokens_digest'][:12]}, expected {samples} of {length} with {digest[:12]}. Use the same "
                "--calibration, --samples, --length, --seed and --sampling for both, or make another file."
            )

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `CheckpointError` unless every one of these matrices is in the file, in its shape."""
        norm = self.provenance["norms"][0]
        for name, shape in shapes.items():
            record = self._records.get(f"{norm}:{name}")
            if record is None:
                raise CheckpointError(
                    f"{self.path}: holds no gradient of {name}. It belongs to another model "
                    f"({self.provenance['model'].get('path')}), or was made with --only or --skip."
                )
            if record.shape != shape:
                raise CheckpointError(
                    f"{self.path}: its gradient of {name} is of shape {record.shape}, expected {shape}. "
                    "It belongs to another model."
                )

    def check_tensor(self, name: str, digest: str) -> None:
        """Raise `CheckpointError` unless the gradients are of the checkpoint tensor with this sha256."""
        held = self.provenance["source_tensors"].get(name)
        if held != digest:
            raise CheckpointError(
                f"{self.path}: belongs to another model ({self.provenance['model'].get('path')}): {name} had the "
                f"digest {str(held)[:12]} there, expected {digest[:12]}. Make a file for this model."
            )

    def read(self, matrix: str, kind: GradientKind, device: torch.device | str = "cpu") -> GradientNorm:
        """The statistic of one matrix, on the device."""
        total = read_tensor(self._records[f"{kind.norm}:{matrix}"]).to(device)
        samples = int(self.provenance["samples"])
        return GradientNorm(kind, total, samples * int(self.provenance["length"]), samples)


class GradientWriter:
    """A file of gradient statistics in the making, under another name until it is complete.

    Its space is reserved at once. A matrix that is added again is added up, which is how parts of the samples make
    the whole.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, int]],
        norms: Sequence[Norm],
        provenance: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.path = path
        self._partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        entries = [(f"{norm}:{name}", dtype, shape) for name, shape in shapes.items() for norm in norms]
        metadata = {_KEY: json.dumps({"format": FORMAT, "revision": REVISION, **provenance})}
        self._made = [folder for folder in path.parents if not folder.exists()]  # innermost first
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._writer = CheckpointWriter(path.parent, [(self._partial.name, entries)], metadata)
        except BaseException:
            self._remove()
            raise
        self._records: Mapping[str, TensorRecord] = read_header(self._partial).tensors

    def add(self, matrix: str, norm: Norm, total: Tensor) -> None:
        """Add what was seen of a matrix."""
        name = f"{norm}:{matrix}"
        if name in self._writer.digests:
            total = total.cpu() + read_tensor(self._records[name])
        self._writer.write(name, total)

    def read(self, matrix: str, norm: Norm) -> Tensor:
        """What has been added of a matrix so far."""
        return read_tensor(self._records[f"{norm}:{matrix}"])

    def commit(self) -> None:
        """Give the finished file its name."""
        self._writer.close()
        with writing(self.path):
            self._partial.replace(self.path)

    def abandon(self) -> None:
        """Remove what was written so far; harmless after `commit`."""
        self._writer.abandon()
        if self._partial.exists():
            self._remove()

    def _remove(self) -> None:
        self._partial.unlink(missing_ok=True)
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()


def model_digest(source_tensors: Mapping[str, str]) -> str:
    """One sha256 over the names and digests of a model's tensors."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(source_tensors.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
