"""Wanda on a LLaMA-2-7B-shaped random checkpoint on one GPU, against the floor of the machine.

    python benchmarks/prune_gpu.py [--folder /tmp] [--blocks 32] [--samples 128] [--length 2048]

Makes its own bfloat16 checkpoint on the local disk (13.5 GB), and prunes it from disk to disk. The floor is two
forwards of the calibration tokens through the blocks at the rate of a large matrix product measured in the same run, or
reading and writing every byte at the rate of the disk measured in the same run, whichever takes longer.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

import secateur
from secateur.files.writer import CheckpointWriter


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
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--patterns", default="0.5,2:4")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    source = arguments.folder / "source"
    started = time.perf_counter()
    size = make(source, arguments.hidden, arguments.middle, arguments.blocks, arguments.vocabulary, arguments.device)
    print(f"made {size / 1e9:.1f} GB in {time.perf_counter() - started:.1f} s")
    tokens = arguments.samples * arguments.length
    rate = multiplication_rate(device, min(tokens, 16384), arguments.hidden, arguments.middle)
    read, write = disk_rates(arguments.folder)
    weights = arguments.blocks * (4 * arguments.hidden**2 + 3 * arguments.hidden * arguments.middle)
    attention = arguments.blocks * 2 * arguments.length * arguments.hidden  # causal: half of the full square
    computing = 2 * 2 * tokens * (weights + attention) / rate
    moving = size / read + size / write
    floor = max(computing, moving)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{name}: {rate / 1e12:.1f} Tflop/s, disk {read / 1e9:.1f} GB/s read, {write / 1e9:.1f} GB/s write; "
        f"floor {floor:.1f} s (two forwards {computing:.1f} s, disk {moving:.1f} s)"
    )
    ids = torch.randint(0, arguments.vocabulary, (arguments.samples, arguments.length))
    for text in arguments.patterns.split(","):
        pattern = secateur.parse_pattern(text) if ":" in text else secateur.Unstructured(float(text))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        manifest = secateur.prune(
            source,
            method=secateur.wanda(),
            pattern=pattern,
            calibration=ids,
            batch_size=arguments.batch_size,
            device=arguments.device,
            dtype="bfloat16",
            output=arguments.folder / "pruned",
            overwrite=True,
        )
        wall = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
        print(f"wanda {text}: {wall:.1f} s, {wall / floor:.2f} x the floor, peak device memory {peak:.2f} GiB")
        print("    in the foreground: " + _parts(manifest.seconds, background=False))
        print("    in the background, overlapping it: " + _parts(manifest.seconds, background=True))
    shutil.rmtree(arguments.folder)


def _parts(seconds: dict[str, float], *, background: bool) -> str:
    names = ("read", "write")
    chosen = {k: v for k, v in seconds.items() if (k in names) == background and k != "total"}
    return ", ".join(f"{name} {value:.2f} s" for name, value in chosen.items())


if __name__ == "__main__":
    main()
