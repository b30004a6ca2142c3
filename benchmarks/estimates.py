"""What `plan` says a run will take beside what it takes: memory and time of `prune` on random models of many shapes.

    python benchmarks/estimates.py [--only gemma,moe] [--file results.jsonl] [--rounds 1]

Each model is made on disk, `plan` and `prune` run as users run them, in processes of their own, and the table shows
the peak of the resident size and the seconds beside the estimates. The exit code is 1 where an estimate of memory is
off by more than 15 %, or one of time by more than a factor of 1.5. Timings want a quiet machine; with `--rounds` the
fastest of several runs counts.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY, TIME = 1.15, 1.5  # how far off an estimate may be

# Runs the command line in this process; the last line on the standard error is what it took.
CHILD = """
import json, sys, time
import psutil
from pathlib import Path
from secateur.cli import main
try:
    main()
finally:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    times = psutil.Process().cpu_times()
    wall = time.time() - psutil.Process().create_time()
    peak = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"peak": peak, "wall": wall, "cpu": times.user + times.system}), file=sys.stderr)
"""


@dataclass(frozen=True)
class Case:
    """A model, and how it is pruned."""

    name: str
    shape: dict[str, Any]  # of the configuration
    method: str
    samples: int = 16
    length: int = 512
    dtype: str = "bfloat16"
    options: tuple[str, ...] = ()
    kind: str = "llama"


def shape(hidden: int, middle: int, blocks: int, heads: int, keys: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    """The fields of a configuration."""
    return {
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        **more,
    }


GEMMA = shape(640, 2048, 10, 4, 1, 262144, head_dim=256, tie_word_embeddings=True, query_pre_attn_scalar=256)
QWEN = shape(896, 4864, 6, 14, 2, 151936, tie_word_embeddings=True)
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "head_dim": 64}
SITES = ("--within", "site")

CASES = (
    Case("gemma, 262k tied", GEMMA, "wanda", kind="gemma3_text"),
    Case("gemma, no data", GEMMA, "magnitude", kind="gemma3_text"),
    Case("qwen, 152k tied", QWEN, "sparsegpt", kind="qwen2", samples=8),
    Case("128k untied", shape(1024, 2816, 4, 16, 4, 128256), "wanda"),
    Case("128k untied float32", shape(768, 2048, 4, 12, 12, 128256), "sparsegpt", dtype="float32", samples=8),
    Case("deep and narrow", shape(256, 768, 40, 4, 4, 8192), "wanda", samples=32),
    Case("deep, float32", shape(384, 1024, 24, 6, 2, 16000), "wanda", dtype="float32", samples=64, length=256),
    Case("wide and shallow", shape(2048, 5632, 3, 16, 4, 32000), "sparsegpt", samples=8),
    Case("wide, 2:4", shape(2048, 8192, 3, 32, 8, 32000), "wanda", samples=8, options=("--pattern", "2:4")),
    Case("wide, no data", shape(2560, 6912, 5, 20, 20, 32000), "magnitude", dtype="float32"),
    Case("few tokens", shape(1536, 4096, 6, 12, 12, 32000), "wanda", samples=2, length=128),
    Case("long windows", shape(512, 1408, 6, 8, 8, 16000), "wanda", samples=4, length=4096),
    Case("alps", shape(768, 2048, 2, 12, 12, 16000), "alps", samples=8),
    Case("gradients", shape(768, 2048, 8, 12, 12, 32000), "gblm", samples=16),
    Case("gradients, 128k tied", shape(576, 1536, 6, 9, 3, 128256, tie_word_embeddings=True), "gblm", samples=8),
    Case("regional gradients", shape(1024, 2816, 4, 16, 16, 32000), "wanda_plus", samples=8),
    Case("residual", shape(768, 2048, 4, 12, 12, 32000), "sparsegpt", options=(*SITES, "--targets", "residual")),
    Case("dense targets", shape(768, 2048, 4, 12, 12, 32000), "sparsegpt", options=("--targets", "dense")),
    Case("experts", shape(768, 2048, 4, 12, 4, 32000, **EXPERTS), "wanda", kind="qwen3_moe"),
    Case("experts, Gram", shape(768, 2048, 2, 12, 4, 32000, **EXPERTS), "sparsegpt", kind="qwen3_moe"),
)


@dataclass
class Result:
    """What was estimated and measured."""

    case: str
    memory: float
    seconds: float
    peak: float
    wall: float
    planning: float
    parts: dict[str, float] = field(default_factory=dict)


def make(case: Case, folder: Path) -> None:
    """Write a random model and random tokens."""
    import torch
    from safetensors.torch import save_file
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[case.kind](**case.shape)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    model.save_pretrained(folder / "model", max_shard_size="2GB")
    ids = torch.randint(3, case.shape["vocab_size"], (case.samples, case.length))
    save_file({"input_ids": ids}, folder / "ids.safetensors")


def run(command: str, case: Case, folder: Path, *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a command prints as JSON, and what its process took."""
    pattern = () if "--pattern" in case.options else ("--sparsity", "0.5")
    words = [command, str(folder / "model"), "-o", str(folder / "out"), "--method", case.method, *pattern]
    words += [*case.options, "--calibration", str(folder / "ids.safetensors"), "--json", "--device", "cpu", *more]
    if "--samples" not in words:
        words += ["--samples", str(case.samples), "--length", str(case.length)]
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case.name}: {' '.join(words)}\n{done.stderr}")
    return json.loads(done.stdout), json.loads(done.stderr.splitlines()[-1])


def measure(case: Case, rounds: int) -> Result:
    """Plan and prune one case."""
    with tempfile.TemporaryDirectory(prefix="secateur-estimates-") as name:
        folder = Path(name)
        worker = [sys.executable, __file__, "--make", case.name, "--folder", str(folder)]
        subprocess.run(worker, check=True, capture_output=True)
        best: Result | None = None
        for _ in range(rounds):
            plan, planning = run("plan", case, folder)
            manifest, took = run("prune", case, folder)
            shutil.rmtree(folder / "out")
            result = Result(
                case.name,
                plan["host_bytes"],
                plan["seconds"],
                took["peak"],
                took["wall"],
                planning["wall"],
                {**manifest["seconds"], "cpu": took["cpu"]},
            )
            if best is None or result.wall < best.wall:
                best = result
        assert best is not None
        return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of names, with commas between them")
    parser.add_argument("--file", type=Path, help="add results to this file, and take from it what it holds")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(next(case for case in CASES if case.name == arguments.make), arguments.folder)
        return
    known = {}
    if arguments.file and arguments.file.exists():
        known = {row["case"]: Result(**row) for row in map(json.loads, arguments.file.read_text().splitlines())}
    parts = [part.strip() for part in arguments.only.split(",") if part.strip()]
    columns = ("said MB", "peak MB", "ratio", "said s", "took s", "ratio", "plan s")
    print(f"{'':<24}{'method':<11}" + "".join(f"{column:>9}" for column in columns), flush=True)
    results = []
    for case in CASES:
        if parts and not any(part in case.name for part in parts):
            continue
        result = known.get(case.name)
        if result is None:
            result = measure(case, arguments.rounds)
            if arguments.file:
                with arguments.file.open("a") as lines:
                    lines.write(json.dumps(vars(result)) + "\n")
        results.append(result)
        memory, seconds = result.memory / result.peak, result.seconds / result.wall
        numbers = f"{result.memory / 1e6:>9.0f}{result.peak / 1e6:>9.0f}{memory:>9.2f}{result.seconds:>9.1f}"
        numbers += f"{result.wall:>9.1f}{seconds:>9.2f}{result.planning:>9.1f}"
        print(f"{case.name:<24}{case.method:<11}{numbers}", flush=True)
    sizes = [result.memory / result.peak for result in results]
    times = [result.seconds / result.wall for result in results]
    print(f"memory: {min(sizes):.2f} to {max(sizes):.2f} of what was measured (allowed {1 / MEMORY:.2f} to {MEMORY})")
    print(f"time:   {min(times):.2f} to {max(times):.2f} of what was measured (allowed {1 / TIME:.2f} to {TIME})")
    if not all(1 / MEMORY <= size <= MEMORY for size in sizes) or not all(1 / TIME <= own <= TIME for own in times):
        sys.exit(1)


if __name__ == "__main__":
    main()
