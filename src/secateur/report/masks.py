"""Every planned matrix of a pruned checkpoint, measured in its files: picture, structure, distribution of values."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.core.histogram import histogram
from secateur.errors import CheckpointError
from secateur.files.packed import open_files
from secateur.record.manifest import Manifest, view_of
from secateur.report.pictures import Picture, draw_within
from secateur.report.structure import Structure, columns, pooled, rows

PICTURES = 600  # of more matrices than this, evenly chosen ones have a picture
ALL_PICTURES = 3_800_000  # characters that all pictures together may take on a page
ONE_PICTURE = 24_000


@dataclass(frozen=True)
class MaskReport:
    """One matrix. `values` is a histogram of its scores or, where the run recorded none, of its kept weights.

    `label` is short for its kind.
    """

    name: str
    kind: str
    label: str
    block: int
    shape: tuple[int, int]
    zeros: int
    recorded_zeros: int
    columns: Structure
    rows: Structure
    scored: bool
    values: Mapping[str, Any]
    picture: Picture | None
    reconstruction_error: float | None

    @property
    def weights(self) -> int:
        """Number of entries."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.weights

    @property
    def own_label(self) -> str:
        """Short for its name within its block."""
        return ".".join(self.name.removesuffix(".weight").split(".")[-1 - self.label.count(".") :])


def read_masks(
    folder: Path, manifest: Manifest, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[MaskReport]:
    """All planned matrices in the order of the manifest, read from the checkpoint one tensor at a time.

    A weight that is zero counts as removed, also where the dense model had a zero already. Raises `CheckpointError`
    when there is no matrix, or the shards cannot be read.
    """
    if not manifest.matrices:
        raise CheckpointError(
            f"{folder}: no pruned matrix is left to report on: training filled the zeros of all of them. "
            f"See what there is with: secateur inspect {shlex.quote(str(folder))}"
        )
    checkpoint = open_files(folder)
    pictured = chosen(manifest)
    most = min(ONE_PICTURE, ALL_PICTURES // len(pictured))
    labels = short_kinds(list(dict.fromkeys(str(entry["kind"]) for entry in manifest.matrices.values())))
    holders: dict[str, list[str]] = {}
    for name, entry in manifest.matrices.items():
        holders.setdefault(entry["tensor"], []).append(name)
    found = {}
    for number, (tensor, names) in enumerate(holders.items()):
        value = checkpoint.read([tensor])[tensor]
        for name in names:
            entry = manifest.matrices[name]
            weight, size = view_of(value, entry), most if name in pictured else None
            found[name] = _measure(name, labels[entry["kind"]], entry, weight, size)
        progress(number + 1, len(holders))
    return [found[name] for name in manifest.matrices]


def chosen(manifest: Manifest) -> set[str]:
    """The matrices that get a picture: all of them, or every k-th of each kind where there are very many."""
    names = sorted(manifest.matrices, key=lambda name: str(manifest.matrices[name]["kind"]))
    return set(names[:: math.ceil(len(names) / PICTURES)])


def _measure(name: str, label: str, entry: Mapping[str, Any], weight: Tensor, size: int | None) -> MaskReport:
    mask = weight != 0
    scores: Mapping[str, Any] | None = entry.get("scores")
    return MaskReport(
        name=name,
        kind=entry["kind"],
        label=label,
        block=entry["block"],
        shape=(weight.shape[0], weight.shape[1]),
        zeros=mask.numel() - int(mask.sum()),
        recorded_zeros=entry["zeros"],
        columns=columns(mask, entry["pattern"].get("m")),
        rows=rows(mask),
        scored=scores is not None,
        values=histogram(weight.abs(), mask) | {"pruned": None} if scores is None else scores,
        picture=None if size is None else draw_within(mask, size),
        reconstruction_error=entry["notes"].get("reconstruction_error"),
    )


@dataclass(frozen=True)
class Group:
    """Several matrices together."""

    label: str
    matrices: Sequence[MaskReport]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all of them."""
        return sum(m.zeros for m in self.matrices) / sum(m.weights for m in self.matrices)

    @property
    def columns(self) -> Structure:
        """Their column structure together."""
        return pooled([m.columns for m in self.matrices])

    @property
    def rows(self) -> Structure:
        """Their row structure together."""
        return pooled([m.rows for m in self.matrices])


def groups(matrices: Sequence[MaskReport], key: Callable[[MaskReport], str]) -> list[Group]:
    """The matrices grouped by a key, in the order in which keys appear."""
    found: dict[str, list[MaskReport]] = {}
    for matrix in matrices:
        found.setdefault(key(matrix), []).append(matrix)
    return [Group(label, members) for label, members in found.items()]


def short_kinds(kinds: Sequence[str]) -> dict[str, str]:
    """Labels for kinds of matrix: `model.layers.*.mlp.up_proj.weight` is `mlp.up_proj` where all begin alike."""
    parts = {kind: kind.removesuffix(".weight").split(".") for kind in kinds}
    shortest = min(map(len, parts.values()))
    if len(parts) == 1:
        common = max(0, shortest - 2)
    else:
        by_place = zip(*parts.values(), strict=False)
        common = min(len(list(takewhile(lambda words: len(set(words)) == 1, by_place))), shortest - 1)
    return {kind: ".".join(p[common:]) for kind, p in parts.items()}
