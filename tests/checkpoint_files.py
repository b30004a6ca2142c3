"""Tensors of every dtype and shape, the layouts of their files, and a model in several shards."""

import itertools
from pathlib import Path

import pytest
import torch

import tiny
from secateur.files.checkpoint import (
    DTYPES,
    shard_names,
    tensor_bytes,
)

SHAPES = [(), (1,), (7,), (0,), (3, 5), (4, 0, 2), (2, 3, 4), (1, 1, 1, 1)]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bytes as a tensor, so that NaN, infinities, subnormal numbers and -0.0 all occur."""
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize * torch.Size(shape).numel()
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (size,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).view(shape)


def every_kind() -> dict[str, torch.Tensor]:
    """A tensor of each dtype and shape."""
    pairs = itertools.product(DTYPES, SHAPES)
    return {f"{name}.{shape}": random_tensor(DTYPES[name], shape, seed) for seed, (name, shape) in enumerate(pairs)}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and tensor_bytes(one) == tensor_bytes(other)


def layout_of(*shards: dict[str, torch.Tensor]) -> list[tuple[str, list[tuple[str, torch.dtype, tuple[int, ...]]]]]:
    return [
        (file, [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()])
        for file, tensors in zip(shard_names(len(shards)), shards, strict=True)
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several shards."""
    return tiny.save("llama", tmp_path_factory.mktemp("llama") / "model", max_shard_size="40KB")
