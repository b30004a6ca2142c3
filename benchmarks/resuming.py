"""What it costs that a run can be resumed, and what resuming costs: SmolLM2-135M on this machine.

    python benchmarks/resuming.py [--methods wanda,sparsegpt,gblm] [--samples 64] [--length 512] [--rounds 3]

Runs that keep a journal and runs that keep none take turns in one process; the ratio is of their fastest times, and so
is the one of processor seconds. Then a run is ended after half of its blocks and resumed; `both parts` is what the two
take together over a run that is not ended, and `solved again` how many matrices were solved twice.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import secateur
import smollm2
from secateur.runs.events import Event


class EndError(Exception):
    """Ends a run in its middle."""


def spent(run: Callable[[], object]) -> tuple[float, float]:
    """(wall seconds, processor seconds) of a run, with everything before it on the disk."""
    os.sync()
    wall, processor = time.perf_counter(), time.process_time()
    with suppress(EndError):
        run()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="magnitude,wanda,sparsegpt,gblm")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    scratch = Path(tempfile.gettempdir()) / "secateur-benchmarks"
    folder = smollm2.checkpoint(scratch / "smollm2")
    windows = smollm2.windows(folder, arguments.samples, arguments.length)
    print(f"{arguments.samples} samples of {arguments.length} tokens, {torch.get_num_threads()} threads, float32")
    columns = ("no journal s", "journal s", "ratio", "CPU ratio", "spread", "both parts", "solved again")
    print(f"{'':<12}" + "".join(f"{column:>14}" for column in columns), flush=True)
    for method in arguments.methods.split(","):
        solved: list[str | None] = []

        def watch(event: Event, end_at: int | None = None, solved: list[str | None] = solved) -> None:
            if event.stage == "solve":
                solved.append(event.matrix)
            if event.stage == "read" and event.block == end_at:
                raise EndError

        def run(method: str = method, **more: Any) -> None:
            options = {"calibration": windows, "output": scratch / "pruned", "overwrite": True, **more}
            secateur.prune(folder, method=method, **options)

        taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for number in range(arguments.rounds):
            for resumable in (False, True) if number % 2 else (True, False):
                taken[resumable].append(spent(lambda: run(resumable=resumable)))  # noqa: B023
        best = {resumable: [min(parts) for parts in zip(*times, strict=True)] for resumable, times in taken.items()}
        spread = max(max(time[0] for time in times) / min(time[0] for time in times) - 1 for times in taken.values())
        first = spent(lambda: run(on_event=lambda event: watch(event, 15)))
        second = spent(lambda: run(resume=True, on_event=watch))
        print(
            f"{method:<12}{best[False][0]:>14.2f}{best[True][0]:>14.2f}{best[True][0] / best[False][0]:>14.3f}"
            f"{best[True][1] / best[False][1]:>14.3f}{spread:>14.3f}{(first[0] + second[0]) / best[True][0]:>14.2f}"
            f"{len(solved) - len(set(solved)):>14}",
            flush=True,
        )


if __name__ == "__main__":
    main()
