"""Forwards that wait at products, so that none is repeated while the matrices of a block are pruned one after another.

Each batch runs in a greenlet of its own: whatever code multiplies, its forward can stop there and go on later. Threads
could stop as well, but each would start a pool of OpenMP threads.
"""

import contextvars
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from secateur.errors import ModelStructureError
from secateur.models.flow.stream import Stream
from secateur.models.flow.tap import InputTap, Key, Product
from secateur.models.shape.structure import Block


@contextmanager
def own_switches(device: torch.device) -> Iterator[None]:
    """What code around a product may have switched for the whole thread is as it was afterwards, whoever ran since."""
    grad, dtype, autocast = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled(device.type)
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        torch.set_autocast_enabled(device.type, autocast)


class WaitingForwards:
    """The forwards of all batches through a loaded block, each of which waits before it multiplies with `waits_at`.

    `leader` says for every key of a matrix whose input it reads, as an `InputTap` finds it out. In-place changes of
    parameters hold from the product on at which a forward waits.
    """

    def __init__(
        self,
        block: Block,
        stream: Stream,
        parameters: Mapping[str, tuple[nn.Parameter, bool]],
        leader: Mapping[Key, Key],
    ) -> None:
        self.block, self.stream = block, stream
        self.waits_at = set(parameters)
        self._forwards = [_Forward(self, batch, parameters, leader) for batch in range(len(stream.batches))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for forward in self._forwards:
            forward.close()

    def reach(self, batch: int, names: Collection[str]) -> Product | None:
        """The product with one of these parameters before which a batch waits now; None where it has none.

        Raises `ModelStructureError` where it cannot wait.
        """
        forward = self._forwards[batch]
        forward.go_on()
        return forward.waiting if forward.waiting is not None and forward.waiting.name in names else None

    def output(self, batch: int) -> Tensor:
        """The hidden states that the block makes of a batch, which waits for nothing any more."""
        forward = self._forwards[batch]
        forward.go_on()
        assert forward.output is not None
        output, forward.output = forward.output, None  # Memory: not held here as well
        return output


class _Forward(InputTap):
    """One of them. Checks that matrices share inputs as they did before, and are multiplied once."""

    def __init__(
        self,
        forwards: WaitingForwards,
        batch: int,
        parameters: Mapping[str, tuple[nn.Parameter, bool]],
        leader: Mapping[Key, Key],
    ) -> None:
        super().__init__(parameters)
        self.leader = dict(leader)
        self.waiting: Product | None = None  # that it waits before
        self.output: Tensor | None = None
        self._forwards, self._batch, self._once = forwards, batch, set(leader)
        self._sharing = Counter(leader.values())
        self._greenlet = greenlet(self._run)
        self._greenlet.gr_context = contextvars.copy_context()

    def go_on(self) -> None:
        """Run until it has to wait, or to the end."""
        if self._greenlet.dead or (self.waiting is not None and self.waiting.name in self._forwards.waits_at):
            return
        self.waiting = None
        self._greenlet.parent = getcurrent()
        with own_switches(self._forwards.stream.device):
            self._greenlet.switch()

    def close(self) -> None:
        """End it where it is."""
        self.waiting = None
        if self._greenlet:
            with own_switches(self._forwards.stream.device):
                self._greenlet.throw(GreenletExit)

    def _run(self) -> None:
        with self:
            self.output = self._forwards.stream.run(self._forwards.block, self._batch)

    def before(self, product: Product) -> None:
        """Wait, if this product is to be waited at."""
        key = (product.name, product.expert)
        if key in self._once and key in self.calls:
            raise ModelStructureError(
                f"{key[0]}: is multiplied more than once for batch {self._batch + 1}, and once for the first one, so "
                "that its inputs are not all known when it is pruned. Use --within block."
            )
        super().before(product)
        if key in self._once:
            leader = self.leader[key]
            self._sharing[leader] -= 1
            if not self._sharing[leader]:  # Memory: nobody asks for this input any more
                self.let_go(leader)
        if product.name in self._forwards.waits_at:
            self.waiting = product
            assert self._greenlet.parent is not None
            with own_switches(self._forwards.stream.device):
                self._greenlet.parent.switch()
