"""Forwards that wait at products, so that none is repeated while the matrices of a block are pruned one after another.

Each batch runs in a greenlet of its own: whatever code multiplies, its forward can stop there and go on later. Threads
could stop as well, but each would start a pool of OpenMP threads.
"""

import contextvars
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from secateur.errors import ModelStructureError
from secateur.models.flow.inputs import tokens_in
from secateur.models.flow.stream import HiddenStates, Stream, states_folder
from secateur.models.flow.tap import InputTap, Key, Product, watched_inputs
from secateur.models.shape.structure import Block


@contextmanager
def own_switches(device: torch.device) -> Iterator[None]:
    """Restores at the end what code around a product may switch for the whole thread: grad mode, dtype and autocast."""
    grad, dtype, autocast = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled(device.type)
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        torch.set_autocast_enabled(device.type, autocast)


def _strided(value: object) -> Iterator[Tensor]:
    """The tensors in a value that have memory."""
    if isinstance(value, Tensor):
        if value.layout == torch.strided and value.device.type != "meta":
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _strided(item)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class WaitingForwards:
    """The forwards of all batches through a loaded block, which wait before they multiply with a parameter.

    `waits_at` names those at which they still wait. Values that are written into a parameter count from the product on
    before which a forward waits.
    """

    def __init__(
        self,
        block: Block,
        stream: Stream,
        parameters: Mapping[str, tuple[Tensor, bool]],
        leader: Mapping[Key, Key],
        *,
        watched: Collection[str] = (),
        offload: str = "never",
        place: Path = Path(),
    ) -> None:
        """`leader` maps each matrix to the one whose input it shares, as an `InputTap` finds out.

        What goes into the `watched` submodules is kept for `seen`.

        `offload` and `place` are those of `states_folder`, for what forwards hold while they wait: on a GPU in its own
        memory while half of what is free there is enough, then in that of the host, then in files.
        """
        self.block, self.stream = block, stream
        self.offload, self.place = offload, place
        self._folder: Path | None = None
        self._moves = False
        self.waits_at = set(parameters)
        self._forwards = [_Forward(self, batch, parameters, leader) for batch in range(len(stream.batches))]
        self._hooks = ExitStack()
        self._hooks.enter_context(watched_inputs(block.module, watched, self._see))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()
        for forward in self._forwards:
            forward.close()

    def reach(self, batch: int, names: Collection[str]) -> Product | None:
        """Let a batch go on, and return the product with one of these parameters before which it waits, if it does.

        Raises `ModelStructureError` where a matrix is multiplied differently than in the first batch.
        """
        forward = self._forwards[batch]
        forward.go_on()
        return forward.waiting if forward.waiting is not None and forward.waiting.name in names else None

    def multiply(self, batch: int) -> Tensor:
        """The result that the product before which a batch waits would have now."""
        return self._forwards[batch].multiply()

    def seen(self, batch: int, path: str) -> Tensor | None:
        """What went into a watched submodule; None where it was not reached, or where the model has overwritten it."""
        found, version = self._forwards[batch].seen.get(path, (None, 0))
        return found if found is not None and found._version == version else None

    def _see(self, path: str, value: Tensor) -> None:
        forward = next((own for own in self._forwards if own.greenlet is getcurrent()), None)
        if forward is not None:
            forward.seen.setdefault(path, (value, value._version))

    def held_bytes(self, batch: int) -> int:
        """Bytes that a waiting forward holds and nobody else does."""
        return sum(map(len, self._forwards[batch].held()))

    def set_aside(self, batch: int) -> None:
        """Move what a waiting forward holds to host memory, or to a file, where there is too much of it."""
        forward, device = self._forwards[batch], self.stream.device
        if batch == 0 and not self._moves:
            batches = self.stream.batches
            needed = self.held_bytes(0) * tokens_in(batches, 1) // tokens_in(batches[:1], 1)
            on_gpu, named = device.type == "cuda", self.offload not in ("auto", "never")
            if named or not on_gpu or needed > torch.cuda.mem_get_info(device)[0] // 2:
                self._folder = states_folder(self.offload, needed, self.place)
                self._moves = on_gpu or self._folder is not None
        if self._moves:
            forward.set_aside(self._folder, pin=self._folder is None)

    def output(self, batch: int) -> Tensor:
        """The hidden states that the block makes of a batch, which waits for nothing any more."""
        forward = self._forwards[batch]
        forward.go_on()
        assert forward.output is not None
        output, forward.output = forward.output, None  # Memory: not held here as well
        return output


class _Forward(InputTap):
    """The forward of one batch. Checks that matrices share inputs as in the first batch, and are multiplied once."""

    def __init__(
        self,
        forwards: WaitingForwards,
        batch: int,
        parameters: Mapping[str, tuple[Tensor, bool]],
        leader: Mapping[Key, Key],
    ) -> None:
        super().__init__(parameters)
        self.leader = dict(leader)
        self.waiting: Product | None = None  # the product before which it waits
        self.output: Tensor | None = None
        self._forwards, self._batch, self._once = forwards, batch, set(leader)
        self._sharing = Counter(leader.values())
        self.seen: dict[str, tuple[Tensor, int]] = {}
        self.multiply: Callable[[], Tensor] = lambda: torch.empty(0)
        self._made: list[weakref.ref[Tensor]] = []  # results so far, where this forward made their memory
        self._own: set[int] = set()  # addresses of that memory
        self._aside: HiddenStates | None = None
        self._emptied: list[torch.UntypedStorage] = []
        self.greenlet = greenlet(self._run)
        self.greenlet.gr_context = contextvars.copy_context()

    def go_on(self) -> None:
        """Run until it has to wait, or to the end."""
        if self.greenlet.dead or (self.waiting is not None and self.waiting.name in self._forwards.waits_at):
            return
        self.waiting = None
        self._bring_back()
        self.greenlet.parent = getcurrent()
        with own_switches(self._forwards.stream.device):
            self.greenlet.switch()
        if self.greenlet.dead:
            self.seen.clear()

    def close(self) -> None:
        """End it where it is."""
        self.waiting = None
        self.seen.clear()
        if self._aside is not None:
            self._aside.close()
        if self.greenlet:
            with own_switches(self._forwards.stream.device):
                self.greenlet.throw(GreenletExit)

    def _run(self) -> None:
        with self:
            self.output = self._forwards.stream.run(self._forwards.block, self._batch)

    def held(self) -> list[torch.UntypedStorage]:
        """The storages of this forward's results that are alive, except those that others hold too, such as weights."""
        alive = [tensor for reference in self._made if (tensor := reference()) is not None]
        self._made = [weakref.ref(tensor) for tensor in alive]
        found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in alive}
        return [storage for address, storage in found.items() if address and len(storage)]

    def set_aside(self, folder: Path | None, *, pin: bool) -> None:
        """Move that memory to files in the folder, or to host memory."""
        if self.greenlet.dead or self._aside is not None:
            return
        self._emptied = self.held()
        self._aside = HiddenStates(len(self._emptied), folder, pin=pin)
        for number, storage in enumerate(self._emptied):
            self._aside.put(number, _bytes_of(storage))
            storage.resize_(0)

    def _bring_back(self) -> None:
        if self._aside is None:
            return
        for number, storage in enumerate(self._emptied):
            kept = self._aside.get(number, storage.device)
            storage.resize_(kept.numel())
            _bytes_of(storage).copy_(kept)
        self._own = {storage.data_ptr() for storage in self._emptied}
        self._aside.close()
        self._aside, self._emptied = None, []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.multiply = lambda: func(*args, **(kwargs or {}))
        result = super().__torch_function__(func, types, args, kwargs)
        del self.multiply
        for tensor in _strided(result):
            address = tensor.untyped_storage().data_ptr()
            if address not in self._own:
                operands = _strided((args, *(kwargs or {}).values()))
                if any(operand.untyped_storage().data_ptr() == address for operand in operands):
                    continue  # a part of what others made
                self._own.add(address)
            self._made.append(weakref.ref(tensor))
        return result

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
            assert self.greenlet.parent is not None
            with own_switches(self._forwards.stream.device):
                self.greenlet.parent.switch()
