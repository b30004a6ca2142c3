"""Runs of `prune` in processes that are killed, or whose file operations fail: a program of its own.

    python killed_runs.py MODEL FOLDER METHOD kill|fault FIRST LAST SEED

A parent that has imported everything forks a child for each run, so that a run costs no start of Python. It prints one
line of JSON with what it has seen, and ends with an error at the first output that is not what it has to be.
"""

import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.files import names


def prune(model: Path, method: str, out: Path, overwrite: bool = False) -> None:
    ids = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    arguments = {"output": out, "overwrite": overwrite, "resume": True}
    secateur.prune(model, method=method, calibration=ids, batch_size=2, **arguments)


def child(action: Callable[[], None]) -> int:
    """The process id of a copy of this process that does something and ends, with 0 where nothing was raised."""
    process = os.fork()
    if process:
        return process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        action()
    except BaseException:
        os._exit(1)
    os._exit(0)


def end_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def digests(out: Path) -> dict[str, str]:
    """Every file but the card and the manifest, which tell the time; of the manifest what tensors it says there are."""
    found = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in out.iterdir()
        if file.name not in ("README.md", "secateur.json")
    }
    manifest = json.loads((out / "secateur.json").read_text())
    return found | {"matrices": sorted(manifest["matrices"]), **manifest["tensors"], **manifest["source_tensors"]}


def check(out: Path, expected: dict[str, Any]) -> None:
    """Nothing is under the name of the output, or all of it."""
    if out.exists() and digests(out) != expected:
        sys.exit(f"{out}: is not what an uninterrupted run writes")


class Faults:
    """Makes the file operation number `at` of this process fail, of all that change something; counts them."""

    def __init__(self, at: int, how: str) -> None:
        self.count, self.at, self.how = 0, at, how

    def install(self) -> None:
        for name in ("open", "pwrite", "write", "fsync", "fdatasync", "rename", "posix_fallocate", "mkdir", "pread"):
            self._wrap(os, name)
        for module, name in ((io, "open"), (names, "_rename")):
            self._wrap(module, name)

    def _wrap(self, module: Any, name: str) -> None:
        real = getattr(module, name)

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                if self.how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.how == "short" and name in ("pwrite", "write"):
                    short = memoryview(arguments[1])[: max(1, len(arguments[1]) // 2)]
                    return real(arguments[0], short, *arguments[2:])
                if self.how == "short":
                    return real(*arguments, **keywords)
                raise OSError(errno.ENOSPC if self.how == "full" else errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **keywords)

        setattr(module, name, wrapped)


def main() -> None:
    model, folder, method, what, first, last, seed = sys.argv[1:]
    root, draw = Path(folder), random.Random(int(seed))
    whole, out = root / "whole", root / "out"
    prune(Path(model), method, whole)  # here, so that children find everything imported; one thread leaves none behind
    started = time.perf_counter()
    end_of(child(lambda: prune(Path(model), method, out)))
    length = time.perf_counter() - started
    shutil.rmtree(out)
    expected = digests(whole)
    seen = {"kept": 0, "nothing": 0, "whole": 0}
    if what == "fault":
        operations = root / "operations"

        def counted() -> None:
            faults = Faults(0, "")
            faults.install()
            prune(Path(model), method, out)
            operations.write_text(str(faults.count))

        end_of(child(counted))
        in_turn = list(range(1, int(operations.read_text()) + 1))
        draw.shuffle(in_turn)  # the first few are as good a sample as any
        shutil.rmtree(out)
    for number in range(int(first), int(last)):
        if what == "kill":
            process = child(lambda: prune(Path(model), method, out))
            time.sleep(draw.uniform(0, length))
            os.kill(process, signal.SIGKILL)
        else:
            how = ("full", "error", "short", "kill")[number % 4]
            at = in_turn[number % len(in_turn)]

            def faulty(at: int = at, how: str = how) -> None:
                Faults(at, how).install()
                prune(Path(model), method, out)

            process = child(faulty)
        end_of(process)
        check(out, expected)
        partial = root / "out.partial"
        seen["whole" if out.exists() else "kept" if (partial / "journal.jsonl").exists() else "nothing"] += 1
        if not out.exists() or partial.exists():
            if end_of(child(lambda: prune(Path(model), method, out, overwrite=out.exists()))):
                sys.exit(f"{what} {number}: cannot be resumed")
            check(out, expected)
        left = {path.name for path in root.iterdir()} - {"whole", "out", "operations"}
        if left:
            sys.exit(f"{what} {number}: {left} is left")
        shutil.rmtree(out)
    if what == "fault":
        seen["operations"] = len(in_turn)
    print(json.dumps({**seen, "seconds": time.perf_counter() - started, "one run": length}))


if __name__ == "__main__":
    main()
