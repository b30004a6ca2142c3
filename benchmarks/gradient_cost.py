"""What gradient norms cost: SmolLM2-135M on this machine's CPU, streamed and with the whole model in memory.

    python benchmarks/gradient_cost.py [--samples 32] [--length 512]

The floor: a forward that saves what goes into each block, and for each block once more a forward, the gradients of
its states and those of its weights: the work of four forwards through the blocks, and of two and a half through the
head. The streamed pass is measured whole, with reading the model and writing the file. The baselines are one plain
forward of the same tokens, and what the published code does: `loss.backward()` on the whole model for one sample at a
time, and then a loop over its matrices that adds |g| to one accumulator (l1) or g ** 2 to another (l2). Every part
runs in a process of its own, for its peak memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import secateur
import smollm2

SCRATCH = Path(tempfile.gettempdir()) / "secateur-benchmarks"


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2.checkpoint(SCRATCH / "smollm2"), dtype=torch.float32).eval()


def forward(ids: torch.Tensor) -> float:
    model = load()
    batches = ids.split(max(1, 2048 // ids.shape[1]))
    with torch.no_grad():
        model(input_ids=batches[0], use_cache=False)
        started = time.perf_counter()
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    return time.perf_counter() - started


def streamed(ids: torch.Tensor, norms: str) -> float:
    started = time.perf_counter()
    file = SCRATCH / f"gradients-{norms}.safetensors"
    secateur.gradients(SCRATCH / "smollm2", file, norms=norms.split("+"), calibration=ids, overwrite=True)  # type: ignore[arg-type]
    return time.perf_counter() - started


def whole(ids: torch.Tensor, norms: str) -> float:
    model = load()
    matrices = {name: p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2}
    totals = {(norm, name): torch.zeros_like(p) for name, p in matrices.items() for norm in norms.split("+")}
    started = time.perf_counter()
    for sample in ids:
        model.zero_grad(set_to_none=True)
        model(input_ids=sample[None], labels=sample[None], use_cache=False).loss.backward()
        for name, parameter in matrices.items():
            for norm in norms.split("+"):
                totals[norm, name] += parameter.grad.abs() if norm == "l1" else parameter.grad**2
    seconds = time.perf_counter() - started
    if "l1" in norms:
        compare({name: total for (norm, name), total in totals.items() if norm == "l1"}, norms)
    return seconds


def compare(totals: dict[str, torch.Tensor], norms: str) -> None:
    """The largest difference to the streamed norms, relative to each matrix's own size."""
    from safetensors.torch import load_file

    ours = load_file(SCRATCH / f"gradients-{norms}.safetensors")
    worst = max(float((ours[f"l1:{name}"] - total).norm() / total.norm()) for name, total in totals.items())
    print(json.dumps({"largest difference": worst}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--norms", default="l1")
    arguments = parser.parse_args()
    tokens = SCRATCH / "gradient-tokens.safetensors"
    if arguments.part is None:
        folder = smollm2.checkpoint(SCRATCH / "smollm2")
        from safetensors.torch import save_file

        windows = smollm2.windows(folder, arguments.samples, arguments.length)
        save_file({"input_ids": windows.input_ids}, tokens)
        print(f"{arguments.samples} samples of {arguments.length} tokens, {torch.get_num_threads()} threads, float32")
        print(f"{'part':<28}{'seconds':>9}{'forwards':>10}{'peak MiB':>10}", flush=True)
        plain = None
        for part in ("forward", "streamed l1", "whole l1", "streamed l1+l2", "whole l1+l2", "forward"):
            name, _, norms = part.partition(" ")
            command = [sys.executable, __file__, "--part", name, "--norms", norms or "l1"]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            result = json.loads(lines[-1])
            plain = plain or result["seconds"]
            note = f"  {lines[-2]}" if len(lines) > 1 else ""
            print(
                f"{part:<28}{result['seconds']:>9.2f}{result['seconds'] / plain:>10.2f}{result['peak']:>10.0f}{note}",
                flush=True,
            )
        return
    from safetensors.torch import load_file

    ids = load_file(tokens)["input_ids"]
    seconds = {
        "forward": lambda: forward(ids),
        "streamed": lambda: streamed(ids, arguments.norms),
        "whole": lambda: whole(ids, arguments.norms),
    }[arguments.part]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


if __name__ == "__main__":
    main()
