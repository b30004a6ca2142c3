"""Tiny pruned checkpoints, and the options with which tests train them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import secateur
import tiny

IDS = tiny.tokens(samples=24, length=16)


def pruned(root: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    tiny.build(name, dtype=dtype).save_pretrained(root / "dense")
    settings: dict[str, Any] = {"method": secateur.magnitude(), "pattern": secateur.NM(2, 4)}
    secateur.prune(root / "dense", output=root / "pruned", **settings | options)
    return root / "pruned"


def tune(base: Path, output: Path, **options: Any) -> secateur.Recovery:
    settings: dict[str, Any] = {"data": IDS, "held_out": 4, "steps": 4, "batch_size": 2, "lr": 1e-2, "method": "full"}
    return secateur.fine_tune(base, output, **settings | options)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned(tmp_path_factory.mktemp("base"))
