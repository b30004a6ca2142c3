"""Secateur beside llm-compressor and the published Wanda loop: time, memory and perplexity on the same tokens.

    python benchmarks/peers.py [--model FOLDER] [--samples 64] [--length 512] [--rounds 3] [--draws 1]
                               [--methods wanda,sparsegpt] [--patterns 0.5] [--within block]

Makes an environment for llm-compressor 0.14.0.1 beside the outputs, with the torch of this one. Every run is a process
of its own that loads the same float32 checkpoint, prunes it on the same token ids and writes the result; runs of the
tools alternate. Wall and CPU time are those from the first read of the model to the last written byte, imports
excluded; peak RSS is that of the process. The tokens of each draw are others. Perplexity is measured by
`secateur.perplexity` on the same windows for all, and differences are paired by window and pooled over draws.

Both tools get as many tokens in a batch (2,048) and the same number of threads. llm-compressor prunes the head unless a
regular expression leaves it out, which it does here; it counts N zeros of M, which is the same for 2:4.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PEER = "llmcompressor==0.14.0.1"
TOOLS = ("secateur", "llm-compressor", "published")

# What every run does around its own part: `prune(folder, ids, out)` reads, prunes and writes.
AROUND = """
import json, os, resource, sys, time
import torch
folder, tokens, out, method, pattern, batch, within = sys.argv[1:8]
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
batch = int(batch)
{imports}
from safetensors.torch import load_file
ids = load_file(tokens)["input_ids"]
wall, cpu = time.perf_counter(), time.process_time()
{work}
print(json.dumps({{"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu,
                  "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}}))
"""

SECATEUR = (
    "import secateur\nimport secateur.pruning.engine",
    """
secateur.prune(folder, method=method, pattern=pattern, calibration=ids, batch_size=batch, output=out, overwrite=True,
               within=within)
""",
)

LLM_COMPRESSOR = (
    """
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
""",
    """
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
structure, share = (pattern, 0.5) if ":" in pattern else ("0:0", float(pattern))
loader = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=batch)
recipe = kind(sparsity=share, mask_structure=structure, ignore=["re:.*lm_head"])
oneshot(model=model, tokenizer=AutoTokenizer.from_pretrained(folder), dataset=loader, pipeline="sequential",
        recipe=recipe, num_calibration_samples=len(ids), max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False)
model.save_pretrained(out, save_compressed=False)
""",
)

# Wanda's loop from its paper (arXiv 2306.11695, equation 1 and section 3), organised as its authors do: one sample at a
# time, hooks on the linear layers of a block, the mean square of every input, and two forwards of each block.
PUBLISHED = (
    "from torch import nn\nfrom transformers import AutoModelForCausalLM",
    """
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
calls = []
class Stop(Exception): pass
def catch(module, args, kwargs):
    calls.append((args[0] if args else kwargs.pop("hidden_states"), {**kwargs, "use_cache": False}))
    raise Stop
with torch.no_grad():
    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in ids:
        try: model(input_ids=row[None], use_cache=False)
        except Stop: pass
    handle.remove()
    states = [states for states, _ in calls]
    for layer in model.model.layers:
        linear = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        square = {name: torch.zeros(module.in_features) for name, module in linear.items()}
        def watch(name):
            def hook(module, args, output):
                square[name] += args[0].reshape(-1, args[0].shape[-1]).float().norm(dim=0) ** 2 / len(ids)
            return hook
        handles = [module.register_forward_hook(watch(name)) for name, module in linear.items()]
        for x, (_, kwargs) in zip(states, calls): layer(x, **kwargs)
        for handle in handles: handle.remove()
        for name, module in linear.items():
            score = module.weight.abs() * square[name].sqrt()
            if ":" in pattern:
                kept, of = map(int, pattern.split(":"))
                groups = score.view(len(score), -1, of)
                lowest = groups.topk(of - kept, 2, largest=False)[1]
                drop = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, lowest, True).view_as(score)
            else:
                order = score.sort(dim=1, stable=True)[1][:, : int(score.shape[1] * float(pattern))]
                drop = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
            module.weight[drop] = 0
        states = [(lambda own: own if torch.is_tensor(own) else own[0])(layer(x, **kwargs))
                  for x, (_, kwargs) in zip(states, calls)]
model.save_pretrained(out)
""",
)
SCRIPTS = dict(zip(TOOLS, (SECATEUR, LLM_COMPRESSOR, PUBLISHED), strict=True))


def environment(scratch: Path) -> Path:
    """The Python of an environment with llm-compressor, which is made unless it is there."""
    import torch

    folder = scratch / "llm-compressor"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"making {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        version = torch.__version__.partition("+")[0]
        subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={version}", PEER], check=True)
        (folder / "ready").touch()
    return python


def run(python: Path | str, tool: str, arguments: list[str], threads: int) -> dict[str, float]:
    """The figures of one run in a process of its own."""
    imports, work = SCRIPTS[tool]
    result = subprocess.run(
        [python, "-c", AROUND.format(imports=imports, work=work), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
    )
    if result.returncode:
        sys.exit(f"{tool} failed:\n{result.stderr[-3000:]}")
    found: dict[str, float] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a float32 checkpoint [default: SmolLM2-135M]")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="of the first draw; the others run once")
    parser.add_argument("--draws", type=int, default=1, help="of calibration tokens")
    parser.add_argument("--methods", default="wanda,sparsegpt")
    parser.add_argument("--patterns", default="0.5")
    parser.add_argument("--within", default="block", help="of Secateur: block or site")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--windows", type=int, default=64, help="of 512 tokens to evaluate on")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    asked = parser.parse_args()

    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    import secateur
    import smollm2

    scratch = Path(tempfile.gettempdir()) / "secateur-benchmarks"
    folder = asked.model or smollm2.checkpoint(scratch / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tools = asked.tools.split(",")
    pythons = dict.fromkeys(tools, sys.executable)
    if "llm-compressor" in tools:
        pythons["llm-compressor"] = str(environment(scratch))
    text = secateur.evaluation_windows("python-docs", tokenizer, length=512, windows=asked.windows)
    batch = str(max(1, 2048 // asked.length))
    size = f"{asked.samples} x {asked.length} tokens"
    print(f"{folder.name}, {size}, float32, {asked.threads} threads, {asked.rounds} rounds")
    for method in asked.methods.split(","):
        for pattern in asked.patterns.split(","):
            own = [tool for tool in tools if tool != "published" or method == "wanda"]
            figures: dict[str, list[dict[str, float]]] = {tool: [] for tool in own}
            nats: dict[str, list[float]] = {tool: [] for tool in own}
            for draw in range(asked.draws):
                windows = secateur.calibration_windows(
                    "python-docs", tokenizer, samples=asked.samples, length=asked.length, seed=draw, sampling="concat"
                )
                tokens = scratch / "tokens.safetensors"
                save_file({"input_ids": windows.input_ids.contiguous()}, tokens)
                for number in range(asked.rounds if draw == 0 else 1):
                    for tool in own if number % 2 == 0 else own[::-1]:
                        out = scratch / f"peer-{tool}"
                        arguments = [str(folder), str(tokens), str(out), method, pattern, batch, asked.within]
                        found = run(pythons[tool], tool, arguments, asked.threads)
                        if draw == 0:
                            figures[tool].append(found)
                for tool in own:
                    nats[tool] += secateur.perplexity(scratch / f"peer-{tool}", text).window_nats
            _print(method, pattern, figures, nats, own, asked)


def _print(method, pattern, figures, nats, own, asked) -> None:  # type: ignore[no-untyped-def]
    middle = {
        tool: {key: statistics.median(run[key] for run in runs) for key in ("wall", "cpu", "rss")}
        for tool, runs in figures.items()
    }
    columns = ("wall s", "CPU s", "peak MB", "perplexity", "ours / wall", "ours / CPU", "ours / peak", "ours - nats")
    print(f"\n{method} {pattern}" + "".join(f"{column:>14}" for column in columns))
    ours = middle[own[0]]
    for tool in own:
        this, mean = middle[tool], statistics.fmean(nats[tool])
        ratios = [f"{ours[key] / this[key]:>14.2f}" for key in ("wall", "cpu", "rss")]
        pairs = [one - other for one, other in zip(nats[own[0]], nats[tool], strict=True)]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs))
        print(
            f"{tool:<{len(method) + len(pattern) + 1}}{this['wall']:>14.1f}{this['cpu']:>14.1f}"
            f"{this['rss'] / 1e6:>14.0f}{math.exp(mean):>14.3f}{''.join(ratios)}"
            f"{statistics.fmean(pairs):>+9.4f} ± {error:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
