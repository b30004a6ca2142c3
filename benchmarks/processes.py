"""What a second process gains, and whether it changes a bit: the same runs with one process and with several.

    python benchmarks/processes.py [--runs wanda,sparsegpt,alps] [--counts 1,2] [--samples 16] [--length 512]

Every process has one thread, so that n of them use n cores. A run is a method and, after slashes, how it goes over the
blocks, as in `prune_cost.py`. Seconds are from the manifest: `in all` with reading the text and opening the model,
which every process does, but without starting Python, and `blocks` from the first block on. Outputs are compared by the
digests of their tensors. Memory is the largest that one process had resident, looked at every 0.1 s.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from prune_cost import model_folder


def pruned(run: str, model: Path, output: Path, count: int, samples: int, length: int) -> dict[str, Any]:
    """Prune in so many processes; seconds, peak resident bytes of the largest process, and what was written."""
    method, *ways = run.split("/")
    options = ["--within", "site"] if "site" in ways else []
    options += ["--targets", "residual"] if "residual" in ways else []
    command = [sys.executable, "-m", "secateur", "prune", str(model), "-o", str(output), "--method", method, *options]
    command += ["--calibration", "python-docs", "--sampling", "concat", "--samples", str(samples)]
    command += ["--length", str(length), "--device", ",".join(["cpu"] * count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    peak = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            with suppress(psutil.Error):
                own = psutil.Process(running.pid)
                peak = max(peak, *(each.memory_info().rss for each in [own, *own.children(recursive=True)]))
            time.sleep(0.1)
    if running.returncode:
        sys.exit(f"{' '.join(command)}: ended with {running.returncode}")
    manifest = json.loads((output / "secateur.json").read_text())
    return {"seconds": manifest["seconds"], "tensors": manifest["tensors"], "peak": peak}


def blocks(seconds: dict[str, float]) -> float:
    """What a run took from the first block on."""
    return sum(value for part, value in seconds.items() if part not in ("total", "read", "write", "record calls"))


def main() -> None:
    """Print seconds, ratios to one process, and whether the outputs are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, 1b, or a checkpoint")
    parser.add_argument("--runs", default="wanda,sparsegpt,alps,alps/site/residual")
    parser.add_argument("--counts", default="1,2", help="numbers of processes; ratios are to the first one")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1, help="the fastest counts")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.counts.split(",")]
    print(f"{arguments.model}, {arguments.samples} samples of {arguments.length} tokens, one thread in each process")
    print(
        f"{'':24}{'processes':>10}{'in all s':>10}{'ratio':>8}{'blocks s':>10}{'ratio':>8}{'peak GiB':>10}  same output"
    )
    kept = Path(tempfile.gettempdir()) / "secateur-benchmarks"
    kept.mkdir(exist_ok=True)
    model = model_folder(arguments.model, kept)
    with tempfile.TemporaryDirectory(dir=kept) as scratch:
        for run in arguments.runs.split(","):
            found: dict[int, dict[str, Any]] = {}
            for round_ in range(arguments.rounds):
                for count in counts:
                    output = Path(scratch) / f"{run.replace('/', '-')}-{count}-{round_}"
                    own = pruned(run, model, output, count, arguments.samples, arguments.length)
                    if count not in found or own["seconds"]["total"] < found[count]["seconds"]["total"]:
                        found[count] = own
            first = found[counts[0]]
            for count in counts:
                own = found[count]
                same = "yes" if own["tensors"] == first["tensors"] else "NO"
                figures = ""
                for part in (lambda seconds: seconds["total"], blocks):
                    spent = part(own["seconds"])
                    figures += f"{spent:10.1f}{part(first['seconds']) / spent:8.2f}"
                print(f"{run:24}{count:10}{figures}{own['peak'] / 2**30:10.2f}  {same}", flush=True)


if __name__ == "__main__":
    main()
