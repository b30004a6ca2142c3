"""Whether other engines load a pruned checkpoint and say what transformers says: the table of docs/where-it-runs.md.

    python benchmarks/where_it_runs.py --engines transformers,mlx,onnx,llama.cpp

The checkpoint is SmolLM2-135M with half of its weights removed by Wanda, in float32 everywhere. Each engine runs in an
environment of its own in `--folder`, which pip fills (llama.cpp compiles for minutes), or in the one of
`--python ENGINE=PYTHON`. It gets prompts as text, and says how it reads them and the tokens that it takes to follow.
llama.cpp's converter is the one that lies in the source of llama-cpp-python.
"""

import argparse
import contextlib
import importlib.metadata
import json
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):", "Water boils at")
NEW = 32
PACKAGES = {
    "transformers": ["torch==2.13.0", "transformers"],
    "mlx": ["mlx[cpu]", "mlx-lm"],
    "onnx": ["torch==2.13.0", "transformers", "onnx-ir", "onnxruntime-genai"],
    "llama.cpp": ["torch==2.13.0", "transformers", "sentencepiece", "llama-cpp-python"],
}
Said = tuple[list[int], list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(PACKAGES))
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PYTHON")
    parser.add_argument("--llama-source", type=Path, help="the folder vendor/llama.cpp of llama-cpp-python's source")
    parser.add_argument("--pruned", type=Path, help="a pruned checkpoint in the place of SmolLM2-135M")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "secateur-benchmarks")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    pruned = options.pruned or prune(options.folder)
    pythons = dict(choice.split("=", 1) for choice in options.python)
    expected = ask(sys.executable, "transformers", pruned)["said"]
    print("| engine | versions | prompts read alike | greedy tokens alike |\n|---|---|---|---|")
    for engine in options.engines.split(","):
        python = pythons.get(engine) or environment(options.folder / f"environment-{engine}", engine)
        found = ask(python, engine, converted(python, engine, pruned, options))
        read = sum(own[0] == theirs[0] for own, theirs in zip(found["said"], expected, strict=True))
        same = [alike(own[1], theirs[1]) for own, theirs in zip(found["said"], expected, strict=True)]
        print(f"| {engine} | {found['versions']} | {read} of {len(PROMPTS)} | {', '.join(same)} |", flush=True)


def prune(folder: Path) -> Path:
    """SmolLM2-135M at 50 %, by Wanda on text that is on every machine."""
    import secateur
    import smollm2

    if not (folder / "half").exists():
        windows = smollm2.windows(dense := smollm2.checkpoint(folder / "smollm2"), samples=16, length=512)
        secateur.prune(dense, method=secateur.wanda(), pattern=0.5, calibration=windows, output=folder / "half")
    return folder / "half"


def environment(folder: Path, engine: str) -> str:
    """The Python of an environment with the packages of an engine."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[engine]], check=True)
        (folder / "ready").touch()
    return str(python)


def converted(python: str, engine: str, pruned: Path, options: argparse.Namespace) -> Path:
    """What an engine loads: the checkpoint itself, or what the engine's own converter makes of it."""
    if engine == "onnx":
        target = options.folder / "half-onnx"
        command = ["-m", "onnxruntime_genai.models.builder", "-i", pruned, "-o", target, "-p", "fp32", "-e", "cpu"]
    elif engine == "llama.cpp":
        target = options.folder / "half.gguf"
        script = (options.llama_source or llama_source(python, options.folder)) / "convert_hf_to_gguf.py"
        command = [script, pruned, "--outtype", "f32", "--outfile", target]
    else:
        return pruned
    subprocess.run([python, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return target


def llama_source(python: str, folder: Path) -> Path:
    """The source of llama.cpp that llama-cpp-python is compiled from."""
    download = [python, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "llama-cpp-python"]
    if not list(folder.glob("llama_cpp_python-*/vendor")):
        subprocess.run([*download, "--dest", folder], check=True)
        with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
    return next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))


def ask(python: str, engine: str, path: Path) -> dict:
    """What an engine says, in a process of its own."""
    command = [python, __file__, engine, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def alike(tokens: list[int], expected: list[int]) -> str:
    """How many tokens are the same, up to the first that is not."""
    count = next((i for i, pair in enumerate(zip(tokens, expected, strict=False)) if len(set(pair)) > 1), len(expected))
    return f"{count} of {len(expected)}"


# In the environment of the engine, which has no secateur:


def by_transformers(path: Path) -> Iterator[Said]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "repetition_penalty": 1.0}
        with torch.no_grad():
            new = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        yield ids[0].tolist(), new[0, ids.shape[1] :].tolist()


def by_mlx(path: Path) -> Iterator[Said]:
    import mlx.core
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model, tokenizer = load(str(path))
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        steps = generate_step(mlx.core.array(ids), model, max_tokens=NEW)
        yield ids, [int(token) for token, _ in steps]


def by_onnx(path: Path) -> Iterator[Said]:
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(path))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    for prompt in PROMPTS:
        ids = list(map(int, tokenizer.encode(prompt)))
        settings = onnxruntime_genai.GeneratorParams(model)
        settings.set_search_options(do_sample=False, max_length=len(ids) + NEW, min_length=len(ids) + NEW)
        generator = onnxruntime_genai.Generator(model, settings)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        yield ids, list(map(int, generator.get_sequence(0)))[len(ids) :]


def by_llama_cpp(path: Path) -> Iterator[Said]:
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=256, verbose=False)
    for prompt in PROMPTS:
        ids = model.tokenize(prompt.encode(), add_bos=False)
        model.reset()
        steps = model.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
        yield ids, [token for token, _ in zip(steps, range(NEW), strict=False)]


WORKERS: dict[str, tuple[Callable[[Path], Iterator[Said]], list[str]]] = {
    "transformers": (by_transformers, ["transformers", "torch"]),
    "mlx": (by_mlx, ["mlx", "mlx-lm"]),
    "onnx": (by_onnx, ["onnxruntime-genai", "onnxruntime"]),
    "llama.cpp": (by_llama_cpp, ["llama-cpp-python"]),
}


def work(engine: str, path: Path) -> None:
    """Print what an engine says as one line of JSON."""
    answer, packages = WORKERS[engine]
    with contextlib.redirect_stdout(sys.stderr):
        said = list(answer(path))
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    print(json.dumps({"versions": versions, "said": said}))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in WORKERS:
        work(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
