"""The folder of what is kept between runs, and files in it that appear whole."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError
from secateur.files.names import unique
from secateur.files.redaction import redacted


def cache_folder() -> Path:
    """The folder that $SECATEUR_CACHE names, or else secateur in $XDG_CACHE_HOME, or else ~/.cache/secateur."""
    if own := os.environ.get("SECATEUR_CACHE"):
        return Path(own).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "")
    # A relative one does not count, by the specification of these folders.
    return (shared if shared.is_absolute() else Path("~/.cache").expanduser()) / "secateur"


def keep_json(file: Path, value: Any, what: str, *, indent: int | None = None) -> None:
    """Write a JSON file, in the place of an earlier one, under its final name when it is whole.

    Several processes can thus share a folder. Raises `CheckpointError`, with `what` it is, where it cannot be written.
    """
    partial = file.with_name(unique(f".{file.name}"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(redacted(value), indent=indent) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise CheckpointError(f"{file}: {what} cannot be kept ({error.strerror}).") from None
    finally:
        with suppress(OSError):
            partial.unlink()
