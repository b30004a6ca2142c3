"""The module that stands in for `nn.Linear` where the weight is packed."""

import torch
from torch import Tensor, nn

from secateur.runtime.kernels import Parts, linear_of_parts
from secateur.runtime.layout import PackedWeight


class PackedLinear(nn.Module):
    """`y = x @ W.T + bias` of a packed weight, in the dtype of `x`, on the CPU.

    The parts of the weight are buffers that no state dict holds, as bytes and integers, so that `to(dtype)` leaves them
    as they are. There is no gradient: a backward pass through it raises torch's error of an operator without one.
    """

    numbers: Tensor
    masks: Tensor
    values: Tensor
    starts: Tensor
    scales: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = weight.columns, weight.rows
        for part in ("numbers", "masks", "values", "starts", "scales"):
            self.register_buffer(part, getattr(weight, part), persistent=False)
        nothing = torch.empty(0)
        self._about = weight.with_parts(nothing, nothing, nothing, nothing, None)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _parts(self) -> Parts:
        return self.numbers, self.masks, self.values, self.starts, self.scales

    @property
    def packed(self) -> PackedWeight:
        """The packed weight; `packed.expand()` is the dense one."""
        return self._about.with_parts(*self._parts())

    def forward(self, x: Tensor) -> Tensor:
        """(..., out_features), from (..., in_features) in bfloat16, float16 or float32."""
        return linear_of_parts(x, self._about, self._parts(), self.bias)

    def extra_repr(self) -> str:
        """As `nn.Linear` shows itself, and what is packed."""
        about = self._about
        kind = str(about.dtype).removeprefix("torch.")
        return (
            f"in_features={about.columns}, out_features={about.rows}, bias={self.bias is not None}, "
            f"values={kind}, path={about.path}"
        )
