"""How a model calls its blocks: calls seen by stubs in their place, and what they hand back."""

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from secateur.errors import ModelStructureError
from secateur.models.shape.skeleton import Skeleton
from secateur.models.shape.structure import Block


@dataclass
class Call:
    """How one block was called for one batch, without its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None  # the name under which the hidden states go in; None when they are the first argument

    def of(self, module: nn.Module, states: Tensor) -> Any:
        """What a block's module returns when it is called in this way on hidden states."""
        if self.keyword is None:
            return module(states, *self.args, **self.kwargs)
        return module(*self.args, **{self.keyword: states, **self.kwargs})

    def mapped(self, function: Callable[[Any], Any]) -> "Call":
        """The call with `function(value)` in place of every argument."""
        kwargs = {key: function(value) for key, value in self.kwargs.items()}
        return Call(tuple(map(function, self.args)), kwargs, self.keyword)

    def with_copies(self) -> "Call":
        """The call with shallow copies of the mappings in which blocks leave something for later ones."""
        return self.mapped(lambda value: copy(value) if isinstance(value, MutableMapping) else value)

    def given(self, value: object) -> bool:
        """Whether this very object is one of the arguments."""
        return any(argument is value for argument in (*self.args, *self.kwargs.values()))


def replay(block: Block, call: Call, states: Tensor) -> Tensor:
    """The hidden states that a loaded block makes of others, called in the given way."""
    output = call.of(block.module, states)
    return output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True)
class Structure:
    """How a block hands its hidden states back: alone, or as the first of a `kind` of sequence with the `rest`."""

    kind: type | None
    rest: Sequence[Any]

    @classmethod
    def of(cls, output: Any, block: Block) -> "Structure":
        """That of what a block has returned. Raises `ModelStructureError` where that is no hidden states."""
        if isinstance(output, Tensor):
            return cls(None, ())
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            return cls(type(output), tuple(output[1:]))
        raise ModelStructureError(f"{block.path}: returns {type(output).__name__}, expected hidden states or a tuple.")

    def without_tensors(self) -> "Structure":
        """The same with None in the place of each further tensor."""
        return Structure(self.kind, [None if isinstance(item, Tensor) else item for item in self.rest])

    def filled(self, states: Tensor) -> Any:
        """What a block would return whose hidden states are these."""
        return states if self.kind is None else self.kind((states, *self.rest))


Run = Callable[[int, Tensor, Call], Any]
"""Is given a block's number, its hidden states and the rest of its call, and returns what the block would return."""


class Finished(Exception):  # noqa: N818 - not an error: it ends a forward after the last block
    """The last block has been reached; the head is not needed."""


class _Stub(nn.Module):
    """Stands in for a block: whatever else the model asks of the block, the block itself answers."""

    def __init__(self, block: nn.Module, run: Callable[[Tensor, Call], Any]) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not as a submodule
        self._run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*hidden_states_of(args, kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)


def hidden_states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states that a block is called with, and the call without them."""
    if args and isinstance(args[0], Tensor):
        return args[0], Call(args[1:], kwargs, None)
    for keyword in ("hidden_states", "x", "hidden_state", "input"):
        if isinstance(kwargs.get(keyword), Tensor):
            return kwargs.pop(keyword), Call(args, kwargs, keyword)
    raise ModelStructureError(
        f"a block was called without hidden states: positional {[type(arg).__name__ for arg in args]}, "
        f"keywords {sorted(kwargs)}."
    )


@contextlib.contextmanager
def stubbed(skeleton: Skeleton, run: Run) -> Iterator[None]:
    """The model with every block replaced by a stub that calls `run`."""
    lists = [(skeleton.model.get_submodule(stack.path), stack.blocks) for stack in skeleton.stacks]
    try:
        for modules, blocks in lists:
            for number, block in enumerate(blocks):
                modules._modules[str(number)] = _Stub(block.module, partial(run, block.index))
        yield
    finally:
        for modules, blocks in lists:
            for number, block in enumerate(blocks):
                modules._modules[str(number)] = block.module
