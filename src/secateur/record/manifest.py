"""What was asked and what happened, as JSON beside the checkpoint, and the proof of it from the files alone."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from secateur.core.patterns import pattern_from_json
from secateur.errors import CheckpointError
from secateur.files.checkpoint import CARD_FILE, INDEX_FILE, Checkpoint, file_digest, tensor_bytes
from secateur.files.reading import checked, parse_json, read_text
from secateur.files.writer import writing
from secateur.models.shape.skeleton import Source
from secateur.record.manifest_schema import check_manifest

FILE_NAME = "secateur.json"
FORMAT = 1

_PROSE_SUFFIXES = (".md", ".rst", ".html", ".pdf", ".csv", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")

# Methods that only choose which weights stay, by the names under which manifests record them.
CHOOSING = frozenset(
    ("magnitude", "wanda", "wanda_variant", "ria", "gblm", "gblm_inverse", "gradient", "wanda_plus", "pruner_zero")
)


@dataclass
class Manifest:
    """The record of one run. Every field is JSON; `write` adds a digest over all of it."""

    versions: dict[str, str]
    method: str
    source: dict[str, Any]
    settings: dict[str, Any]
    plan: dict[str, Any]
    left_out: list[dict[str, Any]] = field(default_factory=list)  # why other tensors were not prunable, by reason
    command: list[str] | None = None
    calibration: dict[str, Any] | None = None
    matrices: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)  # sha256 of every tensor written
    source_tensors: dict[str, str] = field(default_factory=dict)  # sha256 of the source's planned tensors
    headers: dict[str, str] = field(default_factory=dict)  # sha256 of the header of every shard
    files: dict[str, str] = field(default_factory=dict)  # sha256 of every other file
    created: str = ""
    recovery: dict[str, Any] | None = None  # what was done to the kept weights after pruning; absent where nothing was

    def to_json(self) -> dict[str, Any]:
        """A JSON object with a format number and a digest."""
        value: dict[str, Any] = {"format": FORMAT, **vars(self)}
        if self.recovery is None:
            del value["recovery"]
        value["digest"] = _digest(value)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Manifest":
        """The manifest that `to_json` wrote."""
        return cls(**{key: item for key, item in value.items() if key not in ("format", "digest")})

    def write(self, folder: Path) -> None:
        """Write `secateur.json` into the folder. Raises `CheckpointError` when that is not possible."""
        with writing(folder / FILE_NAME):
            (folder / FILE_NAME).write_text(_text(self.to_json()), encoding="utf-8")

    def count_totals(self) -> None:
        """Count the planned weights and zeros of all matrices again."""
        sizes = {name: entry["shape"][0] * entry["shape"][1] for name, entry in self.matrices.items()}
        weights, zeros = sum(sizes.values()), sum(entry["zeros"] for entry in self.matrices.values())
        asked = sum(pattern_from_json(self.plan[name]).sparsity * size for name, size in sizes.items())
        self.totals = {
            "matrices": len(sizes),
            "weights": weights,
            "zeros": zeros,
            "sparsity": zeros / max(weights, 1),
            "asked": asked / max(weights, 1),
        }

    @property
    def digest(self) -> str:
        """The digest that `to_json` adds: it stands for every byte of the checkpoint."""
        return str(self.to_json()["digest"])

    @property
    def trained(self) -> dict[str, list[str]]:
        """For every tensor that was trained after pruning, its sha256 before each time, latest first."""
        result: dict[str, list[str]] = {}
        section = self.recovery
        while section is not None:
            for name, digest in section.get("trained", {}).items():
                result.setdefault(name, []).append(digest)
            section = section.get("earlier")
        return result


def cautions(manifest: Manifest) -> list[str]:
    """What a reader should know of how matrices were solved, in words.

    More damping than was asked for, fewer tokens than inputs, and updates of weights that swaps have undone.
    """
    options, matrices = manifest.settings.get("options", {}), manifest.matrices
    found = []
    for name in ("damping", "least_squares_damping", "obs_update_damping"):
        part = name.removesuffix("damping").rstrip("_")
        asked = options.get(f"{part}.damping" if part else "damping")
        more = {
            matrix: entry["notes"][name]
            for matrix, entry in matrices.items()
            if isinstance(asked, int | float) and entry["notes"].get(name, asked) > asked
        }
        if more:
            worst = max(more, key=lambda matrix: more[matrix])
            found.append(
                f"{len(more)} of {len(matrices)} matrices could not be solved with {name.replace('_', ' ')} {asked:g} "
                f"and took more, up to {more[worst]:g} ({worst}): inputs depend on each other, or tokens are too few."
            )
    few = [name for name, entry in matrices.items() if (entry["tokens"] or math.inf) < entry["shape"][1]]
    if few and "Gram" in manifest.settings.get("statistics", ()):
        worst = min(few, key=lambda matrix: matrices[matrix]["tokens"] / matrices[matrix]["shape"][1])
        found.append(
            f"{len(few)} of {len(matrices)} matrices were solved with fewer tokens than they have inputs, least "
            f"{worst}: {matrices[worst]['tokens']:,} tokens for {matrices[worst]['shape'][1]:,} inputs. What fits "
            "these tokens may fit no others, however small its reconstruction error: calibrate on more (--samples), or "
            "use a method that updates no weights."
        )
    undone = [name for name, entry in matrices.items() if entry["notes"].get("dropped_update")]
    if any(matrices[name]["kept_identical"] for name in undone):
        found.append(
            f"Swaps put the dense weights of {len(undone)} of {len(matrices)} matrices back: of the method before them "
            "the mask was kept and the update was not. End the chain with +least_squares."
        )
    return found


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


def _digest(value: Mapping[str, Any]) -> str:
    plain = {key: item for key, item in value.items() if key != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Head:
    """What has to be known of a manifest before the rest of it is looked at."""

    format: int
    digest: str


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a pruned checkpoint. Raises `CheckpointError` when it is missing, foreign or altered."""
    file = folder / FILE_NAME
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give one that `secateur prune` wrote.")
    if not file.exists():
        raise CheckpointError(f"{folder}: no {FILE_NAME} in it; only checkpoints that Secateur wrote have one.")
    text = read_text(file)
    value = parse_json(text, file, dict[str, Any])
    head = checked(value, file, _Head)
    if head.format != FORMAT:
        raise CheckpointError(f"{file}: format {head.format}, expected {FORMAT}; another version of Secateur wrote it.")
    expected = _digest(value)
    if head.digest != expected:
        raise CheckpointError(
            f"{file}: altered since it was written: digest {expected[:12]}, expected {head.digest[:12]}."
        )
    if text != _text(value):
        # The digest is of the values: 1e-05 and 1E-05, or two spellings of one long decimal, are the same value.
        raise CheckpointError(f"{file}: altered since it was written: the same values, spelled differently.")
    check_manifest(value, file)
    return Manifest.from_json(value)


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file, at any depth, that is neither a shard nor the manifest nor the model card.

    People go on writing the card. Keys are paths relative to the folder, with slashes.
    """
    return {
        name: file_digest(folder / name)
        for name in _paths(folder)
        if (folder / name).is_file() and not name.endswith(".safetensors") and name not in (FILE_NAME, CARD_FILE)
    }


def unlisted_files(folder: Path, manifest: Manifest) -> list[str]:
    """Paths, relative to the folder of a checkpoint, of all files in it that its manifest does not account for.

    It accounts for shards, companion files, the model card and itself. Symbolic links to folders count as files.
    """
    own = {*manifest.files, *manifest.headers, FILE_NAME, CARD_FILE}
    return [name for name in _paths(folder) if name not in own]


def harmless(name: str) -> bool:
    """Whether a file of that name in the folder of a model changes nothing that is loaded from there.

    Prose, pictures and tables, licences, and what git, the hub's client, a desktop and an unfinished report leave.
    """
    first, _, _ = name.partition("/")
    path = PurePosixPath(name)
    return (
        first in (".git", "report.partial")
        or name.startswith(".cache/huggingface/")
        or path.name in (".gitattributes", ".gitignore", ".DS_Store")
        or path.suffix.lower() in _PROSE_SUFFIXES
        or re.fullmatch(r"(LICEN[CS]E|NOTICE|USE_POLICY)[\w-]*(\.txt)?", path.name, re.IGNORECASE) is not None
    )


def _paths(folder: Path) -> list[str]:
    """Everything below a folder that is no folder itself, at any depth."""
    found = []
    for above, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        found += [Path(above, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of the bytes of a tensor."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def source_digest(source: Source, name: str) -> str:
    """sha256 of the bytes of a tensor where it lies, a part at a time."""
    digest = hashlib.sha256()
    for part in source.parts(name):
        digest.update(tensor_bytes(part))
    return digest.hexdigest()


def mask_digest(kept: Tensor) -> str:
    """sha256 of a mask: its shape as text, then one byte for every entry, in rows."""
    digest = hashlib.sha256(str(list(kept.shape)).encode())
    digest.update(tensor_bytes(kept))
    return digest.hexdigest()


@dataclass
class Verification:
    """The result of `verify`: what was checked, and every problem found."""

    folder: Path
    tensors: int = 0
    matrices: int = 0
    zeros: int = 0
    weights: int = 0
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
        """Fraction of zeros among the planned weights, counted on the files."""
        return self.zeros / max(self.weights, 1)


def verify(
    folder: str | os.PathLike[str],
    source: Source | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Proof from the files alone that a checkpoint is what its manifest says.

    Every byte of every shard and companion file but the model card is hashed, and every planned matrix is checked
    against its pattern. With `source`, every tensor outside the plan must be byte-identical to it, and for methods that
    only select, every kept weight bit-identical and every removed one +0.0. Weights that were trained after pruning are
    exempt from that; their zeros must be where they were before. `source` may then be the dense model or the pruned one
    that was trained.

    Raises `CheckpointError` when there is nothing to verify: no manifest, or shards that cannot be read.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    checkpoint = Checkpoint(path)
    result = Verification(path)
    _check_files(path, manifest, checkpoint, result)
    planned: dict[str, list[dict[str, Any]]] = {}
    for name, entry in manifest.matrices.items():
        planned.setdefault(entry["tensor"], []).append({"name": name, **entry})
    for name in manifest.plan:
        if name not in manifest.matrices:
            result.problems.append(f"{name}: planned, but the manifest has no record of pruning it")
    masks, trained = _masks(manifest), manifest.trained
    result.notes += _notes(manifest)
    source_names = set(source.names) if source is not None else set()
    if source is not None:
        result.compared_to = str(getattr(source, "folder", None) or manifest.source.get("path"))
        for name in sorted(source_names ^ set(checkpoint.names)):
            where = "the source" if name in checkpoint.tensors else "the pruned checkpoint"
            result.problems.append(f"{name}: absent from {where}")
    for number, name in enumerate(checkpoint.names):
        tensor = checkpoint.read([name])[name]
        result.tensors += 1
        if manifest.tensors.get(name) != tensor_digest(tensor):
            result.problems.append(f"{name}: its bytes differ from those that were written")
        for entry in planned.get(name, ()):
            _check_pattern(tensor, entry, masks.get(entry["name"]), result)
        if source is not None and name in source_names:
            original = source.read([name])[name]
            if name in trained:
                _check_trained(name, tensor, original, manifest, trained[name], planned.get(name, []), result)
            else:
                _check_source(name, tensor, original, manifest, planned.get(name, []), result)
        if progress is not None:
            progress(number + 1, len(checkpoint.names))
    if result.changed:
        result.notes.append(
            f"Kept weights of {result.changed} of {len(manifest.matrices)} matrices differ from the source: the "
            f"manifest says that {manifest.method} changed them. What they should be, only its digests say."
        )
    return result


def _check_files(folder: Path, manifest: Manifest, checkpoint: Checkpoint, result: Verification) -> None:
    for name, digest in manifest.headers.items():
        header = checkpoint.headers.get(folder / name)
        if header is None:
            result.problems.append(f"{name}: the shard is missing")
        elif header.digest != digest:
            result.problems.append(f"{name}: its header differs from the one that was written")
    for name in sorted(set(manifest.tensors) - set(checkpoint.tensors)):
        result.problems.append(f"{name}: the tensor is missing")
    there = set(_paths(folder))
    for name, digest in manifest.files.items():
        if name not in there or not (folder / name).is_file():
            result.problems.append(f"{name}: the file is missing")
        elif file_digest(folder / name) != digest:
            result.problems.append(f"{name}: the file differs from the one that was written")
    for name in unlisted_files(folder, manifest):
        if name.endswith(".safetensors"):
            result.problems.append(f"{name}: a shard that was not written by the run")
        elif name == INDEX_FILE:
            result.problems.append(f"{name}: an index that was not written by the run")
        elif not harmless(name):
            result.problems.append(f"{name}: not written by the run, and it may change what is loaded; move it away")


def view_of(tensor: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The (out, in) view of a checkpoint tensor that a matrix's entry in the manifest names."""
    view = tensor if entry["index"] is None else tensor[entry["index"]]
    return view.t() if entry["transposed"] else view


def _fits(tensor: Tensor, entry: Mapping[str, Any]) -> bool:
    """Whether a tensor holds the matrix of an entry: one of its shape, at its index where there are several."""
    index = entry["index"]
    if tensor.dim() != (2 if index is None else 3) or (index is not None and index >= len(tensor)):
        return False
    return bool(list(view_of(tensor, entry).shape) == entry["shape"])


def only_chooses(method: str) -> bool:
    """Whether a method of ours, or a chain such as "wanda+swaps", leaves every weight that it keeps as it was.

    Methods of others are not known, and count as those that change weights. Swaps put dense weights back.
    """
    parts = method.split("+")
    if "swaps" in parts:
        parts = parts[len(parts) - parts[::-1].index("swaps") :]
    return all(part in CHOOSING for part in parts)


def _masks(manifest: Manifest) -> dict[str, str]:
    """The digests of the masks that training had to keep."""
    return dict((manifest.recovery or {}).get("masks", {}))


def _notes(manifest: Manifest) -> list[str]:
    """What the manifest does not promise, in words."""
    lost = (manifest.recovery or {}).get("unmasked", {})
    if not lost:
        return []
    before, after, weights = (
        sum(entry[key] for entry in lost.values()) for key in ("zeros_before", "zeros", "weights")
    )
    return [
        f"{len(lost)} matrices were merged with an adapter without their masks: no pattern is promised for them. Their "
        f"sparsity was {before / weights:.4f} and is {after / weights:.4f}."
    ]


def _check_pattern(tensor: Tensor, entry: Mapping[str, Any], mask: str | None, result: Verification) -> None:
    if not _fits(tensor, entry):
        place = "" if entry["index"] is None else f" at {entry['index']}"
        result.problems.append(
            f"{entry['name']}: of shape {list(tensor.shape)}, the manifest records {entry['shape']}{place}"
        )
        return
    weight = view_of(tensor, entry)
    kept = weight != 0
    result.matrices += 1
    zeros = kept.numel() - int(kept.sum())
    result.zeros += zeros
    result.weights += kept.numel()
    violation = pattern_from_json(entry["pattern"]).violation(kept)
    if violation is not None:
        result.problems.append(f"{entry['name']}: {violation}")
    if zeros != entry["zeros"]:
        result.problems.append(f"{entry['name']}: {zeros} zeros, the manifest records {entry['zeros']}")
    if mask is not None and mask != mask_digest(kept):
        result.problems.append(f"{entry['name']}: its zeros are not where they were before training")


def _check_source(
    name: str,
    tensor: Tensor,
    original: Tensor,
    manifest: Manifest,
    planned: list[dict[str, Any]],
    result: Verification,
) -> None:
    if not _same_kind(name, tensor, original, result):
        return
    if not planned:
        if not torch.equal(_bits(tensor), _bits(original)):
            result.problems.append(f"{name}: not planned, yet its bytes differ from the source")
        return
    # A checkpoint that was trained elsewhere only has this tensor from the pruned one, which is a source as well.
    held = manifest.tensors.get(name) if "base" in (manifest.recovery or {}) else None
    known = {manifest.source_tensors.get(name), held} - {None}
    if known and tensor_digest(original) not in known:
        result.problems.append(f"{name}: the source is not the one that was pruned; its bytes differ from the record")
    experts = {entry["index"] for entry in planned} - {None}
    for expert in set(range(len(tensor))) - experts if experts and tensor.dim() == 3 else ():
        if not torch.equal(_bits(tensor[expert]), _bits(original[expert])):
            result.problems.append(f"{name}.{expert}: not planned, yet its bytes differ from the source")
    for entry in planned:
        if not _fits(tensor, entry):
            continue  # said already, of its shape
        pruned, dense = _bits(view_of(tensor, entry)), _bits(view_of(original, entry))
        if bool(((pruned == dense) | (pruned == 0)).all()):
            continue
        # The record alone is not believed: a method that only chooses leaves what it keeps as it was.
        if entry["kept_identical"] or only_chooses(manifest.method):
            result.problems.append(
                f"{entry['name']}: a kept weight is not bit-identical to the source, or a zero is -0.0"
            )
        else:
            result.changed += 1


def _check_trained(
    name: str,
    tensor: Tensor,
    original: Tensor,
    manifest: Manifest,
    before: list[str],
    planned: list[dict[str, Any]],
    result: Verification,
) -> None:
    """Of a tensor that was trained: the source is one that it came from, and holds no zero that is none any more."""
    if not _same_kind(name, tensor, original, result):
        return
    digest = tensor_digest(original)
    if digest not in (*before, manifest.source_tensors.get(name), manifest.tensors.get(name)):
        result.problems.append(
            f"{name}: the source is neither the dense model nor the pruned one; its bytes differ from the records"
        )
    elif digest == before[0]:
        masks = _masks(manifest)
        for entry in planned:
            if (
                entry["name"] in masks
                and _fits(tensor, entry)
                and bool(_bits(view_of(tensor, entry))[view_of(original, entry) == 0].any())
            ):
                result.problems.append(f"{entry['name']}: a weight that was zero before training is not +0.0")


def _same_kind(name: str, tensor: Tensor, original: Tensor, result: Verification) -> bool:
    if tensor.shape == original.shape and tensor.dtype == original.dtype:
        return True
    result.problems.append(
        f"{name}: {tuple(tensor.shape)} {tensor.dtype}, the source has {tuple(original.shape)} {original.dtype}"
    )
    return False


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that -0.0 and NaN compare by their bits."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.contiguous().view(integer)
