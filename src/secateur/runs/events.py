"""Where a run is and how long its parts take: one kind of event, one clock."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

PLACING = "placing BOS"  # while a model is asked whether it reads text better behind it

_IN_BLOCK = re.compile(r"^\S+?\.\d+\.(?=\S)")  # of a matrix, the path of its block: model.layers.3.


@dataclass(frozen=True)
class Event:
    """Where a run is: a stage (calibrate, record, read, statistics, solve, forward, write, done) of a block.

    A block that an earlier process has finished has the stages read, forward and replayed.

    Gradients that are taken first have stages of their own, such as "gradients: backward", without a block; so has the
    choice of where BOS stands, "placing BOS".
    """

    stage: str
    block: int = 0
    blocks: int = 0
    done: int = 0
    total: int = 0
    matrix: str | None = None

    @property
    def place(self) -> tuple[str, int, int, str] | None:
        """Where a bar stands: a stage, how much of it is done, how much there is, a note; None where it stays."""
        if self.stage == "calibrate":
            return "calibration", self.done, self.total, ""
        if self.stage == "record":
            return "recording calls", self.done, self.total, ""
        if self.stage.startswith(("gradients", "allocation", PLACING)):
            return self.stage, self.done, self.total, ""
        if not self.blocks:
            return None
        note = self.matrix or f"{self.stage} {self.done}/{self.total}" if self.total else self.stage
        note = _IN_BLOCK.sub("", note).removesuffix(".weight")  # the count says which block
        return "blocks", self.block + (self.stage == "write"), self.blocks, note


OnEvent = Callable[[Event], None]

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is in all."""


def named(progress: Progress, name: str) -> Progress:
    """A `Progress` that tells `progress` of the same stages with a name in front."""
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)


def about(seconds: float) -> str:
    """A duration that is estimated: about 4.2 s, under 1 s."""
    return f"about {seconds_text(seconds)}" if seconds >= 1 else "under 1 s"


def seconds_text(seconds: float) -> str:
    """A duration: 4.2 s, 3 min 10 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


BACKGROUND = ("read", "write")  # parts of a run that overlap the others


@dataclass
class Clock:
    """Seconds by part. Parts that run in the background are counted there and overlap the others.

    `began` is when the run did, by `time.perf_counter`, and `earlier` the seconds of processes that began it.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    synchronise: bool = False
    began: float = field(default_factory=time.perf_counter)
    earlier: float = 0.0

    def resume(self, seconds: Mapping[str, float]) -> None:
        """Count on from what an earlier process had taken."""
        self.seconds = {part: value for part, value in seconds.items() if part != "total"}
        self.earlier = seconds.get("total", 0.0)

    def so_far(self) -> dict[str, float]:
        """Seconds by part until now, and in total."""
        return self.seconds | {"total": self.earlier + time.perf_counter() - self.began}

    def add(self, part: str, started: float, *, background: bool = False) -> float:
        """Add the time since `started` (by `time.perf_counter`) to a part; returns it."""
        if self.synchronise and not background:
            import torch  # here, so that a bar is there before it is imported

            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        self.seconds[part] = self.seconds.get(part, 0.0) + elapsed
        return elapsed

    @contextmanager
    def timed(self, part: str, *, background: bool = False) -> Iterator[None]:
        """Add the time that the block takes to a part, unless it raises; a `background` does not wait for the GPU."""
        started = time.perf_counter()
        yield
        self.add(part, started, background=background)
