"""A checkpoint in the making: it takes tensors in any order, and ends in digests, manifest, card and the name."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from secateur.errors import CheckpointError, SecateurError
from secateur.files.checkpoint import Checkpoint
from secateur.files.scratch import delete
from secateur.files.writer import CheckpointWriter, reserve, writing
from secateur.models.opening.loading import check_loads
from secateur.models.opening.opened import OpenedModel
from secateur.record.card import write_card
from secateur.record.manifest import Manifest, file_digests, source_digest
from secateur.runs.events import Progress
from secateur.runs.journal import OUTSIDE, Part
from secateur.runs.packing import plan_packing, write_packed
from secateur.runs.transaction import Transaction, flush_names


class CheckpointOutput:
    """The checkpoint that a transaction's folder becomes, with the tensors, names and companion files of a model.

    Where the transaction's journal holds finished parts, their tensors are there already.
    """

    def __init__(self, transaction: Transaction, opened: OpenedModel, *, packed_bytes: int | None = None) -> None:
        """Where it will be packed, into so many bytes, the tensors are written plain beside the output before."""
        self._transaction, self._opened, self._room = transaction, opened, None
        self.target, self.journal, self.folder = transaction.target, transaction.journal, transaction.folder
        if packed_bytes is not None:
            self.folder, self._room = transaction.place("plain"), transaction.place("room.partial")
            with writing(self._room):
                self.folder.mkdir(exist_ok=True)
                with self._room.open("wb") as room:  # a disk too full for both is found out before the work
                    reserve(room.fileno(), packed_bytes)
        found = {name: digest for part in self.journal.found.values() for name, digest in part.tensors.items()}
        for folder in {transaction.folder, self.folder}:  # what an earlier process left and this one makes again
            for entry in folder.iterdir():
                if not (found and folder == self.folder and entry.suffix == ".safetensors"):
                    delete(entry)
        self._writer = CheckpointWriter(self.folder, opened.skeleton.source.layout(), found=found or None)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write finished tensors."""
        for name, tensor in tensors.items():
            self._writer.write(name, tensor)

    def finish(self, part: Part, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a part; the journal, where there is one, gets it when they are on the disk."""
        self.write(tensors)
        self._writer.flush()
        self._record(part, tensors)

    def _record(self, part: Part, names: Iterable[str]) -> None:
        self.journal.add(replace(part, tensors={name: self._writer.digests[name] for name in names}))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors that are written. Raises `CheckpointError` for one that is not what was written."""
        return self._writer.read(names)

    def copy_outside(self, check: Callable[[str, str], None] = lambda name, digest: None) -> None:
        """Write the source's tensors outside the blocks; `check(name, sha256)` may raise for one that is not right."""
        skeleton = self._opened.skeleton
        inside = {name for names in skeleton.block_tensors for name in names}
        outside = [name for name in skeleton.source.names if name not in inside]
        for name in outside:
            if name in self._writer.digests:  # by an earlier process
                check_source(self.target, name, source_digest(skeleton.source, name), self._writer.digests[name])
            digest = self._writer.digests.get(name) or self._writer.write_parts(name, skeleton.source.parts(name))
            check(name, digest)
        if OUTSIDE not in self.journal.found:
            self._writer.flush()
            for folder in (self._transaction.folder, self._transaction.partial, self.target.parent):
                flush_names(folder)
            self._record(Part(OUTSIDE), outside)

    def check_complete(self) -> None:
        """Raise `CheckpointError` for tensors that nobody has written."""
        if missing := self._writer.missing:
            raise CheckpointError(f"{len(missing)} tensors were never written, first {missing[0]}.")

    def seal(self, manifest: Manifest) -> None:
        """Close the files, check that they load, and write the manifest with their digests."""
        self._writer.close()
        try:
            check_loads(self._opened, self.folder)
        except SecateurError:
            self.journal.forget()  # the same run would be refused in the same way
            raise
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


def check_source(target: Path, name: str, found: str, expected: str) -> None:
    """Raise `CheckpointError` when a tensor of the source is not the one that an unfinished run has seen."""
    if found != expected:
        raise CheckpointError(
            f"{target}: the model has changed since this run was begun: {name} has the digest {found[:12]} now, "
            f"expected {expected[:12]}. Go on with the same model, or start anew with --overwrite."
        )
