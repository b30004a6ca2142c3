"""What recovery brings and what merging costs: perplexities of a model pruned to half by Wanda, as a table.

python benchmarks/recovery_table.py stories260K tinystories_sample.txt --steps 24 --batch-size 8 --length 128 \
    --held-out 16 --lr 4e-3
"""

import argparse
import tempfile
from pathlib import Path

import secateur


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    given = parser.parse_args()
    settings = {name: getattr(given, name) for name in ("steps", "batch_size", "length", "held_out", "lr")}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pruned = root / "pruned"
        secateur.prune(
            given.model,
            method=secateur.wanda(),
            calibration=given.text,
            sampling="concat",
            samples=given.samples,
            length=given.calibration_length,
            output=pruned,
        )
        print("| method | before | trained | merged, mask kept |\n|---|---:|---:|---:|")
        for method, targets in (
            ("lora", ()),
            ("sparse-lora", ()),
            ("lora", ("all-linear",)),
            ("sparse-lora", ("all-linear",)),
            ("full", ()),
        ):
            output = root / f"{method}{len(targets)}"
            result = secateur.fine_tune(pruned, output, method=method, data=given.text, targets=targets, **settings)
            row = [f"{method}, all matrices" if targets else method]
            row += [f"{result.before.perplexity:.2f}", f"{result.after.perplexity:.2f}", ""]
            if method != "full":
                merged = secateur.merge(output, pruned, root / f"{output.name}-merged").merged
                row[-1] = f"{merged.perplexity:.2f}"
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
