"""Pruning a LLaMA-2-7B-shaped random checkpoint on one GPU, against the limits of the machine.

    python benchmarks/prune_gpu.py [--folder /tmp] [--runs wanda,wanda/site,sparsegpt/site] [--minutes 6]

Makes its own bfloat16 checkpoint on the local disk (13.5 GB), and prunes it from disk to disk. A run is a method and,
after a slash, `site` for true sequential order. Measured in the same run: a plain forward of the same tokens through
one block (times the number of blocks), the rate of the widest matrix product of a block, copies between host and
device, and the disk. For every run: its seconds, its computing in plain forwards, the share of the rate of matrix
products that its products reach (for second-order methods forwards and Gram matrices), the share of its time in which
the checkpoint could be copied to the device and back, and peak memory. A run that would not end in time is left out,
and said to be. The last line is all of that as JSON.
"""

import argparse
import datetime
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel

import secateur
from secateur.files.writer import CheckpointWriter

COMPUTING = ("record calls", "statistics forward", "solve", "propagation forward")


def make(folder: Path, hidden: int, middle: int, blocks: int, vocabulary: int, device: str) -> int:
    """Write a random checkpoint, several shards, and return its bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 128),
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    outside = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    groups = [outside]
    for block in range(blocks):
        path = f"model.layers.{block}"
        group = {f"{path}.self_attn.{name}_proj.weight": (hidden, hidden) for name in ("q", "k", "v", "o")}
        group |= {f"{path}.mlp.{name}_proj.weight": (middle, hidden) for name in ("gate", "up")}
        group |= {f"{path}.mlp.down_proj.weight": (hidden, middle)}
        group |= {f"{path}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        groups.append(group)
    from secateur.files.checkpoint import shard_names

    shards = [groups[start : start + 9] for start in range(0, len(groups), 9)]
    layout = [
        (name, [(tensor, torch.bfloat16, shape) for group in shard for tensor, shape in group.items()])
        for name, shard in zip(shard_names(len(shards)), shards, strict=True)
    ]
    writer = CheckpointWriter(folder, layout)
    for group in groups:
        for name, shape in group.items():
            scale = 1 if len(shape) == 1 else 0.02
            value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, device=device) * scale
            writer.write(name, value.bfloat16())
    writer.close()
    return writer.total_bytes


def multiplication_rate(device: torch.device, tokens: int, hidden: int, middle: int) -> float:
    """Operations a second of the widest matrix product of a block, bfloat16."""
    left = torch.randn(tokens, hidden, device=device).bfloat16()
    right = torch.randn(hidden, middle, device=device).bfloat16()
    for _ in range(3):
        left @ right
    _synchronise(device)
    started = time.perf_counter()
    for _ in range(20):
        left @ right
    _synchronise(device)
    return 20 * 2 * tokens * hidden * middle / (time.perf_counter() - started)


def disk_rates(folder: Path, size: int = 2 << 30) -> tuple[float, float]:
    """(read, write) bytes a second of a file beside the checkpoint; reading comes from the page cache."""
    file = folder / "disk.bin"
    data = os.urandom(1 << 24)
    started = time.perf_counter()
    with file.open("wb") as stream:
        for _ in range(size >> 24):
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    write = size / (time.perf_counter() - started)
    started = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.read(1 << 24):
            pass
    read = size / (time.perf_counter() - started)
    file.unlink()
    return read, write


def copy_rates(device: torch.device, size: int = 1 << 30) -> tuple[float, float]:
    """(to the device, from it) bytes a second of a pinned buffer."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=device)
    rates = []
    for target, source in ((there, host), (host, there)):
        target.copy_(source)
        rates.append(3 * size / _seconds(device, lambda: target.copy_(source), 3))  # noqa: B023
    return rates[0], rates[1]


def forward_seconds(folder: Path, ids: torch.Tensor, batch_size: int, device: torch.device, blocks: int) -> float:
    """A plain forward of all tokens through all blocks, from one block and as many batches as fill some seconds."""
    config = LlamaConfig.from_pretrained(folder, num_hidden_layers=1)
    with device:
        model = LlamaModel(config).to(torch.bfloat16).eval()
    batches = [batch.to(device) for batch in ids.split(batch_size)[:8]]

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(input_ids=batch, use_cache=False)

    forward()
    tokens = sum(batch.numel() for batch in batches)
    return _seconds(device, forward, 1) * blocks * ids.numel() / tokens


def _seconds(device: torch.device, function: Callable[[], object], times: int) -> float:
    """What so many calls take."""
    _synchronise(device)
    started = time.perf_counter()
    for _ in range(times):
        function()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "secateur-gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--middle", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--runs", default="wanda,wanda/site,sparsegpt/site")
    parser.add_argument("--minutes", type=float, default=6.0, help="after which no run is started")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    device, hidden, middle, blocks = (
        torch.device(arguments.device),
        arguments.hidden,
        arguments.middle,
        arguments.blocks,
    )
    source = arguments.folder / "source"
    size = make(source, hidden, middle, blocks, arguments.vocabulary, arguments.device)
    print(f"made {size / 1e9:.1f} GB in {time.perf_counter() - begun:.1f} s", flush=True)
    ids = torch.randint(0, arguments.vocabulary, (arguments.samples, arguments.length))
    tokens = ids.numel()
    rate = multiplication_rate(device, min(tokens, 16384), hidden, middle)
    to, back = copy_rates(device)
    read, write = disk_rates(arguments.folder)
    forward = forward_seconds(source, ids, arguments.batch_size, device, blocks)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "torch": torch.__version__,
        "checkpoint_gb": size / 1e9,
        "tokens": tokens,
        "forward_s": forward,
        "products_tflops": rate / 1e12,
        "copy_gbps": [to / 1e9, back / 1e9],
        "disk_gbps": [read / 1e9, write / 1e9],
        "runs": {},
    }
    print(
        f"{name}: a forward {forward:.1f} s, {rate / 1e12:.1f} Tflop/s, copies {to / 1e9:.1f} and {back / 1e9:.1f}, "
        f"disk {read / 1e9:.1f} and {write / 1e9:.1f} GB/s",
        flush=True,
    )
    # Multiply-adds of a forward: weights, and causal attention, half of the full square.
    weights = blocks * (4 * hidden**2 + 3 * hidden * middle)
    one_forward = tokens * (weights + blocks * arguments.length * hidden)
    grams = tokens * blocks * (3 * hidden**2 + middle**2) / 2
    for text in arguments.runs.split(","):
        method, _, order = text.partition("/")
        left = 60 * arguments.minutes - (time.perf_counter() - begun)
        longest = max((run["seconds"] for run in found["runs"].values()), default=0.0)
        if left < longest:
            print(f"{text}: left out, {left:.0f} s are left")
            continue
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        manifest = secateur.prune(
            source,
            method=method,
            pattern=0.5,
            calibration=ids,
            batch_size=arguments.batch_size,
            within="site" if order == "site" else "block",
            device=arguments.device,
            dtype="bfloat16",
            output=arguments.folder / "pruned",
            overwrite=True,
        )
        wall = time.perf_counter() - started
        computing = sum(manifest.seconds.get(part, 0.0) for part in COMPUTING)
        products = one_forward * (1 if order == "site" else 2) + (0 if method == "wanda" else grams)
        run = {
            "seconds": wall,
            "forwards": computing / forward,
            "of_products": 2 * products / rate / wall,
            "of_copies": (size / to + size / back) / wall,
            "of_disk": (size / read + size / write) / wall,
            "peak_device_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
            "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "parts": {part: round(taken, 2) for part, taken in manifest.seconds.items()},
        }
        found["runs"][text] = run
        print(
            f"{text}: {wall:.1f} s, {run['forwards']:.2f} forwards, {run['of_products']:.0%} of the rate of products, "
            f"{run['of_copies']:.0%} of copies, peak {run['peak_device_gib'] or 0:.2f} GiB on the device\n    "
            + ", ".join(f"{part} {taken} s" for part, taken in run["parts"].items()),
            flush=True,
        )
    shutil.rmtree(arguments.folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
