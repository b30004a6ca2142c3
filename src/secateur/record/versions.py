"""The versions of everything that a result depends on."""

import platform

import torch

import secateur


def run_versions() -> dict[str, str]:
    """The versions by package name; `python` is among them."""
    import accelerate
    import transformers

    return {
        "secateur": secateur.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
