"""Where a matrix writes to the residual stream, found by nudging what it gives and looking at what follows.

For targets that make up for damage done before. Arai and Ichikawa, "Quantization Error Propagation" (arXiv 2504.09629),
correct in part as well, but towards each matrix's own outputs in the dense model.

Names of modules say nothing that holds for every architecture. A sum, however, passes a nudge on as it is, and a norm,
a gate or a router does not.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.matrices import Matrix, tapped
from secateur.models.stream import Stream
from secateur.models.structure import Block
from secateur.models.tap import Enough, ProductTap

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # and 0.1 in half precision: of a nudge's length


@dataclass(frozen=True)
class Writer:
    """A matrix whose outputs, times `factor`, are added to the residual stream.

    The sum is what goes into the block's submodule `at`, or what comes out of the block where that is None.
    """

    at: str | None
    factor: float


class ResidualRecorder:
    """Keeps what goes into some submodules of a block for the first time in a forward, while it is active."""

    def __init__(
        self, block: nn.Module, paths: Iterable[str], *, samples: int | None = None, stop: bool = False
    ) -> None:
        """`samples` are how many of the batch to keep. With `stop`, `Enough` ends the forward when all were reached."""
        self.seen: dict[str, Tensor] = {}
        self._modules = {path: block.get_submodule(path) for path in paths}
        self._samples = samples
        self._stop = stop
        self._stack = ExitStack()

    def __enter__(self) -> "ResidualRecorder":
        for path, module in self._modules.items():
            handle = module.register_forward_pre_hook(self._hook(path), with_kwargs=True)
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if found is not None and path not in self.seen:
                # Exact: a block may add to it in place later.
                self.seen[path] = found[: self._samples].clone() if found.dim() > 2 else found.clone()
            if self._stop and len(self.seen) == len(self._modules):
                raise Enough

        return hook


class _Nudge(ProductTap):
    """Adds something to what one parameter gives; `given` is what it gave."""

    def __init__(self, parameters: dict[str, tuple[nn.Parameter, bool]], by: Tensor | None) -> None:
        super().__init__(parameters)
        self._by = by
        self.given: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        product = self.product(getattr(func, "__name__", ""), args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if product is None:
            return result
        self.given.append(result)
        if self._by is None or result.numel() != self._by.numel():
            return result
        return result + self._by.view(result.shape)


def residual_writers(block: Block, matrices: Sequence[Matrix], stream: Stream) -> dict[str, Writer]:
    """Those of the matrices of a loaded block that write to the residual stream, by name; experts never do.

    Found by running the first batch, once more for each candidate. Between a matrix and the first place where its nudge
    arrives as it is may lie dropout, reshaping and multiplication with a constant, but no norm, gate or router.
    """
    states = stream.states.get(0, stream.device)
    wanted = [m for m in matrices if m.expert is None and m.rows is None and m.shape[0] == states.shape[-1]]
    if not wanted:
        return {}
    paths = [path for path, _ in block.module.named_modules() if path]
    generator = torch.Generator().manual_seed(0)
    nudge = torch.randn(states.shape, generator=generator).to(states)
    # As long as the stream itself, token by token: a shorter one would drown in half precision's rounding.
    nudge *= states.float().square().mean(dim=-1, keepdim=True).sqrt().to(states)
    found: dict[str, Writer] = {}
    for matrix in wanted:
        parameters, _ = tapped(block, [matrix])
        before, given = _places(block, stream, paths, _Nudge(parameters, None))
        after, _ = _places(block, stream, paths, _Nudge(parameters, nudge))
        if len(given) == 1 and given[0].shape[-1] == states.shape[-1] and given[0].numel() == states.numel():
            writer = _first(before, after, given[0].view(states.shape)[:1], nudge[:1])
            if writer is not None:
                found[matrix.name] = writer
    return found


def _places(
    block: Block, stream: Stream, paths: Sequence[str], tap: "_Nudge"
) -> tuple[dict[str | None, Tensor], list[Tensor]]:
    """What reaches each submodule, in the order of the forward, and at the end what comes out; what was given."""
    # Memory: one sample of each place, which is enough to see where a nudge arrives.
    recorder = ResidualRecorder(block.module, paths, samples=1)
    with recorder, tap:
        output = stream.run(block, 0, aside=True)
    places: dict[str | None, Tensor] = {}
    places.update(recorder.seen)
    places[None] = output[:1]
    return places, tap.given


def _first(
    before: dict[str | None, Tensor], after: dict[str | None, Tensor], given: Tensor, nudge: Tensor
) -> Writer | None:
    """The first place where the nudge arrives as it is, in a sum with something else than what was given."""
    tolerance = max(TOLERANCE.get(tensor.dtype, 0.1) for tensor in (given, nudge))
    given, nudge = given.double().flatten(0, -2), nudge.double().flatten(0, -2)
    for path, value in before.items():
        if path not in after or value.shape[-1] != nudge.shape[-1] or value.numel() < nudge.numel():
            continue
        # Some blocks flatten samples and tokens into one dimension.
        value, arrived = (
            places[path].double().reshape(-1, nudge.shape[-1])[: len(nudge)] for places in (before, after)
        )
        arrived = arrived - value
        factor = float((arrived * nudge).sum() / nudge.square().sum())
        if abs(factor) < 0.01 or (arrived - factor * nudge).norm() > tolerance * (factor * nudge).norm():
            continue
        alone = (value - factor * given).norm() <= tolerance * value.norm()
        if not alone:
            return Writer(path, factor)
    return None
