"""`y = x @ W.T + bias` with packed weights, as an operator of torch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.runtime.layout import PackedWeight
from secateur.runtime.library import KINDS, available, chosen, loaded_library

__all__ = ["available", "chosen", "linear"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """(..., rows) in the dtype of `x`, which is (..., columns) in bfloat16, float16 or float32; sums are float32.

    Raises SecateurError for other shapes, dtypes or devices.
    """
    parts = (weight.numbers, weight.masks, weight.values, weight.starts, weight.scales)
    return linear_of_parts(x, weight, parts, bias)


def linear_of_parts(x: Tensor, weight: PackedWeight, parts: Parts, bias: Tensor | None) -> Tensor:
    """The same with the tensors of the weight given apart, as a module holds them."""
    _check(x, weight.columns, weight.name)
    if bias is not None and (bias.shape != (weight.rows,) or bias.dtype not in FLOATS):
        raise SecateurError(
            f"{weight.name}: the bias is {bias.dtype} {tuple(bias.shape)}, "
            f"expected ({weight.rows},) in bfloat16, float16 or float32."
        )
    if weight.path == "torch":
        dense = weight.with_parts(*parts).expand().float()
        return functional.linear(x.float(), dense, None if bias is None else bias.float()).to(x.dtype)
    watched = torch.compiler.is_compiling() or type(x) is not Tensor or (x.requires_grad and torch.is_grad_enabled())
    # The operator costs as long as a small product: it is for those that have to see it.
    return (packed_linear if watched else multiply)(x, *parts, bias, weight.rows)


def _check(x: Tensor, columns: int, name: str) -> None:
    """Raise SecateurError unless packed weights can be multiplied by `x`."""
    devices = ("cpu", "meta")
    if x.shape[-1:] != (columns,) or x.dtype not in FLOATS or x.device.type not in devices:
        raise SecateurError(
            f"{name}: the input is {x.dtype} {tuple(x.shape)} on {x.device}, "
            f"expected (..., {columns}) in bfloat16, float16 or float32 on the CPU. "
            "Load the model with backend='dense' for anything else."
        )


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
    """The product, from the parts of a `PackedWeight` that was laid out for a compiled path."""
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


packed_linear = torch.library.custom_op("secateur::packed_linear", multiply, mutates_args=(), device_types="cpu")


@packed_linear.register_fake
def _shape(x: Tensor, *parts: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], parts[-1]))
