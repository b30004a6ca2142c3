"""Squared gradients of what matrices make of their inputs, summed over tokens in a backward pass."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from secateur.core.statistics import SquaredNorm
from secateur.models.flow.tap import BackwardTap, Key, Product


class OutputGradientTap(BackwardTap):
    """Adds up the squared gradients of all outputs of parameters over tokens: `sums`, one for each (of an expert)."""

    def __init__(self, parameters: Mapping[str, tuple[Tensor, bool]]) -> None:
        super().__init__(parameters)
        self.sums: dict[Key, SquaredNorm] = {}
        self._scale = 1.0

    def begin(self, samples: int, length: int, scale: float = 1.0) -> None:
        """Remember what makes the loss of a sample, the mean over its predictions, their sum."""
        self._scale = scale / (length - 1)

    def after(self, product: Product, result: Tensor, factor: float) -> Tensor:
        """The result, whose gradient is received in the backward."""
        if not result.requires_grad:
            # Exact: a product that does not depend on the hidden states has a gradient all the same.
            result = result.detach().requires_grad_().clone()
        routed = None
        if product.batched and product.x.dim() == 3:
            # Of a product of every expert with every token, only the rows that were routed there count.
            routed = (product.x.detach() != 0).any(dim=-1)
        result.register_hook(partial(self._receive, product, routed, factor))  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def _receive(self, product: Product, routed: Tensor | None, factor: float, gradient: Tensor) -> None:
        gradient = gradient.transpose(-1, -2) if product.is_left else gradient
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * (factor / self._scale)
        if not product.batched:
            self._add((product.name, product.expert), wide.reshape(-1, wide.shape[-1]))
            return
        for expert, rows in enumerate(wide):
            self._add((product.name, expert), rows if routed is None else rows[routed[expert]])

    def _add(self, key: Key, rows: Tensor) -> None:
        if key not in self.sums:
            self.sums[key] = SquaredNorm.empty(rows.shape[1], rows.device)
        self.sums[key].update(rows)
