"""A tensor as mask and kept values: the bits of numpy's own packing, and back to every byte."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from checkpoint_files import random_tensor, same_bytes
from secateur.errors import CheckpointError
from secateur.files import bitmask
from secateur.files.bitmask import check_mask, count_bits, count_kept, expand, mask_shape, pack_bits
from secateur.files.checkpoint import DTYPES

SHAPES = [(1, 1), (1, 8), (3, 7), (5, 9), (4, 16), (2, 3, 5), (2, 2, 2, 3), (0, 4), (4, 0), (2, 0, 3), (7,), (1, 65)]
INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def sparse_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bytes, half of the entries zero, the first row empty and the last one full."""
    tensor = random_tensor(dtype, shape, seed)
    data = tensor.view(-1).view(torch.uint8).view(-1, dtype.itemsize)
    data[torch.rand(len(data), generator=torch.Generator().manual_seed(seed)) < 0.5] = 0
    if len(shape) > 1 and shape[0] > 2 and tensor.numel():
        rows = data.view(shape[0], -1)
        rows[0], rows[-1] = 0, 1
    return tensor


def unpacked_by_numpy(mask: torch.Tensor, kept: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """What mask and values stand for, one entry after the other."""
    bits = mask.numpy().reshape(-1, mask.shape[-1])
    values = iter(kept.view(torch.uint8).view(len(kept), kept.dtype.itemsize).numpy())
    columns, size = shape[-1], kept.dtype.itemsize
    data = np.zeros((int(np.prod(shape)), size), dtype=np.uint8)
    for entry in range(len(data)):
        row, column = divmod(entry, columns)
        if bits[row, column // 8] >> (column % 8) & 1:
            data[entry] = next(values)
    assert next(values, None) is None
    return torch.from_numpy(data).view(-1).view(kept.dtype).view(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_byte_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = sparse_tensor(dtype, shape)
    mask, kept = pack_bits(tensor)
    assert mask.shape == mask_shape(shape)
    assert kept.dtype == dtype
    assert len(kept) == count_kept(tensor) == count_bits(mask.numpy().reshape(-1))
    check_mask(mask, shape[-1], len(kept), "it")
    assert same_bytes(expand(mask, kept, shape), tensor)
    if tensor.numel():
        assert same_bytes(unpacked_by_numpy(mask, kept, shape), tensor)


@settings(deadline=None)
@given(
    hnp.arrays(
        st.sampled_from(list(INTEGERS.values())),
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=20),
        elements=st.integers(0, 2),
        fill=st.just(0),
    )
)
def test_the_bits_are_those_of_numpy(array: np.ndarray) -> None:
    integers = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[array.dtype.itemsize]
    tensor = torch.from_numpy(array).view(integers)
    mask, kept = pack_bits(tensor)
    np.testing.assert_array_equal(mask.numpy(), np.packbits(array != 0, axis=-1, bitorder="little"))
    np.testing.assert_array_equal(kept.numpy(), array[array != 0])
    np.testing.assert_array_equal(expand(mask, kept, tensor.shape).numpy(), array)


def test_a_negative_zero_and_a_nan_are_kept() -> None:
    tensor = torch.tensor([[0.0, -0.0, float("nan"), 1.0]], dtype=torch.bfloat16)
    mask, kept = pack_bits(tensor)
    assert mask.tolist() == [[0b1110]]
    assert kept.view(torch.int16).tolist() == tensor.view(torch.int16)[0, 1:].tolist()
    assert same_bytes(expand(mask, kept, tensor.shape), tensor)


@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_parts_that_fit_into_the_cache_make_the_same_bits(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = sparse_tensor(torch.bfloat16, (13, 21))
    whole = pack_bits(tensor)
    monkeypatch.setattr(bitmask, "_AT_ONCE", at_once)
    mask, kept = pack_bits(tensor)
    assert same_bytes(mask, whole[0])
    assert same_bytes(kept, whole[1])
    assert same_bytes(expand(mask, kept, tensor.shape), tensor)


def test_a_transposed_view_is_packed_as_it_is_read() -> None:
    tensor = sparse_tensor(torch.float16, (6, 10)).t()
    mask, kept = pack_bits(tensor)
    assert same_bytes(expand(mask, kept, tensor.shape), tensor.contiguous())


def test_an_output_that_is_given_is_filled() -> None:
    tensor = sparse_tensor(torch.float32, (5, 11))
    out = torch.full_like(tensor, 7.0)
    assert expand(*pack_bits(tensor), tensor.shape, out) is out
    assert same_bytes(out, tensor)


def test_a_mask_with_another_count_is_refused() -> None:
    mask, kept = pack_bits(sparse_tensor(torch.float32, (5, 11)))
    with pytest.raises(CheckpointError, match=rf"^it: its mask keeps {len(kept)} entries, and {len(kept) + 1} values"):
        check_mask(mask, 11, len(kept) + 1, "it")


def test_a_bit_after_the_last_column_is_refused() -> None:
    mask, kept = pack_bits(sparse_tensor(torch.float32, (5, 11)))
    mask[2, 1] |= 1 << 3
    with pytest.raises(CheckpointError, match=r"^it: its mask has bits after the last of 11 columns"):
        check_mask(mask, 11, len(kept) + 1, "it")
