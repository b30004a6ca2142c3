"""What tells a model from another: the digest of the files that decide what it computes."""

import hashlib
import json
import os
from pathlib import Path

from secateur.errors import CheckpointError
from secateur.files.checkpoint import PACKED_FILE, file_digest
from secateur.files.folders import companions, locate
from secateur.files.packed import is_packed, open_files

DECIDING_SUFFIXES = (".json", ".model", ".txt", ".tiktoken", ".jinja", ".py")  # beside the weights


def model_digest(model: str | os.PathLike[str], revision: str | None = None) -> str:
    """sha256 over the files that decide what a model computes: weights, configuration, tokenizer and code.

    The same for two copies of a checkpoint; the manifest, the model card and the licence do not count. A GGUF file
    counts as a whole. Raises `CheckpointError` for anything that is not a model.
    """
    name = os.fspath(model)
    if name.endswith(".gguf"):
        file = Path(name).expanduser()
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file.")
        return file_digest(file)
    folder = locate(name, revision)
    own = [folder / PACKED_FILE] if is_packed(folder) else []
    deciding = [*open_files(folder).files, *own, *filter(_decides, companions(folder)[0])]
    listing = {file.relative_to(folder).as_posix(): file_digest(file) for file in deciding}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def _decides(file: Path) -> bool:
    prose = file.stem.upper().startswith(("LICENSE", "LICENCE", "USE_POLICY", "NOTICE", "README"))
    return file.suffix in DECIDING_SUFFIXES and not prose
