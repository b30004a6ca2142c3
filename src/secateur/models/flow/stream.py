"""Hidden states on their way through the blocks.

The model runs once per batch with every block replaced by a stub that records the block's own call and hands the
hidden states on unchanged. Replaying each real block with its own recorded call, on the hidden states of the block
before it, is then exactly the model's forward, one block at a time, for any architecture.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, ModelStructureError, SecateurError
from secateur.files.writer import reserve
from secateur.models.flow.inputs import forward, shortest
from secateur.models.flow.memory import available_bytes
from secateur.models.opening.configuration import reason
from secateur.models.shape.causality import bidirectional, sees_later_tokens
from secateur.models.shape.skeleton import Skeleton, loaded
from secateur.models.shape.structure import Block, embeddings_of

LOGITS_BYTES = 64 << 20  # of float32 logits that are computed at once


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


Run = Callable[[int, Tensor, Call], Any]
"""Is given a block's number, its hidden states and the rest of its call, and returns what the block would return."""


class _Finished(Exception):  # noqa: N818 - not an error: it ends a forward after the last block
    """The last block has been reached; the head is not needed."""


class _Stub(nn.Module):
    """Stands in for a block: whatever else the model asks of the block, the block itself answers."""

    def __init__(self, block: nn.Module, run: Callable[[Tensor, Call], Any]) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not as a submodule
        self._run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*_hidden_states(args, kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)


class HiddenStates:
    """The hidden states of every batch between two blocks, in host memory or in memory-mapped files.

    The files lie in `folder` and have no name, so that nothing is left of them when the process ends, however it does.
    """

    def __init__(self, batches: int, folder: Path | None, *, pin: bool = False) -> None:
        self._batches: list[Tensor | None] = [None] * batches
        self._folder = folder
        self._pin = pin
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(
                    f"{folder}: no folder for hidden states can be made ({error.strerror}). Name another one with "
                    "--offload-states."
                ) from None

    def put(self, batch: int, states: Tensor) -> None:
        """Keep the states of a batch, in place of earlier ones."""
        kept = self._batches[batch]
        if self._folder is None and not self._pin:
            self._batches[batch] = states.to("cpu")
            return
        if kept is None or kept.shape != states.shape:
            kept = self._batches[batch] = self._empty(states)
        # Exact: only page-locked memory takes part in the order of the GPU's work; other copies have to wait.
        kept.copy_(states, non_blocking=kept.is_pinned())

    def _empty(self, like: Tensor) -> Tensor:
        if self._folder is None:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        # Memory: the pages of a mapped file are the system's to write out and drop.
        try:
            with tempfile.TemporaryFile(dir=self._folder) as stream:
                # A mapped file without room on the disk would end the process with a bus error, not an exception.
                reserve(stream.fileno(), like.nbytes)
                file = f"/dev/fd/{stream.fileno()}"
                return torch.from_file(file, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
        except (OSError, RuntimeError) as error:  # the second from torch, where a file cannot be mapped
            why = error.strerror if isinstance(error, OSError) else reason(error)
            raise CheckpointError(
                f"{self._folder}: cannot hold {like.nbytes:,} bytes of hidden states ({why}). Free some "
                "space there, or name another folder with --offload-states."
            ) from None

    def get(self, batch: int, device: torch.device) -> Tensor:
        """The states of a batch, on the device."""
        states = self._batches[batch]
        if states is None:
            raise RuntimeError(f"batch {batch} has no hidden states yet")
        return states.to(device, non_blocking=self._pin)

    def close(self) -> None:
        """Forget the states; the room that their files took is free again."""
        self._batches = [None] * len(self._batches)


def states_folder(offload: str, bytes_needed: int, place: Path) -> Path | None:
    """Where hidden states go: None for host memory, else a folder for memory-mapped files.

    "auto" maps files in the folder `place` when the states would take more than half of the memory that is available
    now, "never" stays in memory, anything else names a folder.
    """
    if offload == "never":
        return None
    if offload == "auto":
        return place if bytes_needed > available_bytes() // 2 else None
    return Path(offload).expanduser()


def default_batch_size(length: int, device: torch.device) -> int:
    """Samples that run through a block at once: about 2,048 tokens on a CPU, 16,384 on a GPU."""
    return max(1, (16384 if device.type == "cuda" else 2048) // length)


class Stream:
    """Calibration samples at one block of the model, moved on block by block.

    Each of `batches` is what the model's forward takes: token ids of shape (samples, length), whose length may differ
    from batch to batch, or images. `states` holds what goes into the next block. With `predicting`, next tokens will be
    asked for, and a model whose tokens see later ones is refused.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Sequence[Tensor],
        *,
        states_folder: Path | None = None,
        predicting: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.skeleton = skeleton
        self._predicting = predicting
        self.device = skeleton.device
        self.batches = batches
        self.states = HiddenStates(len(batches), states_folder, pin=skeleton.device.type == "cuda")
        self._calls: list[list[Call]] = []
        self._intern: dict[tuple[Any, ...], list[Tensor]] = {}
        try:
            self._record(progress)
        except BaseException:
            self.close()
            raise

    @torch.no_grad()
    def _record(self, progress: Callable[[int, int], None] | None) -> None:
        self._structures = self._output_structures()
        for number in range(len(self.batches)):
            self._calls.append(self._recorded(number))
            if progress is not None:
                progress(number + 1, len(self.batches))
        self._intern.clear()

    def _recorded(self, number: int) -> list[Call]:
        """How the model calls its blocks for a batch; what goes into the first block is kept."""
        calls: list[Call] = []
        interned: dict[int, tuple[Tensor, Tensor]] = {}

        def run(index: int, states: Tensor, call: Call) -> Any:
            calls.append(call.mapped(lambda value: self._interned(value, interned)))
            if index == 0:
                self.states.put(number, states)
            if index == len(self.skeleton.blocks) - 1:
                raise _Finished
            return self._structures[type(self.skeleton.blocks[index].module)](states)

        with _stubbed(self.skeleton, run), contextlib.suppress(_Finished):
            forward(self.skeleton.model, self.batches[number].to(self.device))
        return calls

    def _output_structures(self) -> dict[type[nn.Module], Callable[[Tensor], Any]]:
        """For each class of blocks, how it hands its hidden states back: learnt by running one of it on two tokens.

        The forward runs to its end, or to a head that is not loaded, which shows whether every block is called exactly
        once, in order.
        """
        wrappers: dict[type[nn.Module], Callable[[Tensor], Any]] = {}
        called: list[int] = []
        passed: list[Tensor] = []

        def run(index: int, states: Tensor, call: Call) -> Any:
            called.append(index)
            block = self.skeleton.blocks[index]
            kind = type(block.module)
            if kind not in wrappers:
                with loaded(self.skeleton, block, self.skeleton.read(block)):
                    if self._predicting and states.shape[-2] > 1:
                        apart = partial(self.replay, block, call.with_copies())
                        if sees_later_tokens(block, states, apart):
                            raise bidirectional(self.skeleton.model, block)
                    wrappers[kind] = _wrapper(call.of(block.module, states), block)
            previous = passed.pop() if passed else states
            in_order = called == list(range(index + 1))
            if in_order and states is not previous and not torch.equal(states, previous):
                raise ModelStructureError(
                    f"{self.skeleton.path}: the model changes the hidden states between block {index - 1} and block "
                    f"{index}, outside of any block. Such a model cannot be streamed block by block."
                )
            passed.append(states)
            return wrappers[kind](states)

        model = self.skeleton.model
        try:
            with _stubbed(self.skeleton, run), _up_to_the_head(model):
                forward(model, shortest(model, self.batches[0]).to(self.device))
        except (SecateurError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the model's own code raises, which runs here for the first time
            raise ModelStructureError(
                f"{type(model).__name__}: its own forward fails on a short sample ({reason(error)}). Does its "
                "config.json belong to the weights, and its code to this version of transformers?"
            ) from error
        if called != list(range(len(self.skeleton.blocks))):
            order = ", ".join(map(str, called[:8])) + (", ..." if len(called) > 8 else "")
            raise ModelStructureError(
                f"{self.skeleton.path}: a forward calls the blocks in the order {order}, expected each of the "
                f"{len(self.skeleton.blocks)} once, in order. Such a model cannot be streamed block by block."
            )
        return wrappers

    def _interned(self, value: Any, seen: dict[int, tuple[Tensor, Tensor]]) -> Any:
        """The same value, with tensors that equal those of an earlier batch or block replaced by those.

        Memory: masks and position embeddings are the same for every batch; this keeps one copy of each. Objects
        that blocks may write to (a dictionary of shared keys and values) stay the same object for all blocks.
        """
        if isinstance(value, Tensor):
            if id(value) not in seen:
                known = self._intern.setdefault((value.shape, value.dtype), [])
                match = next((other for other in known if torch.equal(other, value)), None)
                if match is None:
                    match = value
                    if len(known) < 8:
                        known.append(value)
                seen[id(value)] = (value, match)
            return seen[id(value)][1]
        if type(value) in (tuple, list):
            return type(value)(self._interned(item, seen) for item in value)
        if type(value) is dict and all(isinstance(item, Tensor | tuple) for item in value.values()) and value:
            return {key: self._interned(item, seen) for key, item in value.items()}
        return value

    def run(self, block: Block, batch: int, *, states: Tensor | None = None, aside: bool = False) -> Tensor:
        """The hidden states that a loaded block makes of a batch; what goes into it stays as it is.

        `states` are other inputs than those of the batch. With `aside`, what the block leaves for later blocks (shared
        keys and values) is forgotten.
        """
        call = self.call(block, batch)
        call = call.with_copies() if aside else call
        return self.replay(block, call, self.states.get(batch, self.device) if states is None else states)

    def call(self, block: Block, batch: int) -> Call:
        """How the model called a block for a batch."""
        return self._calls[batch][block.index]

    @staticmethod
    def replay(block: Block, call: Call, states: Tensor) -> Tensor:
        """The hidden states that a loaded block makes of others, called in the given way."""
        output = call.of(block.module, states)
        return output if isinstance(output, Tensor) else output[0]

    def release(self, block: Block) -> None:
        """Forget how a block was called; it will not run again."""
        for calls in self._calls:
            calls[block.index] = Call((), {}, None)

    def chunk(self, batch: int) -> int:
        """How many tokens of each sample of a batch the head may see at once: `LOGITS_BYTES` of logits, 16 at least."""
        return max(16, LOGITS_BYTES // (4 * len(self.batches[batch]) * self.skeleton.vocabulary_size))

    @torch.no_grad()
    def logits(self, batch: int, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(next tokens, logits) of a batch after the last block, `chunk` positions at a time, by the model's own head.

        Next tokens are (samples, tokens); logits are (samples, tokens, vocabulary) for them: none for the last token.
        """
        for states, ids, targets in self._parts(batch, chunk):
            yield targets, self._logits(states, ids)[:, : targets.shape[1]]

    def losses(self, batch: int) -> Iterator[Tensor]:
        """The cross-entropy of each next token of a batch, in nats: float32 (samples, tokens), a few at a time."""
        for targets, logits in self.logits(batch, min(512, self.chunk(batch))):
            # Paper: the published code takes the loss in the logits' dtype, which newer transformers leave in half.
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
            yield loss.view(targets.shape)

    def window_losses(self, batch: int) -> Tensor:
        """The mean cross-entropy of each window of a batch, in nats: float64, on the CPU."""
        ids = self.batches[batch]
        total = torch.zeros(len(ids), dtype=torch.float64, device=self.device)
        for part in self.losses(batch):
            total += part.double().sum(dim=1)
        return (total / (ids.shape[1] - 1)).cpu()

    @torch.enable_grad()
    def head(self, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(hidden states, next tokens, logits) of a batch, a few at a time; the logits' graph leads to these states."""
        for part, ids, targets in self._parts(batch, self.chunk(batch)):
            states = part.detach().requires_grad_()
            yield states, targets, self._logits(states, ids)[:, : targets.shape[1]]

    def _parts(self, batch: int, chunk: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(hidden states, their tokens, the next tokens), of which the last part has one less."""
        # Memory: logits of a whole batch can be larger than the model; what follows the blocks is per token.
        ids = self.batches[batch].to(self.device)
        for number, states in enumerate(torch.split(self.states.get(batch, self.device), chunk, dim=-2)):
            first, last = number * chunk, (number + 1) * chunk
            yield states, ids[:, first:last], ids[:, first + 1 : last + 1]

    def _logits(self, states: Tensor, ids: Tensor) -> Tensor:
        last = len(self.skeleton.blocks) - 1

        def run(index: int, passed: Tensor, call: Call) -> Any:
            return self._structures[type(self.skeleton.blocks[index].module)](states if index == last else passed)

        with _stubbed(self.skeleton, run):
            logits: Tensor = forward(self.skeleton.model, ids).logits
        return logits

    @torch.no_grad()
    def last_hidden_states(self, batch: int) -> Tensor:
        """The hidden states of a batch that the model returns as the last, after the last block and a final norm."""
        model: Any = self.skeleton.model
        found: list[Tensor] = []

        def run(index: int, passed: Tensor, call: Call) -> Any:
            own = self.states.get(batch, self.device) if index == len(self.skeleton.blocks) - 1 else passed
            return self._structures[type(self.skeleton.blocks[index].module)](own)

        def keep(module: nn.Module, args: object, output: Any) -> None:
            found.append(output[0])
            raise _Finished

        # What transformers calls the base model is the one without a head.
        hook = getattr(model, "base_model", model).register_forward_hook(keep)
        try:
            with _stubbed(self.skeleton, run), contextlib.suppress(_Finished):
                forward(model, self.batches[batch].to(self.device))
        finally:
            hook.remove()
        return found[0]

    def close(self) -> None:
        """Drop the hidden states and their files."""
        self.states.close()


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
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


def _wrapper(output: Any, block: Block) -> Callable[[Tensor], Any]:
    if isinstance(output, Tensor):
        return lambda states: states
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        kind, rest = type(output), tuple(None if isinstance(item, Tensor) else item for item in output[1:])
        return lambda states: kind((states, *rest))
    raise ModelStructureError(f"{block.path}: returns {type(output).__name__}, expected hidden states or a tuple.")


@contextlib.contextmanager
def _up_to_the_head(model: nn.Module) -> Iterator[None]:
    """A forward inside ends before the head, where that is a module whose weights are not loaded."""

    def finish(*call: object) -> None:
        raise _Finished

    head = embeddings_of(model, "get_output_embeddings")
    with contextlib.ExitStack() as stack:
        if head is not None and any(parameter.is_meta for parameter in head.parameters(recurse=False)):
            stack.callback(head.register_forward_pre_hook(finish).remove)
            stack.enter_context(contextlib.suppress(_Finished))
        yield


@contextlib.contextmanager
def _stubbed(skeleton: Skeleton, run: Run) -> Iterator[None]:
    """The model with every block replaced by a stub that calls `run`."""
    stack = skeleton.model.get_submodule(skeleton.path)
    try:
        for block in skeleton.blocks:
            stack._modules[str(block.index)] = _Stub(block.module, partial(run, block.index))
        yield
    finally:
        for block in skeleton.blocks:
            stack._modules[str(block.index)] = block.module
