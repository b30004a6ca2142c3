"""Which matrices write to the residual stream, and where: found from derivatives, in any architecture.

Names of modules say nothing that holds everywhere. What is added to the stream, however, has the same constant
derivative in every entry of it, and after a norm, a gate or a router it has not. The stream itself is what the block's
input reaches without passing through a product.

For targets that make up for damage done before. Arai and Ichikawa, "Quantization Error Propagation" (arXiv 2504.09629),
correct in part as well, but towards each matrix's own outputs in the dense model.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.flow.stream import Stream
from secateur.models.flow.tap import MULTIPLICATIONS, Enough, ProductTap, watched_inputs
from secateur.models.shape.matrices import Matrix, tapped
from secateur.models.shape.structure import Block

BLOCK_INPUT = "input"


@dataclass(frozen=True)
class ResidualWriter:
    """A matrix whose outputs, times `factor`, are added to the residual stream.

    The sum is what goes into the block's submodule `at`, or what comes out of the block where that is None. `base` is
    what the outputs are added to: "input" of the block, what goes into that submodule, or None where neither is.
    """

    at: str | None
    factor: float
    base: str | None = None


@contextmanager
def first_inputs(block: nn.Module, paths: Collection[str], *, stop: bool = False) -> Iterator[dict[str | None, Tensor]]:
    """What goes into some submodules of a block for the first time in a forward, by their paths.

    With `stop`, the forward ends with `Enough` when all of them were reached.
    """
    found: dict[str | None, Tensor] = {}

    def keep(path: str, value: Tensor) -> None:
        if path not in found:
            found[path] = value.clone()  # Exact: a block may add to it in place later.
        if stop and len(found) == len(paths):
            raise Enough

    with watched_inputs(block, paths, keep):
        yield found


class _Cut(ProductTap):
    """Cuts the graph of a forward at every product; what some parameters make begins it anew."""

    def __init__(
        self, parameters: dict[str, tuple[Tensor, bool]], others: Iterable[nn.Parameter], wanted: set[str]
    ) -> None:
        super().__init__(parameters)
        self._others = {parameter.untyped_storage().data_ptr() for parameter in others}
        self._wanted = wanted
        self.results: dict[str, list[Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        product = self.product(name, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if product is None:
            tensors = [value for value in args if isinstance(value, Tensor)] if name in MULTIPLICATIONS else []
            routed = any(tensor.untyped_storage().data_ptr() in self._others for tensor in tensors)
            return result.detach() if routed else result
        result = result.detach()
        if product.name in self._wanted:
            self.results.setdefault(product.name, []).append(result.requires_grad_())
            result = result.clone()  # a block may add to it in place
        return result


def residual_writers(block: Block, matrices: Sequence[Matrix], stream: Stream) -> dict[str, ResidualWriter]:
    """Those of all matrices of a loaded block that write to the residual stream, by name; experts never do.

    Found by one forward of the first batch. Between a matrix and the sum may lie dropout, reshaping and multiplication
    with a constant, but no norm, gate or router. Convolutions add to channels, which are no row for each token.
    """
    parameters, _ = tapped(block, matrices)
    weights = {f"{block.path}.{name}": value for name, value in block.module.named_parameters()}
    others = [value for name, value in weights.items() if value.dim() > 1 and name not in parameters]
    states = stream.states.get(0, stream.device).detach().requires_grad_()
    width = states.shape[-1]
    candidates = {
        m.name: m.parameter
        for m in matrices
        if m.expert is None and m.rows is None and m.shape[0] == width and weights[m.parameter].dim() == 2
    }
    cut = _Cut(parameters, others, set(candidates.values()))
    paths = [path for path, _ in block.module.named_modules() if path]
    with torch.enable_grad(), cut, first_inputs(block.module, paths) as inputs:
        entering = states.clone()
        output = stream.run(block, 0, states=entering, aside=True)
    found: dict[str, ResidualWriter] = {}
    leaving: set[str] = set()
    single = {name: cut.results[path][0] for name, path in candidates.items() if len(cut.results.get(path, ())) == 1}
    places: dict[str, Tensor] = {BLOCK_INPUT: states}  # reached so far, each value under the first of its places
    made_by = {(entering.grad_fn, 0)}
    for at, value in {**inputs, None: output}.items():
        if not value.requires_grad or value.numel() != states.numel() or value.shape[-1] != width:
            continue
        if at is not None:
            # Exact: q, k and v read one value. Two that are equal may have come about differently, where one that
            # was added is zero.
            assert value.grad_fn is not None
            origin = value.grad_fn.next_functions[0]
            if origin in made_by:
                continue
            made_by.add(origin)
        signs = torch.randint(2, value.shape, generator=torch.Generator().manual_seed(0)).to(value) * 2 - 1
        whole, *parts = torch.autograd.grad(
            value, [states, *single.values()], signs, retain_graph=True, allow_unused=True
        )
        in_stream = whole is not None and bool(whole.any())
        for name, part in zip(single, parts, strict=True):
            factor = _constant(part, signs)
            if in_stream and factor and name not in found:
                added = factor * cut.results[candidates[name]][0].reshape(value.shape)
                # The latest one: an earlier one is as good only while nothing is added in between.
                bases = (place for place, own in reversed(places.items()) if _sums_to(own, added, value))
                found[name] = ResidualWriter(at, factor, next(bases, None))
            if at is None and part is not None and bool(part.any()):
                leaving.add(name)
        if at is not None:
            places[at] = value
    # A sum that only some module inside reads is not the stream that leaves the block.
    return {name: writer for name, writer in found.items() if name in leaving}


def _sums_to(one: Tensor, other: Tensor, value: Tensor) -> bool:
    """Whether the value is the sum of both, to the last bit."""
    return one.numel() == value.numel() and torch.equal(one.reshape(value.shape) + other, value)


def _constant(derivative: Tensor | None, signs: Tensor) -> float:
    """The factor between a derivative and the signs it was taken with; 0 where it is not the same everywhere."""
    if derivative is None or derivative.numel() != signs.numel():
        return 0.0
    ratio = derivative.reshape(signs.shape).float() * signs.float()
    factor = float(ratio.mean())
    return factor if abs(factor) > 1e-6 and float((ratio - factor).abs().max()) <= 1e-3 * abs(factor) else 0.0
