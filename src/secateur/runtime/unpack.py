"""`unpack`: from a packed checkpoint to a plain one, tensor by tensor."""

import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor

from secateur.errors import CheckpointError
from secateur.files.ahead import ahead
from secateur.files.checkpoint import CARD_FILE, Checkpoint, tensor_digest
from secateur.files.folders import companions, copy_files, locate
from secateur.files.packed import PackedCheckpoint, is_packed
from secateur.files.writer import CheckpointWriter
from secateur.models.opening.configuration import CONFIGURATION
from secateur.models.opening.opened import clean_configuration
from secateur.models.shape.skeleton import Source
from secateur.models.weights.bitmask import FORMATS, SparseBitmaskCheckpoint
from secateur.models.weights.quantised import open_checkpoint
from secateur.record.card import tell_use
from secateur.record.manifest import FILE_NAME
from secateur.runs.options import taking
from secateur.runs.output import check_output
from secateur.runs.transaction import Transaction
from secateur.runtime.layout import expanded
from secateur.runtime.settings import UnpackSettings


@dataclass(frozen=True)
class Unpacking:
    """The result of `unpack`: how many tensors were packed, and the bytes of all before and after.

    `rounded` counts those whose values were rounded to int8, and come back as what the codes stand for.
    """

    model: str
    output: str
    format: str
    matrices: int
    rounded: int
    bytes_before: int
    bytes_after: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All fields; `format` is that of the object in what commands print, so the format unpacked is `packing`."""
        fields = asdict(self)
        return {"packing": fields.pop("format"), **fields}


@taking(UnpackSettings)
def unpack(settings: UnpackSettings) -> Unpacking:
    """Write the plain checkpoint that a packed one stands for, byte for byte; returns what was unpacked.

    Tensors are read, expanded and written one by one, some ahead, each compared with the digest that it had before it
    was packed. Raises `CheckpointError` for what is not packed, and for a packed checkpoint that is damaged.
    """
    started = time.perf_counter()
    model = os.fspath(settings.model)
    target = check_output(settings.output, model, settings.overwrite)
    assert target is not None
    folder = locate(model, settings.revision)
    source = PackedCheckpoint(folder) if is_packed(folder) else open_checkpoint(folder)
    checkpoint = source if isinstance(source, Checkpoint) else source.checkpoint  # below one that is dequantised
    if not isinstance(checkpoint, PackedCheckpoint | SparseBitmaskCheckpoint):
        raise CheckpointError(
            f"{folder}: is not packed: a checkpoint that secateur pack wrote is expected, or one that "
            f"compressed-tensors wrote as {' or '.join(FORMATS)}."
        )
    digests = source.digests if isinstance(source, PackedCheckpoint) else {}
    with Transaction(target, settings.overwrite) as transaction:
        own = [folder / name for name in (FILE_NAME, CARD_FILE) if (folder / name).is_file()]
        copy_files(folder, [*companions(folder)[0], *own], transaction.folder)
        tell_use(transaction.folder, packed=False)
        if not isinstance(source, PackedCheckpoint):
            clean_configuration(transaction.folder / CONFIGURATION)  # it says how the weights were stored
        writer = CheckpointWriter(transaction.folder, source.layout())
        try:
            plain = ahead(partial(_unpacked, source), source.names)
            for number, (name, found) in enumerate(zip(source.names, plain, strict=True)):
                digest = writer.write_parts(name, source.parts(name)) if found is None else writer.write(name, *found)
                expected = digests.get(name, digest)
                if digest != expected:
                    raise CheckpointError(
                        f"{folder}: {name}: what it stands for has the sha256 {digest[:12]}, expected {expected[:12]}. "
                        "The file is damaged; copy or download it again."
                    )
                settings.tell("unpack", number + 1, len(source.names))
            writer.close()
        finally:
            writer.abandon()
        transaction.commit()
    return Unpacking(
        model=model,
        output=os.fspath(settings.output),
        format=checkpoint.record.format if isinstance(checkpoint, PackedCheckpoint) else checkpoint.format,
        matrices=len(checkpoint.record.matrices if isinstance(checkpoint, PackedCheckpoint) else checkpoint.sparse),
        rounded=sum(how.values == "int8" for how in checkpoint.record.matrices.values())
        if isinstance(checkpoint, PackedCheckpoint)
        else 0,
        bytes_before=sum(record.bytes for record in checkpoint.stored.values()),
        bytes_after=writer.total_bytes,
        seconds=time.perf_counter() - started,
    )


def _unpacked(source: Source, name: str) -> tuple[Tensor, str] | None:
    """In a thread: what a packed tensor stands for, and its digest. The others are copied as they come, in parts."""
    if not isinstance(source, PackedCheckpoint) or name not in source.record.matrices:
        return None
    tensor = expanded(source.read_packed(name))
    return tensor, tensor_digest(tensor)
