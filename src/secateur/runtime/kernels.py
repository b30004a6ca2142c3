"""`y = x @ W.T + bias` with packed weights, as an operator of torch."""

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.runtime.layout import PackedWeight
from secateur.runtime.library import KINDS, available, chosen, loaded_library

__all__ = ["available", "chosen", "linear"]


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """(..., rows) in the dtype of `x`, which is (..., columns) in bfloat16, float16 or float32; sums are float32.

    Raises SecateurError for other shapes, dtypes or devices.
    """
    check(x, weight.columns, weight.name)
    if weight.path == "torch":
        return torch.nn.functional.linear(
            x.float(), weight.expand().float(), None if bias is None else bias.float()
        ).to(x.dtype)
    parts = (weight.numbers, weight.masks, weight.values, weight.starts, weight.scales)
    return multiply(x, *parts, bias, weight.rows)


def check(x: Tensor, columns: int, name: str) -> None:
    """Raise SecateurError unless packed weights can be multiplied by `x`."""
    if x.shape[-1:] != (columns,) or x.dtype not in KINDS or x.dtype is torch.int8 or x.device.type not in ("cpu", "meta"):
        raise SecateurError(
            f"{name}: the input is {x.dtype} {tuple(x.shape)} on {x.device}, expected (..., {columns}) in bfloat16, float16 "
            "or float32 on the CPU. Load the model with backend='dense' for anything else."
        )


@torch.library.custom_op("secateur::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(
    x: Tensor,
    numbers: Tensor,
    masks: Tensor,
    values: Tensor,
    starts: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    rows: int,
) -> Tensor:
    """The product, from the parts of a `PackedWeight` that was laid out for a compiled path."""
    return run(x, numbers, masks, values, starts, scales, bias, rows)


@packed_linear.register_fake
def _(
    x: Tensor,
    numbers: Tensor,
    masks: Tensor,
    values: Tensor,
    starts: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    rows: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def run(
    x: Tensor,
    numbers: Tensor,
    masks: Tensor,
    values: Tensor,
    starts: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    rows: int,
) -> Tensor:
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    batch = x.numel() // x.shape[-1]
    if bias is not None:
        bias = bias.contiguous()
    failed = loaded_library().secateur_linear(
        numbers.data_ptr(),
        masks.data_ptr(),
        values.data_ptr(),
        starts.data_ptr(),
        None if scales is None else scales.data_ptr(),
        torch.get_num_threads(),
        x.data_ptr(),
        KINDS[x.dtype],
        batch,
        None if bias is None else bias.data_ptr(),
        0 if bias is None else KINDS[bias.dtype],
        y.data_ptr(),
    )
    if failed == 1:
        raise MemoryError(f"no memory to prepare {batch} rows of {x.shape[-1]} inputs for packed weights")
    if failed:
        raise SecateurError(
            "these packed weights were laid out for another processor; load the packed checkpoint again on this one"
        )
    return y


def multiply(
    x: Tensor,
    numbers: Tensor,
    masks: Tensor,
    values: Tensor,
    starts: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    rows: int,
) -> Tensor:
    """`packed_linear`, without the cost of an operator where nothing watches it."""
    return packed_linear(x, numbers, masks, values, starts, scales, bias, rows)
