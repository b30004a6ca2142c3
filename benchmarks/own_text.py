"""One method calibrated on several texts, among them the model's own, over several seeds: perplexity on texts.

    python benchmarks/own_text.py MODEL --calibration c4:c4.jsonl --calibration self --data wikitext2:wiki.test.raw
        --data web.jsonl --patterns 50%,2:4 --seeds 0,1,2 --samples 16 --length 256 --json cells.jsonl

Cells that are in the JSON file already are not run again. The table has means and standard deviations over the seeds.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import secateur


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--patterns", default="50%,2:4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sampling")
    parser.add_argument("--window", type=int, default=256, help="evaluation window")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    from secateur.pruning.named import method_of

    how = {name: getattr(given, name) for name in ("samples", "length", "sampling")}
    seeds = [int(seed) for seed in given.seeds.split(",")]
    done = [json.loads(line) for line in given.json.read_text().splitlines()] if given.json.exists() else []

    def figures(folder: str | Path) -> list[float]:
        cut: dict[str, Any] = {"length": given.window, "windows": given.windows}
        return [secateur.perplexity(folder, data, **cut).perplexity for data in given.data]

    def cell(**key: Any) -> list[float]:
        key |= {"model": given.model, "data": given.data, "window": given.window, "windows": given.windows}
        found = next((own["figures"] for own in done if own["key"] == key), None)
        if found is None and "seed" not in key:
            found = figures(given.model)
        elif found is None:
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "pruned"
                options = {name: key[name] for name in ("calibration", "pattern", "seed")}
                secateur.prune(given.model, method=method_of(given.method, ()), output=output, **options, **how)
                found = figures(output)
        own = {"key": key, "figures": found}
        if own not in done:
            done.append(own)
            with given.json.open("a") as stream:
                stream.write(json.dumps(own) + "\n")
        return list(found)

    print(f"dense: {' / '.join(f'{value:.2f}' for value in cell())}\n")
    print("| calibration |", " | ".join(given.patterns.split(",")), "|")
    print("|---|" + "---:|" * len(given.patterns.split(",")))
    for calibration in given.calibration:
        row = []
        for pattern in given.patterns.split(","):
            key = {"calibration": calibration, "pattern": pattern, "method": given.method, **how}
            found = zip(*(cell(seed=seed, **key) for seed in seeds), strict=True)
            row.append(" / ".join(f"{statistics.mean(own):.2f} ± {statistics.stdev(own):.2f}" for own in found))
        print(f"| {calibration} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
