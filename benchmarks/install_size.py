"""What `pip install secateur` takes, in seconds and megabytes, without extras and with each of them.

    python benchmarks/install_size.py --constraint constraints.txt

Builds the wheel, and for each row fills an empty virtual environment from it and removes it again. Megabytes are those
of the files in site-packages, without what is there before. Seconds include what pip has to download, which it keeps:
start the script twice for those of unpacking alone. `secateur --version`, and `secateur plan` of a tiny Llama, are
started twice, and the second time counts.
"""

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", help="a list with commas; none is the row without [default: all but dev and ray]")
    parser.add_argument("--constraint", type=Path, help="a file of versions for pip, such as constraints.txt")
    options = parser.parse_args()
    declared = importlib.metadata.metadata("secateur").get_all("Provides-Extra") or []
    extras = options.extras.split(",") if options.extras else ["none", *sorted({*declared} - {"dev", "ray"})]
    versions = ["--constraint", str(options.constraint.resolve())] if options.constraint else []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, str(ROOT))
        (wheel,) = scratch.glob("secateur-*.whl")
        model = tiny_model(scratch / "model")
        print(f"wheel: {wheel.stat().st_size / 1e6:.2f} MB\n")
        print("| | seconds | MB | packages | --version, s | plan, s |\n|---|---:|---:|---:|---:|---:|")
        for extra in extras:
            what = str(wheel) if extra == "none" else f"{wheel}[{extra}]"
            print(row(extra, what, versions, scratch / "environment", model), flush=True)


def row(extra: str, what: str, versions: list[str], folder: Path, model: Path) -> str:
    """A row of the table; the environment is gone afterwards."""
    venv.create(folder, with_pip=True)
    try:
        python = str(folder / "bin" / "python")
        site = next(folder.glob("lib/python*/site-packages"))
        before, known = size(site), packages(site)
        began = time.perf_counter()
        pip(python, "install", *versions, what)
        seconds = time.perf_counter() - began
        megabytes = (size(site) - before) / 1e6
        started = second_time([python, "-m", "secateur", "--version"])
        planned = second_time([python, "-m", "secateur", "plan", str(model), "--method", "magnitude"])
        return (
            f"| {extra} | {seconds:.0f} | {megabytes:.0f} | {packages(site) - known} | {started:.2f} | {planned:.2f} |"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pip(python: str, command: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", command, "--quiet", *arguments], check=True)


def size(site: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in site.rglob("*") if file.is_file() and not file.is_symlink())


def packages(site: Path) -> int:
    return sum(1 for _ in site.glob("*.dist-info"))


def second_time(command: list[str]) -> float:
    """Seconds that a command takes when it is started again."""
    for _ in range(2):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def tiny_model(folder: Path) -> Path:
    """A Llama of two small layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=256)).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
