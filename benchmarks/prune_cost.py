"""What pruning costs in plain forwards: SmolLM2-135M on this machine's CPU.

    python benchmarks/prune_cost.py [--samples 64] [--length 512] [--rounds 3]

The floor: Wanda needs each block's inputs behind the pruned blocks before it, so two forwards through the blocks, less
what need not be done (the first pass ends at a block's last statistic, the last block has no second pass, and the head
never runs). The baseline is one plain forward of the same tokens through the same model, head included, measured
alternately with the pruning in the same process. Reading and writing are excluded from the ratio, and shown.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
import smollm2

COMPUTING = ("record calls", "statistics forward", "solve", "propagation forward")


def plain_forward(model: torch.nn.Module, ids: torch.Tensor, batch_size: int) -> float:
    started = time.perf_counter()
    with torch.no_grad():
        for batch in ids.split(batch_size):
            model(input_ids=batch, use_cache=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    scratch = Path(tempfile.gettempdir()) / "secateur-benchmarks"
    folder = smollm2.checkpoint(scratch / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = secateur.calibration_windows(
        "python-docs", tokenizer, samples=arguments.samples, length=arguments.length, sampling="concat"
    )
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch_size = max(1, 2048 // arguments.length)
    plain_forward(dense, windows.input_ids[:batch_size], batch_size)
    print(f"{arguments.samples} samples of {arguments.length} tokens, {torch.get_num_threads()} threads, float32")
    print(f"{'method':<22}{'pruning s':>10}{'forward s':>10}{'ratio':>7}{'masks':>8}{'whole run s':>13}")
    for name, method, pattern in (
        ("wanda 0.5", secateur.wanda(), secateur.Unstructured(0.5)),
        ("wanda 2:4", secateur.wanda(), secateur.NM(2, 4)),
        ("magnitude 0.5", secateur.magnitude(), secateur.Unstructured(0.5)),
    ):
        rows = []
        for _ in range(arguments.rounds):
            before = plain_forward(dense, windows.input_ids, batch_size)
            started = time.perf_counter()
            manifest = secateur.prune(
                folder,
                method=method,
                pattern=pattern,
                calibration=windows,
                batch_size=batch_size,
                output=scratch / "pruned",
                overwrite=True,
            )
            whole = time.perf_counter() - started
            after = plain_forward(dense, windows.input_ids, batch_size)
            forward = (before + after) / 2
            computing = sum(manifest.seconds.get(part, 0.0) for part in COMPUTING)
            rows.append(
                (computing / forward, computing, forward, manifest.seconds["solve"] / computing, whole, manifest)
            )
        ratio, computing, forward, masks, whole, manifest = sorted(rows, key=lambda row: row[0])[len(rows) // 2]
        print(f"{name:<22}{computing:>10.2f}{forward:>10.2f}{ratio:>7.2f}{masks:>8.1%}{whole:>13.2f}")
        print("    " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in manifest.seconds.items()))
    print(
        f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB (dense baseline in memory too)"
    )


if __name__ == "__main__":
    main()
