"""Statistics of the dense model's inputs, kept block by block by one run for the next ones."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.core.statistics import Statistic
from secateur.errors import CalibrationError
from secateur.files.writer import writing
from secateur.models.flow.tap import InputStatistics


class SharedStatistics:
    """What several runs with ``propagate="dense"`` share: the statistics of every block's inputs, which all see alike.

    The first run takes all of `kinds` and leaves them in `folder`; it is `complete` when that run is finished, and the
    others then read them instead of running the samples through the blocks. Their results are bit-equal to those of
    separate runs. Good for one process; `close` removes the folder.

    Memory: one file for each block and kind; a run reads those that it needs, one block at a time.
    """

    def __init__(self, folder: Path, kinds: frozenset[type[Statistic]]) -> None:
        self.folder = folder
        self.kinds = kinds
        self.complete = False
        self._facts: Mapping[str, Any] | None = None

    def begin(self, needs: frozenset[type[Statistic]], facts: Mapping[str, Any]) -> None:
        """Start a run that needs these statistics and of which these `facts` hold.

        Raises `CalibrationError` when others are shared, or an earlier run had other facts.
        """
        for kind in needs - self.kinds:
            raise CalibrationError(f"{kind.__name__} is not among the statistics that these runs share.")
        for name, value in facts.items():
            if self._facts is not None and value != self._facts[name]:
                raise CalibrationError(
                    f"these statistics are shared by runs with {name} {self._facts[name]}, got {value}. "
                    "Runs that differ in that need statistics of their own."
                )
        self._facts = facts
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, block: int, statistics: InputStatistics) -> None:
        """Keep the statistics of a block. Raises `CheckpointError` when there is no room for them."""
        for kind in self.kinds:
            file = self._file(block, kind)
            with writing(file), file.open("wb") as stream:
                # Statistics may be of any class; only this process reads what it wrote here: a pickle does no harm.
                torch.save(statistics.only(frozenset({kind})), stream)

    def get(self, block: int, needs: frozenset[type[Statistic]]) -> InputStatistics:
        """Those statistics of a block, on the device where they were taken."""
        found: list[InputStatistics] = [torch.load(self._file(block, kind), weights_only=False) for kind in needs]
        by_leader = {
            leader: {kind: own for part in found for kind, own in part.by_leader[leader].items()}
            for leader in found[0].by_leader
        }
        return InputStatistics(found[0].leader, by_leader)

    def close(self) -> None:
        """Remove what was kept."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, block: int, kind: type[Statistic]) -> Path:
        return self.folder / f"block-{block}-{kind.__module__}.{kind.__qualname__}.pt"
