"""Whether two checkouts of this project write the same files: every method and choice, on real and tiny models.

    python benchmarks/same_outputs.py BEFORE AFTER [--model FOLDER] [--only GLOB]

BEFORE and AFTER are checkouts, such as a `git worktree` of an earlier commit and `.`; both run with this interpreter's
libraries. Each runs the same commands; then the digests of all tensors, of all other files, and of what the commands
print as JSON are compared. Times, versions and dates are left out, and so is what only one side records. Exits with 1
for any difference.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared/data/models/stories260K"
TINY = ("llama", "gpt2", "mixtral", "olmo_hybrid")
VOLATILE = {
    "created",
    "seconds",
    "versions",
    "command",
    "digest",
    "host_bytes",
    "available_host_bytes",
    "libraries",
    "page",
}

SCORES = ("magnitude", "wanda", "wanda_variant", "ria", "gblm", "gblm_inverse", "gradient", "wanda_plus", "pruner_zero")
SOLVERS = ("sparsegpt", "magnitude_iterative", "wanda_iterative", "admm", "alps")
REFINED = (
    "wanda+least_squares",
    "ria+swaps",
    "magnitude+obs_update",
    "alps+least_squares",
    "wanda+swaps+least_squares",
)


def commands(real: bool) -> Iterator[tuple[str, list[str]]]:
    """(name of the output, command) for every case on a model; `MODEL`, `TEXT` and `OUT` are filled in."""
    prune = ["prune", "MODEL", "-o", "OUT"]
    for method in (
        (*SCORES, *SOLVERS, *REFINED) if real else ("wanda", "gblm", "sparsegpt", "alps", "wanda+least_squares")
    ):
        for pattern in (["-s", "0.5"], ["-p", "2:4"]):
            if method == "wanda_variant" and "-p" in pattern:
                continue
            yield f"{method} {pattern[1]}", [*prune, "-m", method, *pattern, "TEXT"]
    for choices in (
        ["--within", "site"],
        ["--propagate", "dense"],
        ["--only", "*.1.*"],
        ["--batch-size", "3"],
        ["--dtype", "bfloat16"],
        ["--per", "matrix"],
    ):
        yield f"wanda {' '.join(choices)}", [*prune, "-m", "wanda", *choices, "TEXT"]
    yield "gblm l1", [*prune, "-m", "gblm", "--norm", "l1", "--alpha", "10", "TEXT"]
    yield "alps site", [*prune, "-m", "alps", "--within", "site", "--per", "row", "TEXT"]
    yield "gradients", ["gradients", "MODEL", "-o", "OUT.safetensors", "--norm", "l1,l2", "TEXT"]
    yield "gblm from file", [*prune, "-m", "gblm", "--gradient", "gradients.safetensors", "TEXT"]
    if real:
        yield "wanda search", [*prune, "-m", "wanda", "--per", "search", "TEXT"]
        yield "dense targets", [*prune, "-m", "wanda+least_squares", "--targets", "dense", "TEXT"]
        residual = ["--within", "site", "--targets", "residual"]
        yield "residual targets", [*prune, "-m", "alps", "--per", "row", *residual, "TEXT"]
        yield "residual sparsegpt", [*prune, "-m", "sparsegpt", *residual, "--correction", "0.7", "TEXT"]
        yield "verify", ["verify", "wanda 0.5", "--source", "MODEL", "--json"]
        yield "inspect", ["inspect", "wanda 2:4", "--json"]
        yield "eval", ["eval", "wanda 0.5", "DATA", "--json"]
        yield "compare", ["compare", "MODEL", "wanda 0.5", "sparsegpt 0.5", "DATA", "--json"]
        block = ["recover", "wanda 0.5", "--method", "block", "-o", "OUT", "--data", "python-docs"]
        yield "recover block", [*block, "--samples", "8", "--length", "64"]
        sweep = ["sweep", "MODEL", "-o", "OUT", "--methods", "magnitude,wanda,sparsegpt", "--sparsity", "0.5,0.6"]
        yield "sweep", [*sweep, "--calibration", "python-docs", "--samples", "8", "--length", "64", "SWEPT"]


def filled(command: list[str], name: str, model: Path, real: bool) -> list[str]:
    """The command with the model, the texts and the output in place."""
    text = ["--calibration", "python-docs"] if real else ["--calibration", str(model / "tokens.safetensors")]
    filling = {
        "MODEL": [str(model)],
        "OUT": [name],
        "OUT.safetensors": [f"{name}.safetensors"],
        "TEXT": [*text, *(["--samples", "8", "--length", "64"] if real else [])],
        "DATA": ["--data", "python-docs", "--length", "64", "--windows", "8"],
        "SWEPT": ["--data", "python-docs", "--eval-length", "64", "--windows", "8"],
    }
    return [part for word in command for part in filling.get(word, [word])]


def work(models: Path, real: Path, only: str) -> None:
    """Run every command of one checkout in the current folder, and print what came of them as JSON."""
    found: dict[str, Any] = {}
    for model in [real, *sorted(models.iterdir())]:
        home = Path(model.name).resolve()
        home.mkdir()
        for name, command in commands(model == real):
            if not fnmatch.fnmatch(f"{model.name}: {name}", only):
                continue
            sys.argv = ["secateur", *filled(command, name, model, model == real)]
            printed, said = io.StringIO(), io.StringIO()
            code: Any = 0
            with contextlib.chdir(home), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
                try:
                    runpy.run_module("secateur", run_name="__main__")
                except SystemExit as end:
                    code = end.code
            last = said.getvalue().strip().splitlines()[-1:] if code else []
            result = {"exit": [code, *last], **files(home, name)}
            if "--json" in command:
                result["printed"] = steady(json.loads(printed.getvalue()))
            found[f"{model.name}: {name}"] = result
            print(f"{model.name}: {name}", file=sys.stderr)
    print(json.dumps(found))


def files(home: Path, name: str) -> dict[str, Any]:
    """What a command wrote: the digest of every tensor and file, and the record of every JSON file."""
    from safetensors import safe_open

    result: dict[str, Any] = {}
    for file in sorted([*home.glob(f"{name}.*"), *(home / name).rglob("*")]):
        if not file.is_file() or file.suffix in (".md", ".lock", ".csv", ".html"):
            continue
        key = file.relative_to(home).as_posix()
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                for tensor in opened.keys():  # noqa: SIM118 - it is no mapping
                    data = opened.get_tensor(tensor)
                    raw = data.contiguous().view(-1).view(__import__("torch").uint8).numpy().tobytes()
                    result[f"{key} {tensor}"] = f"{data.dtype} {tuple(data.shape)} {hashlib.sha256(raw).hexdigest()}"
        elif file.suffix == ".json" and file.name.startswith(("secateur", "sweep", "cell")):
            result[key] = steady(json.loads(file.read_text(encoding="utf-8")))
        else:
            result[key] = hashlib.sha256(file.read_bytes()).hexdigest()
    return result


def steady(value: Any) -> Any:
    """A record without what differs from run to run."""
    if isinstance(value, dict):
        return {key: steady(item) for key, item in value.items() if key not in VOLATILE}
    if isinstance(value, str):
        return value.replace(str(Path.cwd()), "HOME")
    return [steady(item) for item in value] if isinstance(value, list) else value


def differences(before: Any, after: Any, where: str, alone: set[str]) -> Iterator[str]:
    """Every place where both sides have something and it differs; `alone` gets the places that only one side has."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before | after:
            if key in before and key in after:
                yield from differences(before[key], after[key], f"{where} > {key}", alone)
            elif ".safetensors " in key:
                yield f"{where} > {key}: only {'before' if key in before else 'after'}"
            else:
                alone.add(f"{key} ({'before' if key in before else 'after'} only)")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{where} > {number}", alone)
    elif before != after:
        yield f"{where}: {str(before)[:120]} -> {str(after)[:120]}"


def main() -> int:
    """Run both checkouts at once, one thread each, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, metavar="BEFORE AFTER")
    parser.add_argument("--model", type=Path, default=REAL, help="a real model with its tokenizer")
    parser.add_argument("--only", default="*", help='cases to run, such as "llama: wanda*"')
    parser.add_argument("--worker", nargs=1, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker[0], arguments.model, arguments.only)
        return 0
    if len(arguments.checkouts) != 2 or not arguments.model.is_dir():
        parser.error("two checkouts and a model folder are needed; see --help")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        models = Path(scratch) / "models"
        sys.path.insert(0, str(ROOT / "tests"))
        from safetensors.torch import save_file

        import tiny

        for name in TINY:
            tiny.save(name, models / name)
            save_file({"input_ids": tiny.tokens(8, 32)}, models / name / "tokens.safetensors")
        runs = []
        for side, checkout in zip(("before", "after"), arguments.checkouts, strict=True):
            home = Path(scratch) / side
            home.mkdir()
            environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src"), "OMP_NUM_THREADS": "1"}
            worker = [sys.executable, str(Path(__file__).resolve()), "--worker", str(models)]
            worker += ["--model", str(arguments.model.resolve()), "--only", arguments.only]
            quiet = None if side == "after" else subprocess.DEVNULL
            runs.append(subprocess.Popen(worker, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=quiet))
        before, after = (json.loads(run.communicate()[0] or "{}") for run in runs)
    if not before or not after or any(run.returncode for run in runs):
        print("One of the checkouts did not finish.")
        return 1
    alone: set[str] = set()
    found = list(differences(before, after, "", alone))
    for line in found:
        print(line.removeprefix(" > "))
    for line in sorted(alone):
        print(f"recorded by one side: {line}")
    failed = {name: side["exit"] for name, side in after.items() if side["exit"][0]}
    for name, code in failed.items():
        print(f"fails: {name}: {code}")
    digests = sum(len(entry) for entry in before.values())
    print(f"{len(before)} commands, {digests} results, {len(found)} differences, {time.perf_counter() - began:.0f} s")
    return 1 if found or set(before) != set(after) else 0


if __name__ == "__main__":
    sys.exit(main())
