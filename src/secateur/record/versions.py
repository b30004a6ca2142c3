"""The versions of everything that a result depends on, and what else every record says of its run."""

import datetime
import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import secateur


def run_facts(command: Sequence[str] | None, *, peft: bool = False) -> dict[str, Any]:
    """The versions by package name (`python` among them, and `peft` where that has a part), the command, the time."""
    import accelerate
    import transformers

    versions = {
        "secateur": secateur.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
    if peft:
        with suppress(PackageNotFoundError):
            versions["peft"] = version("peft")
    return {
        "versions": versions,
        "command": None if command is None else list(command),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
