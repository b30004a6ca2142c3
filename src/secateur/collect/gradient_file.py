"""Gradient statistics on disk: one safetensors file, and the proof of which model and which tokens they are of."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import torch
from msgspec import Meta
from torch import Tensor

from secateur.core.choices import Norm
from secateur.core.gradients import GradientKind, GradientNorm
from secateur.errors import CalibrationError, CheckpointError
from secateur.files.checkpoint import read_header, read_tensor, tensor_digest
from secateur.files.reading import checked, parse_json
from secateur.files.redaction import redacted
from secateur.files.writer import CheckpointWriter

FORMAT = 2
REVISION = 2  # of how gradients are taken; raise it when the same model and tokens lead to others
_KEY = "secateur_gradients"
_DIGESTS = "secateur_digests"
_PLACE = "0" * 64  # of a digest that is not known yet
_ANEW = "Make a new file with secateur gradients."


class ModelOrigin(TypedDict):
    """The model whose gradients they are."""

    path: NotRequired[str | None]


class Provenance(TypedDict):
    """What is known of the gradients in a file."""

    format: int
    norms: Annotated[list[str], Meta(min_length=1)]
    granularity: str
    scope: str
    samples: Annotated[int, Meta(ge=1)]
    length: Annotated[int, Meta(ge=1)]
    tokens_digest: str
    calibration: dict[str, Any]
    model: ModelOrigin
    source_tensors: dict[str, str]
    digest: str  # of everything else here, and of the digests of the numbers


@dataclass(frozen=True)
class _Head:
    format: int


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
        if not isinstance(header.metadata, Mapping) or not isinstance(header.metadata.get(_KEY), str):
            raise CheckpointError(
                f"{self.path}: holds no gradients. Make such a file with secateur gradients MODEL -o FILE."
            )
        found = parse_json(header.metadata[_KEY], self.path, dict[str, Any], advice=_ANEW)
        version = checked(found, self.path, _Head, advice=_ANEW).format
        if version != FORMAT:
            raise CheckpointError(
                f"{self.path}: format {version}, expected {FORMAT}; another version of Secateur wrote it. {_ANEW}"
            )
        checked(found, self.path, Provenance, advice=_ANEW)
        text = str(header.metadata.get(_DIGESTS, ""))
        self._digests: dict[str, str] = parse_json(text, self.path, dict[str, str], advice=_ANEW)
        held = found.pop("digest")
        if held != _digest(found, self._digests) or set(self._digests) != set(self._records):
            raise CheckpointError(f"{self.path}: its header was altered since it was written. {_ANEW}")
        self.provenance: dict[str, Any] = found
        self.digest: str = held  # of all that it holds
        if found.get("revision") != REVISION:
            raise CheckpointError(
                f"{self.path}: its gradients were taken in another way (revision {found.get('revision')}, "
                f"expected {REVISION}). Remove the file, and take them again."
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
                "--calibration, --samples, --length, --seed, --sampling and --bos for both, or make another file."
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
        """The statistic of one matrix, on the device. Raises `CheckpointError` when it is not what was written."""
        name = f"{kind.norm}:{matrix}"
        held = read_tensor(self._records[name])
        found = tensor_digest(held)
        if found != self._digests[name]:
            raise CheckpointError(
                f"{self.path}: the gradients {name} have changed since they were written: digest {found[:12]}, "
                f"expected {self._digests[name][:12]}. {_ANEW}"
            )
        samples = self.provenance["samples"]
        # Fewer than samples times length where samples differ in length.
        tokens = self.provenance.get("tokens", samples * self.provenance["length"])
        return GradientNorm(kind, held.to(device), tokens, samples)


class GradientWriter:
    """A file of gradient statistics in the making, whose space is reserved at once."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, int]],
        norms: Sequence[Norm],
        provenance: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        *,
        found: Mapping[str, str] | None = None,
    ) -> None:
        """With `found`, the file of an earlier process, which holds matrices with these sha256, by "norm:matrix"."""
        self.path = path
        entries = [(f"{norm}:{name}", dtype, shape) for name, shape in shapes.items() for norm in norms]
        self._provenance = redacted({"format": FORMAT, "revision": REVISION, **provenance})
        self._names = [name for name, _, _ in entries]
        metadata = self._metadata(dict.fromkeys(self._names, _PLACE))
        # An earlier process that had added everything may have ended while it wrote the last header.
        closing = found is not None and set(found) == set(self._names)
        layout = [(path.name, entries)]
        self._writer = CheckpointWriter(path.parent, layout, metadata, found=found, found_head=not closing)

    def add(self, matrices: Mapping[tuple[str, Norm], Tensor]) -> dict[str, str]:
        """Write the sums of some matrices; they are on the disk when this returns, with their sha256."""
        names = {key: f"{key[1]}:{key[0]}" for key in matrices}
        for key, total in matrices.items():
            self._writer.write(names[key], total)
        self._writer.flush()
        return {name: self._writer.digests[name] for name in names.values()}

    def read(self, matrix: str, norm: Norm) -> Tensor:
        """Sums as they were written. Raises `CheckpointError` where they are others now."""
        name = f"{norm}:{matrix}"
        return self._writer.read([name])[name]

    def _metadata(self, digests: Mapping[str, str]) -> dict[str, str]:
        digest = _digest(self._provenance, digests)
        return {_KEY: json.dumps({**self._provenance, "digest": digest}), _DIGESTS: json.dumps(digests)}

    def close(self) -> None:
        """Bring all of it to the disk, with a digest of every tensor: the file is complete."""
        digests = self._writer.digests
        self._writer.change_metadata(self._metadata({name: digests.get(name, _PLACE) for name in self._names}))
        self._writer.close()

    def abandon(self) -> None:
        """Let go of the file; harmless after `close`."""
        self._writer.abandon()


def _digest(provenance: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """sha256 of the provenance and of the digests of all numbers."""
    return hashlib.sha256(json.dumps([provenance, digests], sort_keys=True).encode()).hexdigest()


def model_digest(source_tensors: Mapping[str, str]) -> str:
    """One sha256 over the names and digests of a model's tensors."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(source_tensors.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
