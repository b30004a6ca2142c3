"""The manifest: what was asked and what happened, as JSON beside the checkpoint."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from secateur.core.patterns import pattern_from_json
from secateur.errors import CheckpointError
from secateur.files.checkpoint import CARD_FILE, file_digest, tensor_bytes
from secateur.files.reading import check_inside, checked, digest_of, parse_json, read_text
from secateur.files.redaction import redacted
from secateur.files.writer import writing
from secateur.models.shape.skeleton import Source
from secateur.record.manifest_schema import check_manifest
from secateur.record.reordered import ReorderedEntry
from secateur.shown import Shown

FILE_NAME = "secateur.json"
FORMAT = 1

_PROSE_SUFFIXES = (".md", ".rst", ".html", ".pdf", ".csv", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


@dataclass(repr=False)
class Manifest(Shown):
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
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)  # matrices that stayed dense against the plan
    reordered: ReorderedEntry | None = None  # rows and columns that have changed places; absent where none have
    recovery: dict[str, Any] | None = None  # what was done to the kept weights after pruning; absent where nothing was
    published_from: str | None = None  # the digest of the manifest that this one is the public form of; else absent

    def to_json(self) -> dict[str, Any]:
        """A JSON object with a format number and a digest."""
        value: dict[str, Any] = {"format": FORMAT, **vars(self)}
        if self.recovery is None:
            del value["recovery"]
        if self.published_from is None:
            del value["published_from"]
        if self.reordered is None:
            del value["reordered"]
        if not self.skipped:
            del value["skipped"]
        value["digest"] = digest_of(value)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Manifest":
        """The manifest that `to_json` wrote."""
        return cls(**{key: item for key, item in value.items() if key not in ("format", "digest")})

    def write(self, folder: Path) -> None:
        """Write `secateur.json` into the folder, with credentials hidden, here as well from now on.

        Raises `CheckpointError` when that is not possible.
        """
        for name in ("command", "source", "settings", "calibration", "recovery", "skipped"):
            setattr(self, name, redacted(getattr(self, name)))
        with writing(folder / FILE_NAME):
            (folder / FILE_NAME).write_text(text_of(self.to_json()), encoding="utf-8")

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
    def removes(self) -> bool:
        """Whether weights were removed: a checkpoint that a GGUF file was read into has a pattern that removes none."""
        asked = any(pattern_from_json(entry["pattern"]).sparsity for entry in self.matrices.values())
        return asked and bool(self.totals["zeros"])

    @property
    def kinds(self) -> dict[str, list[dict[str, Any]]]:
        """The entries of the matrices of each kind, in order."""
        result: dict[str, list[dict[str, Any]]] = {}
        for entry in self.matrices.values():
            result.setdefault(entry["kind"], []).append(entry)
        return result

    @property
    def digest(self) -> str:
        """The digest that `to_json` adds: it stands for every byte of the checkpoint."""
        return str(self.to_json()["digest"])

    @property
    def trained(self) -> dict[str, list[str]]:
        """For every tensor that was trained after pruning, its sha256 before each time, latest first."""
        result: dict[str, list[str]] = {}
        for section in self.recoveries:
            for name, digest in section.get("trained", {}).items():
                result.setdefault(name, []).append(digest)
        return result

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        """What was done to the weights after pruning, the latest first."""
        found, section = [], self.recovery
        while section is not None:
            found.append(section)
            section = section.get("earlier")
        return found


def sparsity(entries: Sequence[Mapping[str, Any]]) -> float:
    """The fraction of zeros in the matrices of several entries."""
    return float(sum(entry["zeros"] for entry in entries) / sum(math.prod(entry["shape"]) for entry in entries))


def order_line(manifest: Manifest) -> str | None:
    """What changing the places of inputs has gained, in a sentence or two; None where none have changed places."""
    moved = [entry for entry in manifest.matrices.values() if "kept_scores" in entry]
    if not moved:
        return None
    before, after = (sum(entry["kept_scores"][when] for entry in moved) / len(moved) for when in ("before", "after"))
    return (
        f"Inputs of {len(moved)} of {len(manifest.matrices)} matrices have changed places, and what makes them with "
        f"them, so that the pattern keeps {after:.2%} of the scores there instead of {before:.2%}."
    )


def cautions(manifest: Manifest) -> list[str]:
    """Sentences on how matrices were solved that a reader should know.

    They name batches that had to shrink, more damping than was asked for, fewer tokens than inputs, matrices that were
    left dense or pruned by magnitude, inputs that kept their places, blocks that moved far, and updates of weights that
    swaps have undone.
    """
    options, matrices = manifest.settings.get("options", {}), manifest.matrices
    found = []
    if first := manifest.settings.get("batch_size_at_first"):
        found.append(
            f"The device had too little memory for {first} samples at once, and the run went on with "
            f"{manifest.settings['batch_size']}: --batch-size {first} may give other last bits."
        )
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
    if manifest.skipped:
        first = next(iter(manifest.skipped))
        planned = len(matrices) + len(manifest.skipped)
        found.append(
            f"{len(manifest.skipped)} of {planned} planned matrices were left dense, first {first}: "
            f"{manifest.skipped[first]['reason'].removeprefix(f'{first}: ')}"
        )
    more = {
        name: entry["zeros"] - round(pattern_from_json(entry["pattern"]).sparsity * math.prod(entry["shape"]))
        for name, entry in matrices.items()
        if entry["pattern"].get("per") != "search"  # whose count is only close to what was asked for
    }
    # Rows that are rounded each for themselves differ from the whole by less than one weight a row.
    # N:M counts exactly.
    slack = {name: 0 if "n" in entry["pattern"] else entry["shape"][0] for name, entry in matrices.items()}
    more = {name: extra for name, extra in more.items() if extra > slack[name]}
    if more and manifest.recovery is None:
        worst = max(more, key=lambda name: more[name])
        found.append(
            f"{len(more)} of {len(matrices)} matrices have more zeros than were asked for, {sum(more.values()):,} in "
            f"all, most {worst} ({more[worst]:,}): these weights were zero before, and stay so."
        )
    if unseen := [name for name, entry in matrices.items() if entry.get("method") == "magnitude"]:
        found.append(
            f"{len(unseen)} of {len(matrices)} matrices saw no calibration token and were pruned by magnitude, first "
            f"{unseen[0]}."
        )
    if manifest.settings.get("permute"):
        refused = {name: why for block in manifest.blocks for name, why in block.get("not_reordered", {}).items()}
        if refused:
            first, why = next(iter(refused.items()))
            found.append(
                f"The inputs of {len(refused)} matrices keep their places, although another order would gain. First "
                f"{first}: {why}."
            )
        if manifest.reordered is None:
            found.append(
                "No inputs have changed places: no order gains, or none can be taken by what makes the inputs."
            )
    for block in manifest.blocks:
        if "usual_change" in block:
            found.append(
                f"The output of block {block['index']} moved by {block['output_change']:.3f} of its norm, and those of "
                f"its neighbours by {block['usual_change']:.3f}. Look at its matrices, or leave some of them dense."
            )
    undone = [name for name, entry in matrices.items() if entry["notes"].get("dropped_update")]
    if any(matrices[name]["kept_identical"] for name in undone):
        found.append(
            f"Swaps put the dense weights of {len(undone)} of {len(matrices)} matrices back: the mask of the method "
            "before them was kept, its update was lost. End the chain with +least_squares."
        )
    return found


def text_of(value: Mapping[str, Any]) -> str:
    """What `secateur.json` holds for a manifest's JSON object, to the byte."""
    return json.dumps(value, indent=1) + "\n"


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
    check_inside(file, folder)
    text = read_text(file)
    value = parse_json(text, file, dict[str, Any])
    head = checked(value, file, _Head)
    if head.format != FORMAT:
        raise CheckpointError(f"{file}: format {head.format}, expected {FORMAT}; another version of Secateur wrote it.")
    expected = digest_of(value)
    if head.digest != expected:
        raise CheckpointError(
            f"{file}: altered since it was written: digest {expected[:12]}, expected {head.digest[:12]}."
        )
    if text != text_of(value):
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
        for name in paths_below(folder)
        if (folder / name).is_file() and not name.endswith(".safetensors") and name not in (FILE_NAME, CARD_FILE)
    }


def unlisted_files(folder: Path, manifest: Manifest) -> list[str]:
    """Paths, relative to the folder of a checkpoint, of all files in it that its manifest does not account for.

    It accounts for shards, companion files, the model card and itself. Symbolic links to folders count as files.
    """
    own = {*manifest.files, *manifest.headers, FILE_NAME, CARD_FILE}
    return [name for name in paths_below(folder) if name not in own]


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


def paths_below(folder: Path) -> list[str]:
    """Everything below a folder that is no folder itself, at any depth."""
    found = []
    for above, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        found += [Path(above, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


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


def view_of(tensor: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The (out, in) view of a checkpoint tensor that a matrix's entry in the manifest names."""
    view = (tensor if entry["index"] is None else tensor[entry["index"]]).flatten(1)
    return view.t() if entry["transposed"] else view
