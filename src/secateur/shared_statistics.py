"""Statistics of the dense model's inputs, kept block by block by one run for the next ones."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.core.statistics import Statistic
from secateur.errors import CalibrationError
from secateur.models.tap import InputStatistics
from secateur.models.writer import writing


class SharedStatistics:
    """What several runs with ``propagate="dense"`` share: the statistics of every block's inputs, which all see alike.

    The first run takes all of `kinds` and leaves them in `folder`; it is `complete` when that run is finished, and the
    others then read them instead of running the samples through the blocks. Their results are bit-equal to those of
    separate runs. Good for one process; `close` removes the folder.

    Memory: one file for each block, of which one is in memory at a time.
    """

    def __init__(self, folder: Path, kinds: frozenset[type[Statistic]]) -> None:
        self.folder = folder
        self.kinds = kinds
        self.complete = False
        self._facts: Mapping[str, Any] | None = None

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Start a run of which these `facts` hold. Raises `CalibrationError` when an earlier one had others."""
        if self._facts is not None:
            for name, value in facts.items():
                if value != self._facts[name]:
                    raise CalibrationError(
                        f"these statistics are shared by runs with {name} {self._facts[name]}, got {value}. "
                        "Runs that differ in that need statistics of their own."
                    )
        self._facts = facts
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, block: int, statistics: InputStatistics) -> None:
        """Keep the statistics of a block. Raises `CheckpointError` when there is no room for them."""
        file = self._file(block)
        with writing(file), file.open("wb") as stream:
            # Statistics may be of any class; only this process reads what it wrote here, so that a pickle does no harm.
            torch.save(statistics, stream)

    def get(self, block: int) -> InputStatistics:
        """The statistics of a block, where they were when they were kept."""
        found: InputStatistics = torch.load(self._file(block), weights_only=False)
        return found

    def close(self) -> None:
        """Remove what was kept."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block}.pt"
