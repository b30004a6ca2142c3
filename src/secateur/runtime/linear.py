"""The module that stands in for `nn.Linear` where the weight is packed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.errors import SecateurError
from secateur.runtime.kernels import Parts, linear_of_parts
from secateur.runtime.layout import PackedWeight


class DenseWeight(Tensor):
    """The dense matrix of a packed layer: its shape, dtype and device at once, its numbers when something needs them.

    Every operation on it expands the matrix anew, and the result is an ordinary tensor. One that would change it raises
    SecateurError, because the change would be lost.
    """

    packed: PackedWeight

    @staticmethod
    def __new__(cls, packed: PackedWeight, dtype: torch.dtype) -> "DenseWeight":
        """Without memory of its own."""
        shape, device = (packed.rows, packed.columns), packed.values.device
        found: DenseWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        found.packed = packed
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as no class method
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        given = {argument.name: value for argument, value in zip(function._schema.arguments, arguments, strict=False)}
        for argument in function._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance({**given, **(options or {})}.get(argument.name), DenseWeight):
                raise SecateurError(
                    "a packed weight cannot be changed. Load the model with backend='dense', or unpack the checkpoint."
                )

        def dense(value: Any) -> Any:
            return value.packed.expand().to(value.dtype) if isinstance(value, DenseWeight) else value

        return function(*tree_map(dense, arguments), **tree_map(dense, options or {}))


class PackedLinear(nn.Module):
    """`y = x @ W.T + bias` of a packed weight, in the dtype of `x`, on the CPU.

    The parts of the weight are buffers that no state dict holds, as bytes and integers, so that `to(dtype)` leaves them
    as they are. There is no gradient: a backward pass through it raises torch's error of an operator without one.
    `weight` is for code that asks a layer for the shape, dtype and device of its weight, or multiplies by it itself;
    its dtype is what the layer is computed in: the given one, that of the bias, or that of the packed values.
    """

    numbers: Tensor
    masks: Tensor
    values: Tensor
    starts: Tensor
    scales: Tensor | None
    computed: Tensor  # empty: what `to(dtype)` does to it, it would do to a dense weight

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.in_features, self.out_features = weight.columns, weight.rows
        for part in ("numbers", "masks", "values", "starts", "scales"):
            self.register_buffer(part, getattr(weight, part), persistent=False)
        nothing = torch.empty(0)
        self._about = weight.with_parts(nothing, nothing, nothing, nothing, None)
        stored = torch.float32 if weight.dtype == torch.int8 else weight.dtype
        dtype = dtype or (stored if bias is None else bias.dtype)
        self.register_buffer("computed", torch.empty(0, dtype=dtype), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _parts(self) -> Parts:
        return self.numbers, self.masks, self.values, self.starts, self.scales

    @property
    def packed(self) -> PackedWeight:
        """The packed weight; `packed.expand()` is the dense one."""
        return self._about.with_parts(*self._parts())

    @property
    def weight(self) -> DenseWeight:
        """The dense matrix, which is only made by an operation that needs its numbers."""
        return DenseWeight(self.packed, self.computed.dtype)

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
