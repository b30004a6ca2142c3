"""The fastest products of torch for one row of input, which `bench` compares with."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

TRIALS = 9  # of a matrix by each of the products


def faster_by_mv(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of the shapes for which torch.mv takes less time for one row than F.linear, which they call.

    Of each shape, as many layers as a cache does not hold are multiplied by in turns; the medians decide.
    """
    by_shape: dict[tuple[torch.Size, torch.dtype], list[nn.Linear]] = {}
    for part in module.modules():
        if type(part) is nn.Linear:
            by_shape.setdefault((part.weight.shape, part.weight.dtype), []).append(part)
    found: list[nn.Linear] = []
    for (shape, dtype), layers in by_shape.items():
        x = torch.randn(1, shape[1]).to(dtype)
        times: tuple[list[float], list[float]] = ([], [])
        for trial in range(TRIALS):
            weight = layers[trial % len(layers)].weight
            started = time.perf_counter()
            functional.linear(x, weight)
            between = time.perf_counter()
            torch.mv(layers[(trial + 1) % len(layers)].weight, x[0])
            times[0].append(between - started)
            times[1].append(time.perf_counter() - between)
        if statistics.median(times[1]) < statistics.median(times[0]):
            found += layers
    return found


@contextmanager
def products_by_mv(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """While in it, these layers multiply a single row by torch.mv."""

    def by_mv(layer: nn.Linear, x: Tensor) -> Tensor:
        y = torch.mv(layer.weight, x.reshape(-1))
        return (y if layer.bias is None else y + layer.bias).view(*x.shape[:-1], -1)

    for layer in layers:
        layer.forward = by_mv.__get__(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
