"""What pruning costs in plain forwards: SmolLM2-135M on this machine's CPU.

    python benchmarks/prune_cost.py [--samples 64] [--length 512] [--rounds 3]

The floor: Wanda needs each block's inputs after the pruned blocks before it, so two forwards through the blocks, less
what need not be done (the first pass ends at a block's last statistic, the last block has no second pass, and the head
never runs). The baseline is one plain forward of the same tokens through the same model, measured before and after
the pruning in the same process: whole, as a user would run it, and without the head and its logits, which is the
stricter comparison. Reading and writing are excluded from the ratios, and shown.
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
    """Seconds of one forward of all tokens, batch by batch."""
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
    parser.add_argument("--patterns", default="0.5,2:4")
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
    columns = ("pruning s", "forward s", "ratio", "no head s", "ratio", "masks", "whole run s")
    print(f"{'wanda':<8}" + "".join(f"{column:>12}" for column in columns), flush=True)
    for text in arguments.patterns.split(","):
        pattern = secateur.parse_pattern(text) if ":" in text else secateur.Unstructured(float(text))
        rows = []
        for _ in range(arguments.rounds):
            forwards = [plain_forward(model, windows.input_ids, batch_size) for model in (dense, dense.model)]
            started = time.perf_counter()
            manifest = secateur.prune(
                folder,
                method=secateur.wanda(),
                pattern=pattern,
                calibration=windows,
                batch_size=batch_size,
                output=scratch / "pruned",
                overwrite=True,
            )
            run = time.perf_counter() - started
            again = [plain_forward(model, windows.input_ids, batch_size) for model in (dense, dense.model)]
            whole, headless = ((before + after) / 2 for before, after in zip(forwards, again, strict=True))
            computing = sum(manifest.seconds.get(part, 0.0) for part in COMPUTING)
            masks = manifest.seconds["solve"] / computing
            rows.append(((computing, whole, computing / whole, headless, computing / headless, masks, run), manifest))
        numbers, manifest = sorted(rows, key=lambda row: row[0][4])[len(rows) // 2]
        computing, whole, ratio, headless, strict, masks, run = numbers
        print(
            f"{text:<8}{computing:>12.2f}{whole:>12.2f}{ratio:>12.2f}{headless:>12.2f}{strict:>12.2f}"
            f"{masks:>12.1%}{run:>12.2f}"
        )
        print("    " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in manifest.seconds.items()), flush=True)
    print(
        f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB (dense baseline in memory too)"
    )


if __name__ == "__main__":
    main()
