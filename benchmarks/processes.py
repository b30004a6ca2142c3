"""What a second process gains, and whether it changes a bit: the same runs with one process and with several.

    python benchmarks/processes.py [--runs wanda,sparsegpt,alps] [--counts 1,2] [--samples 16] [--length 512]
    python benchmarks/processes.py --model 70b-3 --runs wanda,sparsegpt --samples 8 --length 128 --batch-size 4

Every process has one thread, so that n of them use n cores. A run is a method and, after slashes, how it goes over the
blocks, as in `prune_cost.py`. Seconds are from the manifest: `in all` with reading the text and opening the model,
which every process does, but without starting Python, and `blocks` from the first block on. Outputs are compared by the
digests of their tensors. Memory is the peak of the resident size of the largest process. Beside both stands what
`secateur plan --processes` said just before.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from prune_cost import model_folder

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def arguments_of(run: str, model: Path, arguments: argparse.Namespace) -> list[str]:
    """What `plan` and `prune` are both given."""
    method, *ways = run.split("/")
    options = [str(model), "--method", method, "--calibration", "python-docs", "--sampling", "concat"]
    options += ["--samples", str(arguments.samples), "--length", str(arguments.length)]
    options += ["--within", "site"] if "site" in ways else []
    options += ["--targets", "residual"] if "residual" in ways else []
    return options + (["--batch-size", str(arguments.batch_size)] if arguments.batch_size else [])


def planned(options: list[str], count: int) -> dict[str, Any]:
    """What the dry run says."""
    command = [
        sys.executable,
        "-m",
        "secateur",
        "plan",
        *options,
        "--device",
        "cpu",
        "--processes",
        str(count),
        "--json",
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def peak_of(process: psutil.Process) -> int:
    """The most that a process has had resident so far; 0 for one that is over."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def pruned(options: list[str], output: Path, count: int) -> dict[str, Any]:
    """Prune in so many processes; seconds, peak resident bytes of the largest process, and what was written."""
    command = [sys.executable, "-m", "secateur", "prune", *options, "-o", str(output)]
    command += ["--device", ",".join(["cpu"] * count)]
    peak = 0
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            with suppress(psutil.Error, OSError):
                own = psutil.Process(running.pid)
                peak = max(peak, *(peak_of(each) for each in [own, *own.children(recursive=True)]))
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
    parser.add_argument("--model", default="smollm2", help="smollm2, 1b, 70b-3, or a checkpoint")
    parser.add_argument("--runs", default="wanda,sparsegpt,alps,alps/site/residual")
    parser.add_argument("--counts", default="1,2", help="numbers of processes; ratios are to the first one")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--rounds", type=int, default=1, help="the fastest counts")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.counts.split(",")]
    print(f"{arguments.model}, {arguments.samples} samples of {arguments.length} tokens, one thread in each process")
    print(
        f"{'':24}{'processes':>10}{'in all s':>10}{'ratio':>8}{'said s':>8}{'blocks s':>10}{'ratio':>8}"
        f"{'peak GiB':>10}{'said':>8}  same output"
    )
    kept = Path(tempfile.gettempdir()) / "secateur-benchmarks"
    kept.mkdir(exist_ok=True)
    model = model_folder(arguments.model, kept)
    with tempfile.TemporaryDirectory(dir=kept) as scratch:
        for run in arguments.runs.split(","):
            found: dict[int, dict[str, Any]] = {}
            options = arguments_of(run, model, arguments)
            said = {count: planned(options, count) for count in counts}
            for round_ in range(arguments.rounds):
                for count in counts:
                    output = Path(scratch) / f"{run.replace('/', '-')}-{count}-{round_}"
                    own = pruned(options, output, count)
                    shutil.rmtree(output)
                    if count not in found or own["seconds"]["total"] < found[count]["seconds"]["total"]:
                        found[count] = own
            first = found[counts[0]]
            for count in counts:
                own = found[count]
                same = "yes" if own["tensors"] == first["tensors"] else "NO"
                total, inside, plan = own["seconds"]["total"], blocks(own["seconds"]), said[count]
                print(
                    f"{run:24}{count:10}{total:10.1f}{first['seconds']['total'] / total:8.2f}{plan['seconds']:8.1f}"
                    f"{inside:10.1f}{blocks(first['seconds']) / inside:8.2f}"
                    f"{own['peak'] / 2**30:10.2f}{plan['host_bytes'] / 2**30:8.2f}  {same}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
