"""Whether an output may be written: what must hold of its name before a run starts."""

import os
from pathlib import Path

from torch import nn

from secateur.errors import CheckpointError
from secateur.files.checkpoint import CARD_FILE, PACKED_FILE
from secateur.files.packed import packed_files
from secateur.record.manifest import FILE_NAME, paths_below, read_manifest, unlisted_files

ADAPTER_RECORD = "secateur_adapter.json"  # what an adapter has in the place of a manifest
REPORT_FOLDER = "report"
_ADAPTER_FILES = {ADAPTER_RECORD, CARD_FILE, "adapter_config.json", "adapter_model.safetensors"}


def check_output(
    output: str | os.PathLike[str] | None, model: str | os.PathLike[str] | nn.Module, overwrite: bool
) -> Path | None:
    """The absolute path of the output, without symbolic links, or None without one.

    Raises `CheckpointError` when it is not safe to write.
    """
    if output is None:
        if not isinstance(model, nn.Module):
            raise CheckpointError(f"{model}: no output folder given; the source is never changed. Add -o OUT.")
        return None
    target = resolved(output)
    if not isinstance(model, nn.Module):
        check_apart(output, model)
    if target.exists():
        if not overwrite:
            raise CheckpointError(f"{output}: exists already. Choose another folder, or pass --overwrite.")
        _check_own(output, target)
    check_writable(output)
    return target


def resolved(output: str | os.PathLike[str]) -> Path:
    """The absolute path of an output, links resolved. Raises `CheckpointError` for a link that leads nowhere."""
    path = Path(output).expanduser().absolute()
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            raise CheckpointError(
                f"{output}: {part} is a symbolic link to {os.readlink(part)}, which does not exist. Make the folder "
                "that it points to, or choose another output."
            )
    target = path.resolve()
    if os.path.ismount(target):
        raise CheckpointError(
            f"{output}: a file system is mounted there, which cannot take another folder's place. Choose one in it."
        )
    return target


def _check_own(output: str | os.PathLike[str], target: Path) -> None:
    """Raise `CheckpointError` when a folder that is to be overwritten holds anything that Secateur did not write."""
    own = any((target / name).exists() for name in (FILE_NAME, ADAPTER_RECORD, PACKED_FILE))
    if not target.is_dir() or (any(target.iterdir()) and not own):
        raise CheckpointError(
            f"{output}: exists and holds no {FILE_NAME}, so Secateur did not write it and will not overwrite it. "
            "Choose another folder, or remove it yourself."
        )
    if own and not (target / ADAPTER_RECORD).exists():
        try:
            others = _foreign_files(target)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} What else is in {output} is not known, so it is not overwritten. Remove it yourself, or "
                "choose another folder."
            ) from None
        others = [name for name in others if not name.startswith(f"{REPORT_FOLDER}/")]
    else:
        others = [name for name in paths_below(target) if name not in _ADAPTER_FILES]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise CheckpointError(
            f"{output}: holds {others[0]}{more}, which Secateur did not write; --overwrite would remove it. Move it "
            "away, or choose another folder."
        )


def _foreign_files(target: Path) -> list[str]:
    """What a checkpoint, plain or packed, does not account for by its manifest or by sparse_config.json."""
    if (target / PACKED_FILE).exists():
        known = packed_files(target) | {CARD_FILE, FILE_NAME}
        return [name for name in paths_below(target) if name not in known]
    return unlisted_files(target, read_manifest(target))


def check_apart(output: str | os.PathLike[str], model: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError` when the output is the source, lies inside it, or holds it."""
    target, source = Path(output).expanduser().resolve(), Path(model).expanduser()
    if source.exists() and source.resolve() in (target, *target.parents):
        raise CheckpointError(f"{output}: the output is the source, or lies inside it. Choose another folder.")
    if source.exists() and target in source.resolve().parents:
        raise CheckpointError(f"{output}: the output holds the source ({source}). Choose another folder.")


def check_writable(output: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError` when the output cannot be made where it is to be."""
    above = next(folder for folder in resolved(output).parents if folder.exists())
    effective = os.access in os.supports_effective_ids
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK, effective_ids=effective):
        reason = "no permission to write there" if above.is_dir() else "it is not a folder"
        raise CheckpointError(f"{output}: cannot be made in {above} ({reason}). Choose another output folder.")
