"""Writing a checkpoint whose weights were trained: the base's tensors, some with new values, and its manifest."""

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import CheckpointError, NumericalError
from secateur.files.checkpoint import tensor_digest
from secateur.models.opening.opened import OpenedModel
from secateur.record.card import write_card
from secateur.record.manifest import Manifest, mask_digest, view_of
from secateur.record.verify import Verification, verify
from secateur.recover.masks import keep_from_zero
from secateur.runs.checkpoint import checkpoint_output
from secateur.runs.transaction import Transaction


def check_unchanged(folder: str | Path, manifest: Manifest, name: str, digest: str) -> None:
    """Raise `CheckpointError` for a tensor of a pruned checkpoint whose sha256 is not that in its manifest."""
    if digest != manifest.tensors.get(name):
        raise CheckpointError(
            f"{name}: its bytes in {folder} differ from those that were written. The pruned checkpoint was changed "
            "since; secateur verify tells more."
        )


def write_trained(
    transaction: Transaction,
    opened: OpenedModel,
    manifest: Manifest,
    trained: Collection[str],
    value: Callable[[str], Tensor],
    *,
    section: Mapping[str, Any],
    keep: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """The manifest of what a pruned checkpoint became, written into a transaction's folder.

    `value(name)` returns the new value of each `trained` tensor, in any dtype; every other tensor is copied byte for
    byte. With `keep`, zeros of planned matrices stay zero and nothing else becomes zero, so that each mask is what it
    was; without, no pattern is promised for the matrices that were trained. `section` is the manifest's new section
    on recovery, to which the digests that `verify` needs and the counts of zeros are added.

    Raises `CheckpointError` when the base is not what its manifest says, `NumericalError` for NaN and infinity.
    """
    source = opened.skeleton.source
    new = deepcopy(manifest)
    planned: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, entry in new.matrices.items():
        planned.setdefault(entry["tensor"], []).append((name, entry))
    new.recovery = recovery = {
        **section,
        "zeros_before": sum(entry["zeros"] for entry in manifest.matrices.values()),
        "zeros": 0,
        "nudged": 0,
        "trained": {},
        "masks": {},
        "unmasked": {},
        "earlier": manifest.recovery,
    }
    with checkpoint_output(transaction, opened) as output:
        for number, name in enumerate(source.names):
            original = source.read([name])[name]
            digest = tensor_digest(original)
            check_unchanged(getattr(source, "folder", "the checkpoint"), manifest, name, digest)
            if name in trained:
                recovery["trained"][name] = digest
                tensor = value(name)
                if not bool(tensor.isfinite().all()):
                    raise NumericalError(f"{name}: trained to values that are not finite. Try a lower --lr.")
                if keep and name in planned:
                    tensor, count = keep_from_zero(tensor, original != 0, original.dtype)
                    recovery["nudged"] += count
                tensor = tensor.to(original.dtype)
                for matrix, entry in planned.get(name, ()):
                    kept = view_of(tensor, entry) != 0
                    zeros = kept.numel() - int(kept.sum())
                    if keep:
                        recovery["masks"][matrix] = mask_digest(view_of(original, entry) != 0)
                    else:
                        counts = {"zeros_before": entry["zeros"], "zeros": zeros, "weights": kept.numel()}
                        recovery["unmasked"][matrix] = counts
                    entry |= {"zeros": zeros, "sparsity": zeros / kept.numel(), "kept_identical": False}
                original = tensor
            output.write({name: original})
            progress(number + 1, len(source.names))
        recovery["zeros"] = sum(entry["zeros"] for entry in new.matrices.values())
        for matrix in recovery["unmasked"]:
            del new.matrices[matrix], new.plan[matrix]
        new.count_totals()
        output.seal(new)
    return new


def finish_trained(
    transaction: Transaction, manifest: Manifest, *, progress: Callable[[int, int], None]
) -> Verification:
    """Write the manifest and the model card of a checkpoint that `write_trained` wrote, and verify it in between.

    Raises `CheckpointError` for a checkpoint that is not what the manifest says.
    """
    manifest.write(transaction.folder)
    checked = verify(transaction.folder, progress=progress)
    if not checked.ok:
        raise CheckpointError(f"{transaction.target}: not what it should be after training: {checked.problems[0]}")
    write_card(transaction.folder, manifest, transaction.target.name)
    return checked
