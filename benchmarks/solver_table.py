"""SmolLM2-135M pruned by every kind of solver: perplexity on several texts, solver time and peak memory.

    python benchmarks/solver_table.py --calibration c4.jsonl --data wikitext2:wiki.test.raw --data web.jsonl
        --methods wanda,sparsegpt,alps,wanda+least_squares,alps@row@site@residual --patterns 0.5,2:4 --json cells.jsonl

A method may be refined with a plus, and followed by @row or @matrix (comparison group of unstructured patterns), @site
(statistics in true sequential order) and @dense or @residual (targets). --option and --correction are those of
`secateur prune`, for all methods of the run. Every cell is pruned and evaluated in a process of its own, for its peak
memory, and becomes one line of the JSON file; cells that are in the file already are not run again. The table shows
all of them.
"""

import argparse
import json
import resource
import tempfile
from pathlib import Path
from typing import Any

import secateur
import smollm2
from cells import perplexities, results

SCRATCH = Path(tempfile.gettempdir()) / "secateur-benchmarks"


def run_cell(cell: dict[str, Any], pruned: Path) -> dict[str, Any]:
    """Prune into a folder and evaluate; the cell with its figures."""
    from secateur.pruning.named import method_of

    folder = SCRATCH / "smollm2"
    figures: dict[str, Any] = {}
    if cell["method"] != "dense":
        name, *choices = cell["method"].split("@")
        text = cell["pattern"]

        def chosen(*words: str) -> Any:
            return next((word for word in words if word in choices), None)

        manifest = secateur.prune(
            folder,
            method=method_of(name, cell["options"] or ()),
            pattern=secateur.parse_pattern(text)
            if ":" in text
            else secateur.Unstructured(float(text), chosen("row", "matrix")),
            calibration=cell["calibration"],
            sampling="concat",
            samples=cell["samples"],
            length=cell["length"],
            seed=cell["seed"],
            within="site" if "site" in choices else "block",
            targets=chosen("dense", "residual") or "pruned",
            correction=cell["correction"],
            output=pruned,
        )
        errors = [entry["notes"].get("reconstruction_error") for entry in manifest.matrices.values()]
        figures = {
            "solve seconds": manifest.seconds["solve"],
            "prune seconds": manifest.seconds["total"],
            "prune peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "reconstruction error": sum(errors) / len(errors) if all(error is not None for error in errors) else None,
        }
        folder = pruned
    return {**cell, **figures, **perplexities(folder, cell)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--data", action="append")
    parser.add_argument("--methods", default="magnitude,wanda,sparsegpt,admm,alps")
    parser.add_argument("--patterns", default="0.5,2:4")
    parser.add_argument("--option", action="append", help="NAME=VALUE of the methods; may be repeated")
    parser.add_argument("--correction", type=float)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--window", type=int, default=1024, help="evaluation window")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--json", type=Path, default=SCRATCH / "cells.jsonl")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
            print(json.dumps(run_cell(json.loads(arguments.cell), Path(scratch) / "pruned")))
        return
    smollm2.checkpoint(SCRATCH / "smollm2")
    common = {
        "calibration": arguments.calibration,
        "data": arguments.data or ["python-docs"],
        "samples": arguments.samples,
        "length": arguments.length,
        "window": arguments.window,
        "windows": arguments.windows,
    }
    cells: list[dict[str, Any]] = [{**common, "method": "dense", "pattern": "", "seed": 0}]
    common |= {"options": arguments.option, "correction": arguments.correction}
    for pattern in arguments.patterns.split(","):
        for seed in map(int, arguments.seeds.split(",")):
            for method in arguments.methods.split(","):
                cells.append({**common, "method": method, "pattern": pattern, "seed": seed})
    names = [Path(data).name for data in common["data"]]
    print(f"{'method':<28}{'pattern':<8}{'seed':>5}" + "".join(f"{name[-22:]:>24}" for name in names), end="")
    print(f"{'solve s':>9}{'prune s':>9}{'peak MiB':>10}", flush=True)
    for cell, result in results(__file__, cells, arguments.json):
        values = (f"{result[name]['perplexity']:.3f} ± {result[name]['perplexity_error']:.3f}" for name in names)
        costs = [result.get(key) for key in ("solve seconds", "prune seconds", "prune peak MiB")]
        print(
            f"{cell['method']:<28}{cell['pattern']:<8}{cell['seed']:>5}"
            + "".join(f"{value:>24}" for value in values)
            + ("" if None in costs else f"{costs[0]:>9.1f}{costs[1]:>9.1f}{costs[2]:>10.0f}"),
            flush=True,
        )


if __name__ == "__main__":
    main()
