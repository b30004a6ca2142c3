"""Compressed tensors: every byte comes back, and nothing stands for more bytes than the file can answer for."""

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_files import random_tensor, same_bytes
from secateur.errors import CheckpointError, SecateurError
from secateur.files import compression
from secateur.files.checkpoint import DTYPE_NAMES, DTYPES
from secateur.files.compression import MOST_RATIO, Compressed, check, chunks, compress, library

pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def compressed(tensor: torch.Tensor) -> tuple[torch.Tensor, Compressed]:
    data, planes = compress(tensor)
    described = Compressed(DTYPE_NAMES[tensor.dtype], list(tensor.shape), planes, "0" * 64)
    check(described, len(data), "it")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(
        0, dtype=torch.uint8
    ), described


def back(data: torch.Tensor, described: Compressed) -> torch.Tensor:
    parts = list(chunks(described, lambda start, end: data[start:end], "it"))
    flat = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    return flat.view(DTYPES[described.dtype]).view(described.shape)


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (2, 3, 5), (0, 4), (), (700,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_byte_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for tensor in (random_tensor(dtype, shape), torch.zeros(shape, dtype=dtype)):
        assert same_bytes(back(*compressed(tensor)), tensor)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=400), st.sampled_from([1, 2, 4, 8]), st.integers(1, 9))
def test_any_bytes_in_chunks_of_any_size(data: bytes, size: int, chunk: int) -> None:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    whole = data[: len(data) // size * size]
    tensor = torch.frombuffer(bytearray(whole), dtype=integers) if whole else torch.empty(0, dtype=integers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "CHUNK_BYTES", chunk * 8)
        assert same_bytes(back(*compressed(tensor)), tensor)


def test_weights_take_what_their_exponents_carry() -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16() / 30
    data, _ = compressed(weight)
    # Seven bits of mantissa and the last one of the exponent stay as they are; what is left carries about three bits.
    assert len(data) == pytest.approx(11.1 / 16 * weight.nbytes, rel=0.02)


def test_nothing_stands_for_more_than_its_bytes_allow() -> None:
    zeros = torch.zeros(1 << 20)
    data, _ = compressed(zeros)
    assert len(data) == zeros.nbytes // MOST_RATIO


TENSOR = torch.arange(4096).float()


def bomb() -> Any:
    """A frame that stands for a thousand times the bytes that are claimed of it."""
    return library().compress(bytes(4096 * 1000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data, it: (data, replace(it, shape=[1 << 40])),
            r"4,398,046,511,104 bytes in 1 chunks, expected 1,048,576",
        ),
        (lambda data, it: (data, replace(it, dtype="F64")), "in 1 chunks, expected 1, with 8 planes each"),
        (lambda data, it: (data, replace(it, dtype="F1")), "unknown dtype F1"),
        (lambda data, it: (data[:-1], it), r"its planes take [\d,]+ bytes, and [\d,]+ are stored"),
        (lambda data, it: (data[:12], replace(it, planes=[[3, 3, 3, 3]])), "made to fill the memory"),
        (lambda data, it: (bytes(4 * 4096), replace(it, shape=[4095], planes=[[4096] * 4])), "and no more than"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_made(change: Any, message: str) -> None:
    data, described = change(*compressed(TENSOR))
    with pytest.raises(CheckpointError, match=rf"^it: .*{message}"):
        check(described, len(data), "it")


@pytest.mark.parametrize("what", ["a bomb", "too little", "damaged", "cut short", "more behind"])
def test_a_plane_that_stands_for_something_else_is_refused(what: str) -> None:
    frame = {
        "a bomb": bomb(),
        "too little": library().compress(bytes(4000)),
        "damaged": b"\x00" * 80,
        "cut short": library().compress(bytes(range(256)) * 16)[:-20],
        "more behind": library().compress(bytes(4096)) + b"more",
    }[what]
    frame += bytes(max(0, 64 - len(frame)))
    described = Compressed("U8", [4096], [[len(frame)]], "0" * 64)
    check(described, len(frame), "it")
    data = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
    with pytest.raises(
        CheckpointError, match=r"^it: (a compressed plane does not stand for 4,096|cannot be decompressed)"
    ):
        list(chunks(described, lambda start, end: data[start:end], "it"))


def test_a_changed_byte_never_gives_more_than_was_claimed() -> None:
    data, described = compressed(TENSOR)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        place, value = (
            int(torch.randint(len(data), (), generator=generator)),
            int(torch.randint(256, (), generator=generator)),
        )
        changed = data.clone()
        changed[place] = value
        try:
            found = back(changed, described)
        except CheckpointError:
            continue
        assert math.prod(found.shape) == 4096


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("backports", "backports.zstd", "compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SecateurError, match=r'pip install "secateur\[compress\]"'):
        library()
