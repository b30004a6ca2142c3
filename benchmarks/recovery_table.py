"""What each way of recovery brings for the same time: perplexities, trained weights, sparsity on the files, memory.

    python benchmarks/recovery_table.py ./pruned --dense ./model --text c4.jsonl --data wikitext2 --data web.jsonl
        --ways lora "sparse-lora,targets=all-linear,lr=2e-3" full,lr=3e-4 block,samples=64,length=512 --minutes 20

A way is a method, with any settings of `fine_tune` or `reconstruct` after it. An adapter is merged with its zeros
kept, and that is measured; one of `lora` also beside the weights, as it is served. Every way runs in a process of its
own, on as many cores as OMP_NUM_THREADS says, and becomes one line of the JSON file; lines that are there already are
not run again. The gap is the difference of perplexities to the dense model, which is measured with the pruned ones.

The minutes are those of the command: training with its evaluations, or for block the whole run. The seconds are those
of the whole call, with loading, packing and writing.
"""

import argparse
import ast
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import secateur
from cells import perplexities, results
from secateur.models.opening.opened import open_source
from secateur.recover.forecast import count_parameters

SCRATCH = Path(tempfile.gettempdir()) / "secateur-benchmarks" / "recovery"


def run_cell(cell: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """The perplexities of a model, or of what one way of recovery makes of it in an empty folder."""
    name, *settings = cell["way"].split(",")
    given = {key: setting_of(value) for key, value in (setting.split("=", 1) for setting in settings)}
    folder = Path(cell["model"])
    figures: dict[str, Any] = {}
    if name:
        if "steps" not in given:
            given["minutes"] = cell["minutes"]
        if "targets" in given and name != "block":
            given["targets"] = (given["targets"],)
        output = scratch / "recovered"
        started, before = time.perf_counter(), time.process_time()
        if name == "block":
            manifest = secateur.reconstruct(folder, calibration=cell["text"], output=output, **given)
            losses = [(block["before"], block["after"]) for block in (manifest.recovery or {})["blocks"]]
            figures["block losses"] = losses
            trained = manifest.totals["weights"] - manifest.totals["zeros"]
        else:
            result = secateur.fine_tune(folder, output, method=name, data=cell["text"], **given)
            trained = result.record["trainable"]
            figures |= {"steps": result.record["steps"], "curve": result.record["curve"]}
        figures |= {
            "trained": trained,
            "seconds": time.perf_counter() - started,
            "CPU seconds": time.process_time() - before,
            "threads": torch.get_num_threads(),
            "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        if name == "lora":
            # Its outputs beside the weights: the same numbers, but for rounding, as filled zeros.
            secateur.merge(output, folder, scratch / "dense", mask="drop", evaluate=False)
            figures["beside"] = measure(scratch / "dense", cell)
        if name in ("lora", "sparse-lora"):
            secateur.merge(output, folder, scratch / "merged", evaluate=False)
            folder = scratch / "merged"
        else:
            folder = output
        checked = secateur.verify(folder)
        if not checked.ok:
            raise SystemExit(f"{cell['way']}: {checked.problems[0]}")
    figures["parameters"] = count_parameters(open_source(str(folder)))
    return {**cell, **figures, **measure(folder, cell)}


def setting_of(text: str) -> Any:
    """A number where it is one, and the text where not."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def measure(folder: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """The sparsity of the prunable weights, counted on the files, and the perplexity on every text."""
    return {"sparsity": secateur.inspect(folder).sparsity, **perplexities(folder, cell)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", nargs="*")
    parser.add_argument("--dense", help="the model before it was pruned")
    parser.add_argument("--text", default="python-docs")
    parser.add_argument("--data", action="append")
    parser.add_argument("--ways", nargs="+", default=["lora", "sparse-lora", "full", "block"])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--window", type=int, default=1024, help="evaluation window")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--json", type=Path, default=SCRATCH / "cells.jsonl")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
            print(json.dumps(run_cell(json.loads(arguments.cell), Path(scratch))))
        return
    if not arguments.dense:
        parser.error("--dense: needed, for the gap")
    SCRATCH.mkdir(parents=True, exist_ok=True)
    common = {name: getattr(arguments, name) for name in ("text", "minutes", "window", "windows")}
    common["data"] = arguments.data or ["python-docs"]
    cells = [{**common, "model": arguments.dense, "way": ""}]
    cells += [{**common, "model": folder, "way": way} for folder in arguments.pruned for way in ("", *arguments.ways)]
    names = [Path(data).name for data in common["data"]]
    dense: dict[str, float] = {}
    before: dict[str, float] = {}
    print(f"| model | way | trained | sparsity | {' | '.join(f'{name} | gap closed' for name in names)} | s | MiB |")
    print("|---" * (6 + 2 * len(names)) + "|", flush=True)
    for cell, result in results(__file__, cells, arguments.json):
        dense = dense or {name: result[name]["perplexity"] for name in names}
        if not cell["way"]:
            before = {name: result[name]["perplexity"] for name in names}
        for kind in (" beside the weights", ", merged") if "beside" in result else ("",):
            figures = result["beside"] if kind.startswith(" ") else result
            columns = [f"{result['trained'] / result['parameters']:.2%}" if cell["way"] else ""]
            columns.append(f"{figures['sparsity']:.4%}")
            for name in names:
                found, gap = figures[name]["perplexity"], before[name] - dense[name]
                columns.append(f"{found:.2f} ± {figures[name]['perplexity_error']:.2f}")
                columns.append(f"{(before[name] - found) / gap:.0%}" if cell["way"] else "")
            columns += [f"{result['seconds']:.0f}", f"{result['peak MiB']:.0f}"] if cell["way"] else ["", ""]
            print(f"| {Path(cell['model']).name} | {cell['way']}{kind} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
