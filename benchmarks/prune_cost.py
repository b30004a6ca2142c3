"""What pruning costs in plain forwards, on this machine.

    python benchmarks/prune_cost.py [--model smollm2|1b|FOLDER] [--runs wanda,wanda/site] [--samples 64] [--rounds 3]

A run is a method and, after slashes, how it goes over the blocks: `wanda`, `wanda/site`, `sparsegpt/site`,
`alps/site/residual`, `gblm`. `smollm2` is SmolLM2-135M, `1b` four random blocks in the shape of a LLaMA with a billion
weights.

The baseline is one plain forward of the same tokens through the same model, measured before and after the pruning in
the same process, without the head and its logits. The floor adds to it, for methods that need them, the products of one
triangle of each Gram matrix and two and a half Cholesky factorisations of it, both measured. Wanda block by block needs
two forwards, less what need not be done (the first pass ends at a block's last statistic, the last block has no second
pass, and the head never runs); site by site it needs one, and one of the first batch. Reading and writing are excluded
from the ratios, and shown.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import secateur
import smollm2
from secateur.core.gram import Gram

# Random models as wide as real ones: hidden and intermediate size, heads, dtype. "70b-3": three blocks of LLaMA-3-70B.
WIDTHS = {"1b": (2048, 8192, 32, torch.float32), "70b": (8192, 28672, 64, torch.bfloat16)}
COMPUTING = ("gradients", "record calls", "statistics forward", "solve", "propagation forward")
SECOND_ORDER = ("sparsegpt", "alps", "admm", "least_squares")


def seconds(function: Callable[[], object]) -> float:
    """What a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def plain_forward(model: torch.nn.Module, ids: torch.Tensor, batch_size: int) -> float:
    """Seconds of one forward of all tokens, batch by batch."""
    with torch.no_grad():
        return seconds(lambda: [model(input_ids=batch, use_cache=False) for batch in ids.split(batch_size)])


def model_folder(name: str, scratch: Path) -> Path:
    """The checkpoint that is pruned, with a tokenizer."""
    small = smollm2.checkpoint(scratch / "smollm2")
    width, _, blocks = name.partition("-")
    if width not in WIDTHS:
        return small if name == "smollm2" else Path(name)
    folder = scratch / name
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(small)
        hidden, middle, heads, dtype = WIDTHS[width]
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=middle,
            num_attention_heads=heads,
            num_key_value_heads=8,
            num_hidden_layers=int(blocks or 4),
            tie_word_embeddings=True,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder, max_shard_size="2GB")
        tokenizer.save_pretrained(folder)
    return folder


def solving_floor(manifest: Any, tokens: int, batch: int) -> tuple[float, float]:
    """(seconds of the Gram products of all tokens, of two and a half factorisations) for every input of the run."""
    products = factorisations = 0.0
    blocks = len(manifest.blocks)
    for site in manifest.blocks[0]["sites"]:
        width = manifest.matrices[site[0]]["shape"][1]
        gram, x = Gram.empty(width), torch.randn(batch, width)
        gram.update(x)
        products += blocks * tokens / batch * min(seconds(lambda: gram.update(x)) for _ in range(3))  # noqa: B023
        matrix = gram.total + torch.eye(width)
        factorisations += 2.5 * blocks * min(seconds(lambda: torch.linalg.cholesky(matrix)) for _ in range(3))  # noqa: B023
    return products, factorisations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, 1b, 70b-3, or a checkpoint")
    parser.add_argument("--runs", default="wanda,wanda/site")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="the median counts")
    parser.add_argument("--pattern", default="0.5", help="a sparsity or N:M")
    arguments = parser.parse_args()
    scratch = Path(tempfile.gettempdir()) / "secateur-benchmarks"
    folder = model_folder(arguments.model, scratch)
    windows = smollm2.windows(folder, arguments.samples, arguments.length)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().model
    batch_size = max(1, 2048 // arguments.length)
    plain_forward(dense, windows.input_ids[:batch_size], batch_size)
    size = f"{arguments.samples} samples of {arguments.length} tokens"
    print(f"{folder.name}, {arguments.pattern}, {size}, {torch.get_num_threads()} threads, float32")
    columns = ("pruning s", "forward s", "forwards", "floor s", "/ floor", "/ wanda", "solve s", "whole run s")
    print(f"{'':<20}" + "".join(f"{column:>12}" for column in columns), flush=True)
    wanda = None
    pattern = secateur.parse_pattern(arguments.pattern) if ":" in arguments.pattern else float(arguments.pattern)
    for text in arguments.runs.split(","):
        method, *ways = text.split("/")
        settings: dict[str, Any] = {"within": "site" if "site" in ways else "block"}
        if {*ways} & {"dense", "residual"}:
            settings["targets"] = ways[-1]
        rows = []
        for _ in range(arguments.rounds):
            before = plain_forward(dense, windows.input_ids, batch_size)
            started = time.perf_counter()
            manifest = secateur.prune(
                folder,
                method=method,
                pattern=pattern,
                calibration=windows,
                batch_size=batch_size,
                output=scratch / "pruned",
                overwrite=True,
                **settings,
            )
            run = time.perf_counter() - started
            forward = (before + plain_forward(dense, windows.input_ids, batch_size)) / 2
            computing = sum(manifest.seconds.get(part, 0.0) for part in COMPUTING)
            rows.append((computing / forward, computing, forward, manifest.seconds["solve"], run))
        ratio, computing, forward, solve, run = sorted(rows)[len(rows) // 2]
        floor = forward
        if any(name in method for name in SECOND_ORDER) and "site" in ways:
            floor += sum(solving_floor(manifest, windows.input_ids.numel(), batch_size * arguments.length))
        wanda = computing if text == "wanda" else wanda
        beside = f"{computing / wanda:>12.2f}" if wanda else f"{'':>12}"
        print(
            f"{text:<20}{computing:>12.2f}{forward:>12.2f}{ratio:>12.2f}{floor:>12.2f}{computing / floor:>12.2f}"
            f"{beside}{solve:>12.2f}{run:>12.2f}   spread {statistics.pstdev(row[0] for row in rows):.3f}"
        )
        print("    " + ", ".join(f"{part} {taken:.2f}" for part, taken in manifest.seconds.items()), flush=True)
    print(
        f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB (dense baseline in memory too)"
    )


if __name__ == "__main__":
    main()
