"""Folders that the first version of the format wrote go on being read: `same` and `int8`, from the same weights."""

from pathlib import Path

import pytest
import torch

import secateur
from secateur.files.checkpoint import tensor_digest
from secateur.files.packed import PackedCheckpoint
from secateur.runtime.unpack import unpack

FOLDER = Path(__file__).with_name("version_1")


@pytest.mark.parametrize("values", ["same", "int8"])
def test_it_is_read(values: str, tmp_path: Path) -> None:
    assert secateur.verify(FOLDER / values).ok
    packed = PackedCheckpoint(FOLDER / values)
    assert packed.record.version == 1
    tensors = packed.read(packed.names)
    assert {name: tensor_digest(tensor) for name, tensor in tensors.items()} == packed.digests
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "layer.weight": (24, 43),
        "experts": (2, 8, 24),
        "norm.weight": (43,),
    }
    result = unpack(FOLDER / values, tmp_path / "plain")
    assert (result.matrices, result.rounded) == (2, 2 if values == "int8" else 0)
    # A negative zero is kept, and has no code.
    sign = torch.signbit(tensors["layer.weight"][3, 4])
    assert bool(sign) == (values == "same")
