"""Loading a packed checkpoint beside the plain one, and packing and unpacking beside copying the file.

    python benchmarks/packed_loading.py [--rounds 5] [--keep FOLDER] [smollm2] [1b]

smollm2: SmolLM2-135M in bfloat16, pruned by magnitude to 50 %. 1b: random weights in the shape of LLaMA-3.2-1B, half of
those in the blocks zero. For each, in turn, every load in a process of its own: transformers' `from_pretrained` of the
plain folder, `secateur.load` of the packed one. Time is that of the call alone, after all imports, and with a forward
of one token: transformers maps plain files, and reads them when they are first used. Memory is the peak of the process
until then, above what it had before the call. The files are in the page cache. Copying is `cp` and then `sync` of
that file, against which `pack` and `unpack`, which end with the same, are measured from start to end.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
import smollm2
from secateur.runtime.pack import pack
from secateur.runtime.unpack import unpack
from where_zeros_pay import one_billion

LOADS = {
    "from_pretrained": "AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')",
    "load": "secateur.load(sys.argv[1], device='cpu')",
}
CHILD = """
import json, sys, time
import torch, secateur, secateur.runtime.load
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

before, started = memory("VmRSS"), time.perf_counter()
model = {load}
seconds = time.perf_counter() - started
with torch.inference_mode():
    model(input_ids=torch.tensor([[1]]))
first = time.perf_counter() - started
print(json.dumps([seconds, first, memory("VmHWM") - before]))
"""


def models(folder: Path, name: str) -> tuple[Path, Path]:
    """The plain and the packed folder of a model, made unless they are there."""
    plain, packed = folder / f"{name}-pruned", folder / f"{name}-packed"
    if not plain.exists() and name == "smollm2":
        source = smollm2.checkpoint(folder / "smollm2-float32")
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder / "smollm2")
        AutoTokenizer.from_pretrained(source).save_pretrained(folder / "smollm2")
        secateur.prune(folder / "smollm2", method="magnitude", output=plain)
    elif not plain.exists():
        _large(plain)
    if not packed.exists():
        pack(plain, packed)
    return plain, packed


def _large(folder: Path) -> None:
    """Random weights in the shape of LLaMA-3.2-1B, every second one of the blocks zero on average."""
    config = one_billion(vocabulary=128256)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for block in model.model.layers:
            for parameter in block.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(torch.rand(parameter.shape) >= 0.5)
    model.save_pretrained(folder)


def loaded(way: str, folder: Path) -> tuple[float, float, float]:
    """Seconds of one load in a process of its own, with the first forward, and peak memory."""
    code = CHILD.format(load=LOADS[way])
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    seconds, first, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, first, peak


def copied(plain: Path, scratch: Path) -> float:
    """Seconds that copying the weights and waiting for the disk takes."""
    started = time.perf_counter()
    for file in plain.glob("*.safetensors"):
        subprocess.run(["cp", str(file), str(scratch / file.name)], check=True)
        subprocess.run(["sync", str(scratch / file.name)], check=True)
    seconds = time.perf_counter() - started
    for file in scratch.iterdir():
        file.unlink()
    return seconds


def loading(plain: Path, packed: Path, rounds: int) -> None:
    size = {folder: sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (plain, packed)}
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in LOADS}
    for _ in range(rounds + 1):
        for way, folder in zip(LOADS, (plain, packed), strict=True):
            found[way].append(loaded(way, folder))
    print(f"{'':18}{'loaded, seconds':>24}{'first token, seconds':>24}{'peak memory':>14}{'of the files':>14}")
    for way, folder in zip(LOADS, (plain, packed), strict=True):
        seconds, first, peak = zip(*found[way][1:], strict=True)  # the first one fills the page cache
        times = "".join(
            f"{statistics.median(one):9.2f} ({min(one):5.2f} to {max(one):5.2f})" for one in (seconds, first)
        )
        middle = statistics.median(peak)
        print(f"{way:18}{times}{middle / 1e6:11.0f} MB{middle / size[folder]:14.3f}")
    for number, what in enumerate(("loaded", "first token")):
        plainly, packedly = (statistics.median(one[number] for one in found[way][1:]) for way in LOADS)
        print(f"{what}: packed takes {packedly / plainly:.2f} of the plain time")


def packing(plain: Path, packed: Path, scratch: Path, rounds: int) -> None:
    times: dict[str, list[float]] = {"cp and sync": [], "pack": [], "unpack": []}
    for _ in range(rounds):
        times["cp and sync"].append(copied(plain, scratch))
        times["pack"].append(pack(plain, scratch / "packed").seconds)
        times["unpack"].append(unpack(packed, scratch / "plain").seconds)
        for folder in ("packed", "plain"):
            shutil.rmtree(scratch / folder)
        os.sync()
    copy = statistics.median(times["cp and sync"])
    for what, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{what:18}{middle:10.2f} ({min(seconds):.2f} to {max(seconds):.2f}) {middle / copy:8.2f} of copying")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2", "1b"], choices=["smollm2", "1b"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder of the models, kept for another time")
    parser.add_argument("--only", choices=["loading", "packing"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        scratch = folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        print(f"{torch.get_num_threads()} threads, median of {arguments.rounds} rounds (lowest to highest)")
        for name in arguments.models:
            plain, packed = models(folder, name)
            print(f"\n{name}: {plain}")
            if arguments.only != "packing":
                loading(plain, packed, arguments.rounds)
            if arguments.only != "loading":
                packing(plain, packed, scratch, arguments.rounds)


if __name__ == "__main__":
    main()
