"""Runs that go on with smaller batches where the device has too little memory for the ones they began with."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from secateur.runs.journal import SMALLER, Journal, Part

T = TypeVar("T")

logger = logging.getLogger(__name__)


class BatchSize:
    """How many samples go through a block at once.

    `asked` is what was asked for, None where that is left to the run, `now` the same or what the run has come down to;
    `first` is what it began with, where that was more.
    """

    def __init__(self, asked: int | None) -> None:
        self.asked = self.now = asked
        self.first: int | None = None
        self._chosen = 1

    def go_on(self, journal: Journal) -> None:
        """Take over what an earlier process has come down to, unless something else is asked for."""
        record = journal.found[SMALLER].record if SMALLER in journal.found else {}
        if self.first is None and record and self.now in (None, record["first"], record["now"]):
            self.first, self.now = record["first"], record["now"]

    def begin(self, chosen: int) -> None:
        """Tell how many samples that is in a run that can begin again with fewer."""
        self._chosen = chosen

    def record(self, journal: Journal) -> None:
        """Note in the journal of a run what it has come down to."""
        if self.first is not None:
            journal.add(Part(SMALLER, record={"first": self.first, "now": self.now}))

    def goes_on(self, error: BaseException | None) -> bool:
        """Whether the run will begin again after an error, with fewer samples."""
        return isinstance(error, torch.OutOfMemoryError) and self._chosen > 1

    def halve(self) -> bool:
        """Come down to half, where that is possible."""
        if self._chosen < 2:
            return False
        self.first, self.now = self.first or self._chosen, self._chosen // 2
        return True


def with_smaller_batches(asked: int | None, run: Callable[[BatchSize], T]) -> T:
    """What `run` returns; it is called again with half the samples at once where the device runs out of memory.

    Raises `torch.OutOfMemoryError` where one sample is too much.
    """
    size = BatchSize(asked)
    while True:
        try:
            return run(size)
        except torch.OutOfMemoryError as error:
            if not size.halve():
                raise
            reason = str(error).partition(". ")[0]
        count = "1 sample" if size.now == 1 else f"{size.now} samples"
        logger.warning("%s. Going on with %s at a time.", reason, count)
        gc.collect()  # what the failed run held is in cycles of frames and modules
        torch.cuda.empty_cache()
