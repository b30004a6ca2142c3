"""`verify`: the proof that a checkpoint is what its manifest says, from the files alone."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.arguments import calling
from secateur.core.patterns import pattern_from_json
from secateur.errors import CheckpointError
from secateur.files.checkpoint import INDEX_FILE, Checkpoint, file_digest, tensor_digest
from secateur.files.packed import PackedCheckpoint, is_packed
from secateur.models.opening.opened import open_source
from secateur.models.shape.skeleton import Source
from secateur.record.manifest import (
    Manifest,
    harmless,
    mask_digest,
    paths_below,
    read_manifest,
    unlisted_files,
    view_of,
)
from secateur.record.packed import file_problems, has_manifest, readable, tensor_problems
from secateur.record.reordered import orders_of, reordered
from secateur.shown import Shown, counted

# Methods that only choose which weights stay, by the names under which manifests record them.
CHOOSING = frozenset(
    ("magnitude", "wanda", "wanda_variant", "ria", "gblm", "gblm_inverse", "gradient", "wanda_plus", "pruner_zero")
)


@dataclass(repr=False)
class Verification(Shown):
    """The result of `verify`: what was checked, and every problem found."""

    folder: Path
    tensors: int = 0
    matrices: int = 0
    zeros: int = 0
    weights: int = 0
    packed: int = 0  # tensors whose stored bytes, and the bytes that they stand for, were hashed
    reordered: int = 0  # tensors that were compared with the source's in the recorded order of rows and columns
    changed: int = 0  # matrices whose kept weights are not the source's, as the manifest says
    compared_to: str | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the manifest does not promise

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the planned weights, counted in the files."""
        return self.zeros / max(self.weights, 1)


@calling
def verify(
    folder: str | os.PathLike[str],
    source: Source | str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> Verification:
    """Proof from the files alone that a checkpoint is what its manifest says.

    Hashes every byte of every shard and every other file but the model card, and checks every planned matrix against
    its pattern. With `source` (a folder, hub id or GGUF file), every tensor outside the plan must be byte-identical to
    the source's; for methods that only select, so must every kept weight, and every removed weight must be +0.0.
    Weights that were trained after pruning are exempt from that, but their zeros must lie where they lay before;
    `source` may then be the dense model or the pruned one that was trained.

    Of a packed checkpoint, the bytes that are stored and those that they stand for are also compared with what its
    sparse_config.json says of them; one without a manifest is compared with that file alone.

    Raises `CheckpointError` when there is nothing to verify: no manifest, or shards that cannot be read.
    """
    path = Path(folder)
    if isinstance(source, str | os.PathLike):
        source = open_source(os.fspath(source))
    result = Verification(path)
    packed = PackedCheckpoint(path) if is_packed(path) else None
    check = None if packed and source is None and not has_manifest(path) else _Check(read_manifest(path), result)
    checkpoint = packed or Checkpoint(path)
    if packed is not None:
        result.problems += file_problems(packed)
        result.packed = len(packed.record.matrices)
    if check is not None:
        check.names(path, checkpoint)
    source_names = set(source.names) if source is not None else set()
    if source is not None and check is not None:
        result.compared_to = str(getattr(source, "folder", None) or check.manifest.source.get("path"))
        for name in sorted(source_names ^ set(checkpoint.names)):
            where = "the source" if name in checkpoint.tensors else "the pruned checkpoint"
            result.problems.append(f"{name}: absent from {where}")
    with counted(progress, "verifying") as tell:
        for number, name in enumerate(checkpoint.names):
            tensor = checkpoint.read([name])[name] if packed is None else readable(packed, name)
            if isinstance(tensor, str):
                result.problems.append(tensor)
                continue
            if packed is not None:
                result.problems += tensor_problems(packed, name, tensor)
            result.tensors += 1
            if check is not None:
                check.written(name, tensor)
            if source is not None and check is not None and name in source_names:
                check.against(name, tensor, source.read([name])[name])
            tell(number + 1, len(checkpoint.names))
    if result.reordered:
        result.notes.append(
            f"{result.reordered} tensors were compared with the source's in the order of rows and columns that the "
            "manifest records, each of them a permutation. That the model computes the same in any such order, only "
            "the run has checked."
        )
    if result.changed:
        assert check is not None
        result.notes.append(
            f"Kept weights of {result.changed} of {len(check.manifest.matrices)} matrices differ from the source: the "
            f"manifest says that {check.manifest.method} changed them. What they should be, only its digests say."
        )
    return result


class _Check:
    """One verification: the manifest by tensor, and the result to which problems are added."""

    def __init__(self, manifest: Manifest, result: Verification) -> None:
        self.manifest, self.result = manifest, result
        recovery = manifest.recovery or {}
        self._masks: dict[str, str] = recovery.get("masks", {})  # digests of those that training had to keep
        self._trained = manifest.trained
        self._planned: dict[str, list[dict[str, Any]]] = {}
        for name, entry in manifest.matrices.items():
            self._planned.setdefault(entry["tensor"], []).append({"name": name, **entry})
        if lost := recovery.get("unmasked"):
            before, after, weights = (
                sum(entry[key] for entry in lost.values()) for key in ("zeros_before", "zeros", "weights")
            )
            result.notes.append(
                f"{len(lost)} matrices were merged with an adapter without their masks: no pattern is promised for "
                f"them. Their sparsity was {before / weights:.4f} and is {after / weights:.4f}."
            )

    def _problem(self, text: str) -> None:
        self.result.problems.append(text)

    def names(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Headers of shards, names of tensors and matrices, and every other file."""
        packed = isinstance(checkpoint, PackedCheckpoint)  # whose files are not the plain ones, and are proved apart
        for name, digest in {} if packed else self.manifest.headers.items():
            header = checkpoint.headers.get(folder / name)
            if header is None:
                self._problem(f"{name}: the shard is missing")
            elif header.digest != digest:
                self._problem(f"{name}: its header differs from the one that was written")
        for name in sorted(set(self.manifest.tensors) - set(checkpoint.tensors)):
            self._problem(f"{name}: the tensor is missing")
        there = set(paths_below(folder))
        for name, digest in self.manifest.files.items():
            if packed and name == INDEX_FILE:
                continue
            if name not in there or not (folder / name).is_file():
                self._problem(f"{name}: the file is missing")
            elif file_digest(folder / name) != digest:
                self._problem(f"{name}: the file differs from the one that was written")
        for name in () if packed else unlisted_files(folder, self.manifest):
            if name.endswith(".safetensors"):
                self._problem(f"{name}: a shard that was not written by the run")
            elif name == INDEX_FILE:
                self._problem(f"{name}: an index that was not written by the run")
            elif not harmless(name):
                self._problem(f"{name}: not written by the run, and it may change what is loaded; move it away")
        for name in self.manifest.plan:
            if name not in self.manifest.matrices:
                self._problem(f"{name}: planned, but the manifest has no record of pruning it")

    def written(self, name: str, tensor: Tensor) -> None:
        """The bytes of a tensor, and the patterns of its matrices."""
        if self.manifest.tensors.get(name) != tensor_digest(tensor):
            self._problem(f"{name}: its bytes differ from those that were written")
        for entry in self._planned.get(name, ()):
            self._pattern(tensor, entry)

    def _pattern(self, tensor: Tensor, entry: Mapping[str, Any]) -> None:
        name, result = entry["name"], self.result
        if not _fits(tensor, entry):
            place = "" if entry["index"] is None else f" at {entry['index']}"
            self._problem(f"{name}: of shape {list(tensor.shape)}, the manifest records {entry['shape']}{place}")
            return
        kept = view_of(tensor, entry) != 0
        zeros = kept.numel() - int(kept.sum())
        result.matrices += 1
        result.zeros += zeros
        result.weights += kept.numel()
        violation = pattern_from_json(entry["pattern"]).violation(kept)
        if violation is not None:
            self._problem(f"{name}: {violation}")
        if zeros != entry["zeros"]:
            self._problem(f"{name}: {zeros} zeros, the manifest records {entry['zeros']}")
        if name in self._masks and self._masks[name] != mask_digest(kept):
            self._problem(f"{name}: its zeros are not where they were before training")

    def against(self, name: str, tensor: Tensor, original: Tensor) -> None:
        """A tensor beside the one that the source has by its name."""
        if tensor.shape != original.shape or tensor.dtype != original.dtype:
            self._problem(
                f"{name}: {tuple(tensor.shape)} {tensor.dtype}, the source has {tuple(original.shape)} {original.dtype}"
            )
            return
        if name in self._trained:
            self._against_before_training(name, tensor, original)
            return
        try:
            orders = orders_of(self.manifest.reordered, name, original.shape)
        except CheckpointError as error:
            self._problem(str(error))
            return
        moved = reordered(original, orders) if orders else original
        if name in self._planned:
            self._against_dense(name, tensor, original, moved)
        elif not torch.equal(_bits(tensor), _bits(moved)):
            order = " in the recorded order" if orders else ""
            self._problem(f"{name}: not planned, yet its bytes differ from the source{order}")
        self.result.reordered += bool(orders)

    def _against_dense(self, name: str, tensor: Tensor, original: Tensor, moved: Tensor) -> None:
        """A planned tensor beside the source's, and beside that with its rows and columns `moved` as recorded."""
        manifest, planned = self.manifest, self._planned[name]
        # A checkpoint that was trained elsewhere only has this tensor from the pruned one, which is a source as well.
        held = manifest.tensors.get(name) if "base" in (manifest.recovery or {}) else None
        known = {manifest.source_tensors.get(name), held} - {None}
        if known and tensor_digest(original) not in known:
            self._problem(f"{name}: the source is not the one that was pruned; its bytes differ from the record")
        experts = {entry["index"] for entry in planned} - {None}
        for expert in set(range(len(tensor))) - experts if experts and tensor.dim() == 3 else ():
            if not torch.equal(_bits(tensor[expert]), _bits(moved[expert])):
                self._problem(f"{name}.{expert}: not planned, yet its bytes differ from the source")
        for entry in planned:
            if not _fits(tensor, entry):
                continue  # `_pattern` has named its shape
            pruned, dense = _bits(view_of(tensor, entry)), _bits(view_of(moved, entry))
            if bool(((pruned == dense) | (pruned == 0)).all()):
                continue
            # The record alone is not believed: a method that only chooses leaves what it keeps as it was.
            if entry["kept_identical"] or only_chooses(manifest.method):
                self._problem(f"{entry['name']}: a kept weight is not bit-identical to the source, or a zero is -0.0")
            else:
                self.result.changed += 1

    def _against_before_training(self, name: str, tensor: Tensor, original: Tensor) -> None:
        """The source must be a model that the tensor came from, and no weight that was zero there may have changed."""
        before, digest = self._trained[name], tensor_digest(original)
        if digest not in (*before, self.manifest.source_tensors.get(name), self.manifest.tensors.get(name)):
            self._problem(
                f"{name}: the source is neither the dense model nor the pruned one; its bytes differ from the records"
            )
        elif digest == before[0]:
            kept = (entry for entry in self._planned.get(name, ()) if entry["name"] in self._masks)
            for entry in (entry for entry in kept if _fits(tensor, entry)):
                if bool(_bits(view_of(tensor, entry))[view_of(original, entry) == 0].any()):
                    self._problem(f"{entry['name']}: a weight that was zero before training is not +0.0")


def _fits(tensor: Tensor, entry: Mapping[str, Any]) -> bool:
    """Whether a tensor holds the matrix of an entry: one of its shape, at its index where there are several."""
    index = entry["index"]
    dimensions = (2, 3, 4) if index is None else (3,)
    if tensor.dim() not in dimensions or (index is not None and index >= len(tensor)):
        return False
    return bool(list(view_of(tensor, entry).shape) == entry["shape"])


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that -0.0 and NaN compare by their bits."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.contiguous().view(integer)


def only_chooses(method: str) -> bool:
    """Whether a method of ours, or a chain such as "wanda+swaps", leaves every weight that it keeps as it was.

    Methods of others are not known, and count as those that change weights. Swaps put dense weights back.
    """
    parts = method.split("+")
    if "swaps" in parts:
        parts = parts[len(parts) - parts[::-1].index("swaps") :]
    return all(part in CHOOSING for part in parts)
