"""Numbers made of codes and scales: FP8 and int8 with scales, and MXFP4. In float32, rounded once to bfloat16."""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20  # of float32 numbers that are made at once
# The sixteen numbers of E2M1: a sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def scaled(codes: Tensor, scales: Tensor, blocks: Sequence[int], zero_points: Tensor | None, out: Tensor) -> Tensor:
    """`out`, filled with (code - zero point) * scale.

    `scales` (and `zero_points`) have one entry for each block of `blocks[d]` codes along dimension `d`; the last block
    of a dimension may be smaller.
    """
    scales = numbers(scales)
    offsets = None if zero_points is None else zero_points.to(torch.float32)
    rows = max(1, CHUNK_BYTES // max(1, 4 * codes[0].numel()))
    # Memory: one part of the float32 matrix at a time.
    for first in range(0, len(codes), rows):
        part = codes[first : first + rows].to(torch.float32)
        if offsets is not None:
            part -= _spread(offsets, part.shape, blocks, first)
        out[first : first + rows] = part.mul_(_spread(scales, part.shape, blocks, first))
    return out


def _spread(scales: Tensor, shape: Sequence[int], blocks: Sequence[int], first: int) -> Tensor:
    """The scale of every entry of a part that starts at row `first`, in a shape that multiplies with it."""
    for dimension, (size, block) in enumerate(zip(shape, blocks, strict=True)):
        if scales.shape[dimension] > 1:
            start = first if dimension == 0 else 0
            scales = scales.index_select(
                dimension, torch.arange(start, start + size).div_(block, rounding_mode="floor")
            )
    return scales


def numbers(scales: Tensor) -> Tensor:
    """Scales in float32. A byte is an exponent, E8M0: the power of two above 2**-127 that it counts to."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).to(torch.float32)


def unpacked_mxfp4(codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """`out`, of shape (experts, in, out), filled with the numbers of MXFP4 experts.

    `codes` (experts, out, groups, 16) hold two numbers in a byte, the lower half first; each group of 32 numbers along
    the input has one exponent in `scales` (experts, out, groups).
    """
    table = torch.tensor(E2M1)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=1)  # both numbers of each byte
    for expert, (own, scale) in enumerate(zip(codes, scales, strict=True)):
        values = pairs[own.to(torch.int64)].flatten(-2)  # (out, groups, 32)
        out[expert] = values.mul_(numbers(scale).unsqueeze(-1)).flatten(-2).t()
    return out


def block_sizes(
    shape: Sequence[int], scales: Sequence[int], configured: Sequence[Sequence[int]]
) -> tuple[int, ...] | None:
    """How many codes along each dimension share a scale; None where the shapes leave it open, or do not fit.

    `scales` has as many dimensions as `shape`. `configured` are the sizes that configurations name.
    """
    for sizes in configured:
        blocks = (*(1 for _ in shape[: -len(sizes)]), *sizes)
        if len(blocks) == len(shape) and all(
            block > 0 and -(-size // block) == count for size, block, count in zip(shape, blocks, scales, strict=True)
        ):
            return tuple(blocks)
    found = [_block_size(size, count) for size, count in zip(shape, scales, strict=True)]
    return None if None in found else tuple(block for block in found if block is not None)


def _block_size(size: int, count: int) -> int | None:
    if count in (1, size):
        return max(1, size // max(1, count))
    # Where no size is configured, blocks have a power of two entries; at most one of them makes this number of blocks.
    return next((1 << power for power in range(size.bit_length()) if -(-size // (1 << power)) == count), None)
