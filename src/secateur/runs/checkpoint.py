"""A checkpoint in the making: it takes tensors in any order, and ends in digests, manifest, card and the name."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from secateur.errors import CheckpointError
from secateur.files.checkpoint import Checkpoint
from secateur.files.writer import CheckpointWriter, reserve, writing
from secateur.models.opening.loading import check_loads
from secateur.models.opening.opened import OpenedModel
from secateur.record.card import write_card
from secateur.record.manifest import Manifest, file_digests
from secateur.runs.events import Progress
from secateur.runs.packing import plan_packing, write_packed
from secateur.runs.transaction import Transaction


class CheckpointOutput:
    """The checkpoint that a transaction's folder becomes, with the tensors, names and companion files of a model."""

    def __init__(self, transaction: Transaction, opened: OpenedModel, *, packed_bytes: int | None = None) -> None:
        """Where it will be packed, into so many bytes, the tensors are written plain beside the output before."""
        self._transaction, self._opened, self._room = transaction, opened, None
        self.folder = transaction.folder
        if packed_bytes is not None:
            self.folder, self._room = transaction.place("plain"), transaction.place("room")
            with writing(self._room):
                self.folder.mkdir()
                with self._room.open("wb") as room:  # a disk too full for both is found out before the work
                    reserve(room.fileno(), packed_bytes)
        self._writer = CheckpointWriter(self.folder, opened.skeleton.source.layout())

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write finished tensors."""
        for name, tensor in tensors.items():
            self._writer.write(name, tensor)

    def flush(self) -> None:
        """Force what was written to the disk, so that a finished block survives a crash."""
        self._writer.flush()

    def copy_outside(self, check: Callable[[str, str], None] = lambda name, digest: None) -> None:
        """Write the source's tensors outside the blocks; `check(name, sha256)` may raise for one that is not right."""
        skeleton = self._opened.skeleton
        inside = {name for names in skeleton.block_tensors for name in names}
        for name in skeleton.source.names:
            if name not in inside:
                check(name, self._writer.write_parts(name, skeleton.source.parts(name)))

    def check_complete(self) -> None:
        """Raise `CheckpointError` for tensors that nobody has written."""
        if missing := self._writer.missing:
            raise CheckpointError(f"{len(missing)} tensors were never written, first {missing[0]}.")

    def seal(self, manifest: Manifest) -> None:
        """Close the files, check that they load, and write the manifest with their digests."""
        self._writer.close()
        check_loads(self._opened, self.folder)
        manifest.tensors, manifest.headers = self._writer.digests, self._writer.header_digests
        manifest.files = file_digests(self.folder)
        manifest.write(self.folder)

    def publish(self, manifest: Manifest, progress: Progress = lambda stage, done, total: None) -> None:
        """Write the model card of a sealed checkpoint, pack it where that was asked, and give it its name."""
        write_card(self.folder, manifest, self._transaction.target.name)
        if self._room is not None:
            self._room.unlink()
            plain = Checkpoint(self.folder)
            plan = plan_packing(plain, "same", progress)
            target = self._transaction.target.name
            write_packed(plain, manifest, plan, self._transaction.folder, target, progress=progress)
        self._transaction.commit()


@contextmanager
def checkpoint_output(
    transaction: Transaction, opened: OpenedModel, *, packed_bytes: int | None = None
) -> Iterator[CheckpointOutput]:
    """The checkpoint in the making, with the model's companion files in place; its files are closed at the end."""
    output = CheckpointOutput(transaction, opened, packed_bytes=packed_bytes)
    try:
        with writing(output.folder):
            opened.write_companions(output.folder)
        yield output
    finally:
        output._writer.abandon()
