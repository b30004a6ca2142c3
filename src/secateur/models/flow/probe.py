"""What one forward on a short sample shows of a model: in which order it calls its blocks, and what they hand back."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batch import Batch, Named
from secateur.errors import ModelStructureError, SecateurError
from secateur.models.flow.calls import Call, Finished, Structure, replay, stubbed
from secateur.models.flow.inputs import PIXELS, forward, named, shortest
from secateur.models.opening.configuration import reason
from secateur.models.shape.causality import bidirectional, sees_later_tokens
from secateur.models.shape.skeleton import Skeleton, loaded
from secateur.models.shape.structure import Block, embeddings_of


class Probe:
    """A forward on two tokens or one image, in which one block of each class and stack runs, of maps one of each shape.

    It goes to its end, or to a head that is not loaded. `carriers` are the numbers of blocks, each the first of its
    stack, that make something beside hidden states for all blocks after them, such as T5's position biases. Raises
    `ModelStructureError` unless every block is called exactly once, in order, on what the one before made, and for
    blocks that let a token see later ones, where the model is to be `predicting`.
    """

    def __init__(self, skeleton: Skeleton, batch: Batch, *, predicting: bool) -> None:
        self._skeleton = skeleton
        self._predicting = predicting
        self._structures: dict[tuple[int, type[nn.Module]], Structure] = {}
        self._seen: set[tuple[Any, ...]] = set()  # class and shapes of what blocks have run
        self.carriers: set[int] = set()
        self._called: list[int] = []
        self._passed: list[Tensor] = []
        self._first: tuple[Block, Call, Tensor, Structure] | None = None  # of the stack at hand
        images = batch.inputs.get(PIXELS) if isinstance(batch, Named) else batch
        self._of_images = images is not None and images.ndim == 4
        self._run(shortest(skeleton.model, batch).to(skeleton.device))

    def structure(self, block: Block) -> Structure:
        """How a block hands its hidden states back."""
        return self._structures[self._kind(block)]

    def _kind(self, block: Block) -> tuple[int, type[nn.Module]]:
        return self._skeleton.stack_of(block), type(block.module)

    def _run(self, sample: Batch) -> None:
        model = self._skeleton.model
        try:
            with stubbed(self._skeleton, self._reached), _up_to_the_head(model):
                forward(model, named(model, sample))
        except (SecateurError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the model's own code raises, which runs here for the first time
            raise ModelStructureError(
                f"{type(model).__name__}: its own forward fails on a short sample ({reason(error)}). Does its "
                "config.json belong to the weights, and its code to this version of transformers?"
            ) from error
        finally:
            self._first = None  # Memory: what blocks were called with
            self._passed.clear()
        if self._called != list(range(len(self._skeleton.blocks))):
            order = ", ".join(map(str, self._called[:8])) + (", ..." if len(self._called) > 8 else "")
            raise ModelStructureError(
                f"{', '.join(stack.path for stack in self._skeleton.stacks)}: a forward calls the blocks in the order "
                f"{order}, expected each of the {len(self._skeleton.blocks)} once, in order. Such a model cannot be "
                "streamed block by block."
            )

    def _reached(self, index: int, states: Tensor, call: Call) -> Any:
        self._called.append(index)
        block = self._skeleton.blocks[index]
        stack = self._skeleton.stacks[self._skeleton.stack_of(block)]
        if block is not stack.blocks[0]:
            self._check_unchanged(stack.path, index, states)
            self._check_carried(block, states, call)
        is_map = self._of_images and states.ndim == 4  # of channels: each block can make another number of them
        alike = (self._kind(block), *(tuple(parameter.shape) for parameter in block.module.parameters()))
        if self._kind(block) not in self._structures or (is_map and alike not in self._seen):
            self._seen.add(alike)
            made, whole = self._returned(block, states, call)
            self._structures.setdefault(self._kind(block), whole.without_tensors())
            if block is stack.blocks[0]:
                self._first = block, call, states, whole
            if block is stack.blocks[0] or is_map:
                states = made  # whose width can be another
        self._passed = [states]
        first = self._first
        same = first is not None and self._kind(first[0]) == self._kind(block)
        return (first[3] if first is not None and same else self.structure(block)).filled(states)

    def _returned(self, block: Block, states: Tensor, call: Call) -> tuple[Tensor, Structure]:
        with loaded(self._skeleton, block, self._skeleton.read(block)):
            last = self._skeleton.stack_of(block) == len(self._skeleton.stacks) - 1
            if self._predicting and last and states.shape[-2] > 1:
                apart = call.with_copies()
                if sees_later_tokens(block, states, partial(replay, block, apart)):
                    raise bidirectional(self._skeleton.model, block)
            output = call.of(block.module, states)
            return output if isinstance(output, Tensor) else output[0], Structure.of(output, block)

    def _check_unchanged(self, path: str, index: int, states: Tensor) -> None:
        previous = self._passed[0] if self._passed else states
        in_order = self._called == list(range(index + 1))
        if in_order and states is not previous and not torch.equal(states, previous):
            raise ModelStructureError(
                f"{path}: the model changes the hidden states between block {index - 1} and block {index}, outside of "
                "any block. Such a model cannot be streamed block by block."
            )

    def _check_carried(self, block: Block, states: Tensor, call: Call) -> None:
        """Note whether a block is given something that the first of its stack made beside its hidden states.

        Raises `ModelStructureError` unless that is the same for all hidden states, and handed on as it is.
        """
        if self._first is None or self._first[0].index in self.carriers:
            return
        first, first_call, first_states, made = self._first
        given = [number for number, item in enumerate(made.rest) if isinstance(item, Tensor) and call.given(item)]
        if not given:
            return
        for own, own_call, own_states in ((first, first_call, torch.zeros_like(first_states)), (block, call, states)):
            with loaded(self._skeleton, own, self._skeleton.read(own)):
                again = Structure.of(own_call.with_copies().of(own.module, own_states), own)
            if not all(torch.equal(again.rest[number], made.rest[number]) for number in given):
                raise ModelStructureError(
                    f"{own.path}: makes something of its hidden states that the blocks after it read beside them. Such "
                    "a model cannot be streamed block by block."
                )
        self.carriers.add(first.index)


@contextlib.contextmanager
def _up_to_the_head(model: nn.Module) -> Iterator[None]:
    """A forward inside ends before the head, where that is a module whose weights are not loaded."""

    def finish(*call: object) -> None:
        raise Finished

    head = embeddings_of(model, "get_output_embeddings")
    with contextlib.ExitStack() as stack:
        if head is not None and any(parameter.is_meta for parameter in head.parameters(recurse=False)):
            stack.callback(head.register_forward_pre_hook(finish).remove)
            stack.enter_context(contextlib.suppress(Finished))
        yield
