"""Where a result goes: checked beforehand, made under another name, and renamed when it is complete."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from torch import nn

from secateur.errors import CheckpointError
from secateur.manifest import FILE_NAME

ADAPTER_RECORD = "secateur_adapter.json"  # what an adapter has in the place of a manifest


def check_output(
    output: str | os.PathLike[str] | None, model: str | os.PathLike[str] | nn.Module, overwrite: bool
) -> Path | None:
    """The absolute path of the output, or None without one. Raises `CheckpointError` when it is not safe to write."""
    if output is None:
        if not isinstance(model, nn.Module):
            raise CheckpointError(f"{model}: no output folder given; the source is never changed. Add -o OUT.")
        return None
    target = Path(output).expanduser().absolute()
    if not isinstance(model, nn.Module):
        check_apart(output, model)
    if target.exists():
        if not overwrite:
            raise CheckpointError(f"{output}: exists already. Choose another folder, or pass --overwrite.")
        own = any((target / name).exists() for name in (FILE_NAME, ADAPTER_RECORD))
        if not target.is_dir() or (any(target.iterdir()) and not own):
            raise CheckpointError(
                f"{output}: exists and holds no {FILE_NAME}, so Secateur did not write it and will not overwrite it. "
                "Choose another folder, or remove it yourself."
            )
    check_writable(output)
    return target


def check_apart(output: str | os.PathLike[str], model: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError` when the output is the source, lies inside it, or holds it."""
    target, source = Path(output).expanduser().absolute(), Path(model).expanduser()
    if source.exists() and (source.resolve() == target.resolve() or source.resolve() in target.resolve().parents):
        raise CheckpointError(f"{output}: the output is the source, or lies inside it. Choose another folder.")
    if source.exists() and target.resolve() in source.resolve().parents:
        raise CheckpointError(f"{output}: the output holds the source ({source}). Choose another folder.")


def check_writable(output: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError` when the output cannot be made where it is to be."""
    above = next(folder for folder in Path(output).expanduser().absolute().parents if folder.exists())
    effective = os.access in os.supports_effective_ids
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK, effective_ids=effective):
        reason = "no permission to write there" if above.is_dir() else "it is not a folder"
        raise CheckpointError(f"{output}: cannot be made in {above} ({reason}). Choose another output folder.")


class Scratch:
    """A temporary sibling of the output that takes its name when it is complete, and vanishes when it is not."""

    def __init__(self, target: Path, overwrite: bool) -> None:
        self.target = target
        self.overwrite = overwrite
        self.folder = target.with_name(f"{target.name}.partial-{os.getpid()}")
        self.made = [folder for folder in target.parents if not folder.exists()]  # innermost first

    def __enter__(self) -> "Scratch":
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            self._remove()
            raise CheckpointError(
                f"{self.target}: no folder can be made beside it ({error.strerror}). Choose another output folder."
            ) from None
        return self

    def commit(self) -> None:
        """Give the finished folder its name; an output that is overwritten goes only then."""
        if self.target.exists():
            old = self.target.with_name(f"{self.target.name}.old-{os.getpid()}")
            self.target.rename(old)
            self.folder.rename(self.target)
            shutil.rmtree(old)
        else:
            self.folder.rename(self.target)
        with suppress(OSError):
            descriptor = os.open(self.target.parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def __exit__(self, *exception: object) -> None:
        if self.folder.exists():
            self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            for folder in self.made:
                folder.rmdir()
