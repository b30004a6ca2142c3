"""Peak memory against depth: LLaMA-shaped random checkpoints of 8, 16 and 32 blocks of about 100 MB each.

    python benchmarks/peak_memory.py [--blocks 8,16,32]

Each is pruned by the command line in a process of its own, and the peak RSS of that process is shown beside the size
of the model. A run that streams must not grow with the number of blocks.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig

from secateur.files.writer import CheckpointWriter

HIDDEN, MIDDLE, VOCABULARY = 2048, 6144, 512


def make(folder: Path, blocks: int) -> int:
    """Write a random bfloat16 checkpoint, tensor by tensor; returns its bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for block in range(blocks):
        path = f"model.layers.{block}"
        for name in ("q", "k", "v", "o"):
            shapes[f"{path}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            shapes[f"{path}.mlp.{name}_proj.weight"] = (MIDDLE, HIDDEN)
        shapes[f"{path}.mlp.down_proj.weight"] = (HIDDEN, MIDDLE)
        shapes[f"{path}.input_layernorm.weight"] = shapes[f"{path}.post_attention_layernorm.weight"] = (HIDDEN,)
    layout = [(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    writer = CheckpointWriter(folder, [("model.safetensors", layout)])
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
        writer.write(name, value.bfloat16())
    writer.close()
    return writer.total_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="8,16,32")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--offload-states", action="store_true", help="hidden states in memory-mapped files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="secateur-memory-") as name:
        scratch = Path(name)
        from safetensors.torch import save_file

        ids = torch.randint(
            0, VOCABULARY, (arguments.samples, arguments.length), generator=torch.Generator().manual_seed(1)
        )
        save_file({"input_ids": ids}, scratch / "ids.safetensors")
        print(f"{'blocks':>6}{'model MiB':>11}{'block MiB':>11}{'peak RSS MiB':>14}{'seconds':>9}")
        for blocks in map(int, arguments.blocks.split(",")):
            size = make(scratch / "model", blocks)
            code = (
                "import json, resource, secateur;"
                f"m = secateur.prune('{scratch}/model', method=secateur.{arguments.method}(),"
                f" calibration='{scratch}/ids.safetensors',"
                f" offload_states={str(scratch) if arguments.offload_states else 'auto'!r},"
                f" output='{scratch}/out', overwrite=True);"
                "print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, m.seconds['total']]))"
            )
            environment = {**os.environ, "MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "")}
            if not environment["MALLOC_ARENA_MAX"]:
                del environment["MALLOC_ARENA_MAX"]
            run = subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
            )
            peak, seconds = json.loads(run.stdout.splitlines()[-1])
            per_block = (size - 2 * VOCABULARY * HIDDEN * 2) / blocks
            print(f"{blocks:>6}{size / 2**20:>11.0f}{per_block / 2**20:>11.0f}{peak / 1024:>14.0f}{seconds:>9.1f}")


if __name__ == "__main__":
    main()
