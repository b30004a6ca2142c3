"""Sums of gradients on their way to a file: over one part of the samples after another, block by block, and durable."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.collect.exempt import Exempt
from secateur.collect.gradient_file import GradientWriter
from secateur.core.choices import Norm
from secateur.runs.journal import Journal, Part

Sums = Mapping[tuple[str, Norm], Tensor]


def other_file(target: Path) -> Path:
    """The second file of sums that come in parts, of no use once `target` is complete."""
    return target.with_name(f"{target.name}.other")


class GradientParts:
    """The sums of each block over the first parts of the samples, on the disk and in a journal.

    A part adds to what the part before has written and writes it into the other of two files: a sum is there until the
    one that follows from it is.
    """

    def __init__(
        self,
        target: Path,
        parts: int,
        blocks: Collection[int],
        open_file: Callable[[Path, Mapping[str, str] | None], GradientWriter],
        journal: Journal,
        *,
        begun: bool,
    ) -> None:
        """`open_file` makes a file or, given the digests of what it holds, goes on with one; so it does if `begun`."""
        self.target, self.parts, self.blocks, self.journal = target, parts, blocks, journal
        self._writers: list[GradientWriter] = []  # the last part, which makes the whole, writes into the last one
        try:
            # Of a run that has ended after its last block, the other file may be gone.
            whole = all(self._name(parts - 1, block) in journal.found for block in blocks)
            files = [other_file(target), target][-parts:]
            for position, file in enumerate(files):
                if whole and file != target:
                    continue
                numbers = range((parts + position) % 2 if parts > 1 else 0, parts, 2)
                found: dict[str, str] = {}
                for name in (self._name(number, block) for number in numbers for block in blocks):
                    found |= journal.found[name].record["sums"] if name in journal.found else {}
                self._writers.append(open_file(file, found if begun else None))
        except BaseException:
            self.abandon()
            raise

    def _name(self, part: int, block: int) -> str:
        """What the journal calls the sums of a block over the samples up to those of a part."""
        return f"gradients of block {block}" + (f", part {part + 1} of {self.parts}" if self.parts > 1 else "")

    def _writer(self, part: int) -> GradientWriter:
        return self._writers[(part - self.parts) % len(self._writers)]

    def finished(self, part: int, exempt: Exempt) -> set[int]:
        """The blocks of which an earlier process has written the sums; what it exempted is added."""
        found = {block: self.journal.found.get(self._name(part, block)) for block in self.blocks}
        for entry in found.values():
            if entry is not None:
                exempt.add(entry.record["exempt"])
        return {block for block, entry in found.items() if entry is not None}

    def before(self, part: int, matrix: str, norm: Norm) -> Tensor | None:
        """The sums of a matrix over the parts before this one."""
        return self._writer(part - 1).read(matrix, norm) if part else None

    def add(self, part: int, block: int, sums: Sums, exempt: Mapping[str, Any]) -> None:
        """Write the sums of a block over the samples up to those of a part; they are durable when this returns.

        `exempt` is what `Exempt.to_json` says of its matrices.
        """
        digests = self._writer(part).add(sums)
        self.journal.add(Part(self._name(part, block), record={"sums": digests, "exempt": dict(exempt)}))

    def complete(self) -> None:
        """Finish the file: it holds the sums over all samples."""
        self._writers[-1].close()

    def abandon(self) -> None:
        """Let go of the files; harmless at the end."""
        for writer in self._writers:
            writer.abandon()
