"""The proof that a packed checkpoint is what its sparse_config.json says, from the files alone."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from secateur.errors import CheckpointError
from secateur.files.checkpoint import CARD_FILE, file_digest, tensor_digest
from secateur.files.packed import PackedCheckpoint, packed_files, stem
from secateur.record.manifest import FILE_NAME, harmless, paths_below


def file_problems(checkpoint: PackedCheckpoint) -> Iterator[str]:
    """What is wrong with the headers of the shards, and with the files beside them."""
    folder, record = checkpoint.folder, checkpoint.record
    for file, shard in zip(checkpoint.files, record.shards, strict=True):
        if checkpoint.headers[file].digest != shard.header:
            yield f"{file.name}: its header differs from the one that was written"
    there = paths_below(folder)
    for name, digest in record.files.items():
        if name not in there or not (folder / name).is_file():
            yield f"{name}: the file is missing"
        elif file_digest(folder / name) != digest:
            yield f"{name}: the file differs from the one that was written"
    known = packed_files(folder) | {FILE_NAME, CARD_FILE}
    for name in there:
        if name.endswith(".safetensors") and name not in known:
            yield f"{name}: a shard that pack did not write"
        elif name not in known and not harmless(name) and not name.startswith("report/"):
            yield f"{name}: not written by pack, and it may change what is loaded; move it away"


def tensor_problems(checkpoint: PackedCheckpoint, name: str, tensor: Tensor) -> Iterator[str]:
    """What is wrong with the bytes that are stored for a tensor, and with those that they stand for."""
    matrix = checkpoint.record.matrices.get(name)
    parts = {} if matrix is None else {f"{stem(name)}.{part}": digest for part, digest in matrix.stored.items()}
    for part in parts or (name,):
        stream = checkpoint.record.compressed.get(part)
        if stream is not None and tensor_digest(checkpoint.read_bytes(part)) != stream.sha256:
            yield f"{part}: its compressed bytes differ from those that were written"
    for part, digest in parts.items():
        if tensor_digest(checkpoint.read_stored(part)) != digest:
            yield f"{name}: the bytes of its {part.rpartition('.')[2]} differ from those that were written"
    if tensor_digest(tensor) != checkpoint.digests[name]:
        yield f"{name}: what it stands for differs from what was packed"


def readable(checkpoint: PackedCheckpoint, name: str) -> Tensor | str:
    """A tensor, or what is wrong with it where it cannot be made."""
    try:
        return checkpoint.read([name])[name]
    except CheckpointError as error:
        return str(error).removeprefix(f"{checkpoint.folder}: ")


def has_manifest(folder: Path) -> bool:
    """Whether a manifest lies in a folder; a checkpoint that another tool pruned is packed without one."""
    return (folder / FILE_NAME).exists()
