"""Gradient statistics of every matrix in the memory of one block: a forward, and then a backward block by block.

The forward saves what goes into each block. The model's own head yields the gradient of the loss with respect to the
last hidden states. The backward then runs each block once more with autograd on, takes the gradient of each weight
from its input and the gradient of its output, and passes the gradient of its input on to the block before. Parameters
never require a gradient and never get one.

The work is that of four forwards: two of them, one for the gradients of states and one for those of weights.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.core.choices import Granularity, Norm
from secateur.core.gradients import GradientSums, Region
from secateur.core.gram import float32_products, full_precision
from secateur.errors import ModelStructureError, NumericalError
from secateur.models.flow.calls import Call
from secateur.models.flow.inputs import predicting
from secateur.models.flow.stream import HiddenStates, Stream
from secateur.models.flow.tap import BackwardTap, Product
from secateur.models.shape.structure import Block, Stack

HALF_TARGET = 16.0  # what the largest gradient of a batch is scaled to where the computing dtype is float16


class GradientTap(BackwardTap):
    """Adds up the norms of the gradients of parameters over samples, from the products that they take part in."""

    def __init__(
        self,
        parameters: Mapping[str, tuple[Tensor, bool]],  # name -> (parameter, stored (in, out))
        norms: Collection[Norm],
        granularity: Granularity = "sample",
    ) -> None:
        super().__init__(parameters)
        self._norms = sorted(norms, reverse=True)  # l1 overwrites the gradient with its absolute value, so it is last
        self._granularity = granularity
        self.sums: dict[tuple[str, Norm], GradientSums] = {
            (name, norm): GradientSums(parameter, norm)
            for name, (parameter, _) in parameters.items()
            for norm in self._norms
        }
        self._samples, self._length, self._scale = 1, 1, 1.0
        self._calls: dict[tuple[str, Region], int] = {}
        self._pending: dict[tuple[str, Region], tuple[Product, list[Tensor]]] = {}
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def totals(self) -> dict[tuple[str, Norm], Tensor]:
        """The sums by parameter and norm, laid out like the parameter, float32 (float64 for float64).

        Nothing is left of them here.
        """
        return {key: own.total() for key, own in self.sums.items()}

    def begin(self, samples: int, length: int, scale: float = 1.0) -> None:
        """Tell that the next forward and backward are over `samples` of `length` tokens, gradients times `scale`."""
        self._samples, self._length, self._scale = samples, length, scale
        self._calls.clear()

    def end(self) -> None:
        """Add what is left after a backward: weights that multiplied several times."""
        for product, parts in self._pending.values():
            self._add(product, parts)
        self._pending.clear()

    def after(self, product: Product, result: Tensor, factor: float) -> Tensor:
        """The result, whose gradient is received in the backward."""
        if not result.requires_grad:
            # Exact: a product that does not depend on the hidden states has a gradient all the same.
            result = result.detach().requires_grad_().clone()
        key = product.name, _region(product)
        self._calls[key] = self._calls.get(key, 0) + 1
        x = product.x.detach()
        result.register_hook(partial(self._receive, product, x, x._version, factor))  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def _receive(self, product: Product, x: Tensor, version: int, factor: float, gradient: Tensor) -> None:
        if x._version != version:
            raise ModelStructureError(
                f"{product.name}: its input is overwritten after the multiplication, so that its gradient cannot be "
                "taken. Skip it with --skip, or use a method without gradients."
            )
        if product.is_left:
            gradient = gradient.transpose(-1, -2)
        wide = torch.promote_types(x.dtype, torch.float32)
        x, gradient = x.to(wide), gradient.to(wide) * factor if factor != 1 else gradient.to(wide)
        if self._granularity == "token":
            with full_precision():
                self._add_tokens(product, x, gradient)
            return
        # Exact: bfloat16 and float16 numbers are TF32 numbers, and their products are added up in float32 either way.
        with float32_products(tf32=product.x.dtype.itemsize == 2):
            parts = self._by_sample(product, x, gradient)
            key = product.name, _region(product)
            if self._calls[key] == 1:
                self._add(product, (self._multiply(product, *part, reuse=True) for part in parts))
                return
            # Exact: the absolute value is that of the sum over all products with the weight.
            made = [self._multiply(product, own_x, own_gradient, reuse=False) for own_x, own_gradient in parts]
            if key not in self._pending:
                self._pending[key] = (product, made)
                return
            earlier = self._pending[key][1]
            for total, part in zip(earlier, made, strict=True):
                total += part

    def _by_sample(self, product: Product, x: Tensor, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The rows of (input, gradient of the output) that belong to each sample."""
        samples = self._samples
        if samples == 1:
            return [(x, gradient)]
        rows = math.prod(x.shape[:-1])
        by_batch = x.dim() >= 3 and x.shape[0] == samples
        flat = x.dim() == 2 and rows == samples * self._length
        if product.weight.dim() == 2 and (by_batch or flat) and gradient.shape[:-1] == x.shape[:-1]:
            x, gradient = x.reshape(samples, -1, x.shape[-1]), gradient.reshape(samples, -1, gradient.shape[-1])
            return list(zip(x, gradient, strict=True))
        raise ModelStructureError(
            f"{product.name}: multiplies an input of shape {tuple(x.shape)}, in which the {samples} samples of "
            f"{self._length} tokens cannot be told apart. Use --batch-size 1."
        )

    def _multiply(self, product: Product, x: Tensor, gradient: Tensor, *, reuse: bool) -> Tensor:
        """The gradient of the weight, laid out like the weight as it was multiplied."""
        if product.weight.dim() == 2:
            x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        left, right = (gradient, x) if product.contracted == product.weight.dim() - 1 else (x, gradient)
        if not reuse or product.weight.dim() != 2:
            return left.transpose(-1, -2) @ right
        # Memory: one buffer for each shape, not a fresh matrix for each sample.
        key = (left.shape[-1], right.shape[-1], left.dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(key[:2], dtype=left.dtype, device=left.device)
        return torch.mm(left.t(), right, out=self._buffers[key])

    def _add_tokens(self, product: Product, x: Tensor, gradient: Tensor) -> None:
        # Exact: the gradient of one token is an outer product, so that norms over tokens factor into one product.
        for norm in self._norms:
            own_x, own = (x.square(), gradient.square()) if norm == "l2" else (x.abs(), gradient.abs())
            part = self._multiply(product, own_x, own, reuse=True)
            self.sums[product.name, norm].add(_region(product), part, self._scale)

    def _add(self, product: Product, gradients: Iterable[Tensor]) -> None:
        """Add the gradients of the samples of a batch."""
        totals: dict[Norm, Tensor] = {}
        for gradient in gradients:
            for norm in self._norms:
                if norm not in totals:
                    totals[norm] = gradient.square() if norm == "l2" else gradient.abs()
                elif norm == "l2":
                    totals[norm].addcmul_(gradient, gradient)
                else:
                    totals[norm].add_(gradient.abs_())
        for norm, total in totals.items():
            # Exact: a batch is never divided between processes. Fast: its samples are added up before.
            self.sums[product.name, norm].add(_region(product), total, self._scale)


def _region(product: Product) -> Region:
    """The part of its parameter that is multiplied."""
    weight = product.weight
    offset = int(weight.storage_offset() - product.parameter.storage_offset())
    return tuple(weight.shape), weight.stride(), offset


@dataclass
class SavedInputs:
    """What is needed to run a block again: its inputs, and what earlier blocks had left for it, by batch."""

    states: HiddenStates
    shared: list[list[dict[Any, Any]]]


@dataclass
class StateGradients:
    """The gradient of the loss with respect to the hidden states between two blocks, by batch, times its scale.

    `shared` are the gradients of what blocks leave for later ones: (batch, mapping, key) -> one for each tensor.
    `given` are those of what blocks of this stack are called with and stacks before have made, by batch and tensor;
    `before` those of what the stacks before have made, (stack, batch) -> on the CPU.
    """

    states: HiddenStates
    scales: dict[int, float] = field(default_factory=dict)
    shared: dict[tuple[int, int, Any], list[Tensor | None]] = field(default_factory=dict)
    given: dict[tuple[int, int], "Given"] = field(default_factory=dict)
    before: dict[tuple[int, int], Tensor] = field(default_factory=dict)


Place = tuple[int | str, ...]
"""Where an argument stands in the call of a block."""


@dataclass
class Given:
    """A tensor that blocks were called with, where in their calls, and the gradient of the loss with respect to it."""

    tensor: Tensor
    places: list[tuple[int, Place]]
    gradient: Tensor


def forward_saving_inputs(stream: Stream, block: Block, folder: Path | None) -> SavedInputs:
    """Run all batches through a block; the stream has moved on, and what went in is kept."""
    before = stream.states
    after = HiddenStates(len(stream.batches), folder, pin=stream.device.type == "cuda")
    shared = []
    for batch in range(len(stream.batches)):
        shared.append([dict(mapping) for mapping in _mappings(stream.call(block, batch))])
        after.put(batch, stream.run(block, batch))
    stream.states = after
    return SavedInputs(before, shared)


Labels = Callable[[int, Tensor, Tensor], Tensor]
"""The tokens that are to be predicted, of the number of a batch, the text's own next tokens, and all logits."""


def next_tokens(batch: int, targets: Tensor, logits: Tensor) -> Tensor:
    """The text's own."""
    return targets


def drawn_tokens(seed: int) -> Labels:
    """Tokens that are drawn from the model's own distribution, with a generator for each batch."""
    generators: dict[int, torch.Generator] = {}

    def draw(batch: int, targets: Tensor, logits: Tensor) -> Tensor:
        if batch not in generators:
            generators[batch] = torch.Generator(logits.device).manual_seed((seed << 32) + batch)
        generator = generators[batch]
        chances = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
        return torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view_as(targets)

    return draw


def head_gradients(
    stream: Stream, folder: Path | None, progress: Callable[[str, int, int], None], labels: Labels = next_tokens
) -> StateGradients:
    """The gradient of the loss with respect to the last hidden states, through the model's own head."""
    outgoing = StateGradients(HiddenStates(len(stream.batches), folder, pin=stream.device.type == "cuda"))
    for batch, ids in enumerate(stream.batches):
        predictions = predicting(stream.skeleton.model, ids)[1].shape[1]
        # Exact: in half precision a mean over the tokens would push the logits' gradients below what float16 holds.
        scale = 256.0 * predictions if stream.skeleton.dtype == torch.float16 else 1.0
        parts = []
        for leaf, targets, logits in stream.head(batch):
            # Exact: samples are added up, not averaged, so that each one's gradient is that of its own mean loss.
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
            aim = labels(batch, targets, logits)
            loss = nn.functional.cross_entropy(wide, aim.flatten(), reduction="sum")
            (loss * (scale / predictions)).backward()  # type: ignore[no-untyped-call]
            parts.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        _put(outgoing, batch, torch.cat(parts, dim=-2), scale, "the head", stream.skeleton.dtype)
        progress("head", batch + 1, len(stream.batches))
    return outgoing


def own_loss_gradients(
    stream: Stream, folder: Path | None, progress: Callable[[str, int, int], None]
) -> StateGradients:
    """The gradient of each sample's own loss, as the model defines it, with respect to the last hidden states."""
    outgoing = StateGradients(HiddenStates(len(stream.batches), folder, pin=stream.device.type == "cuda"))
    scale = 256.0 if stream.skeleton.dtype == torch.float16 else 1.0
    for batch in range(len(stream.batches)):
        parts = []
        for leaves, loss in stream.own_losses(batch):
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            parts.append([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
        *before, last = (torch.cat(own) for own in zip(*parts, strict=True))
        outgoing.before.update({(number, batch): own.cpu() for number, own in enumerate(before)})
        _put(outgoing, batch, last, scale, "the head", stream.skeleton.dtype)
        progress("head", batch + 1, len(stream.batches))
    return outgoing


def _put(outgoing: StateGradients, batch: int, gradient: Tensor, scale: float, where: str, dtype: torch.dtype) -> None:
    """Keep the gradient of a batch, scaled by a power of two where float16 would lose its small entries."""
    if not bool(gradient.isfinite().all()):
        raise NumericalError(
            f"{where}: the gradient of the loss with respect to the hidden states is not finite. "
            + ("Compute in --dtype bfloat16 or float32." if dtype == torch.float16 else "Is the model itself sound?")
        )
    if dtype == torch.float16:
        largest = float(gradient.abs().amax())
        factor = 2.0 ** math.floor(math.log2(HALF_TARGET / largest)) if largest > 0 else 1.0
        for key, parts in outgoing.shared.items():
            if key[0] == batch:
                outgoing.shared[key] = [None if part is None else part * factor for part in parts]
        gradient, scale = gradient * factor, scale * factor
    outgoing.states.put(batch, gradient)
    outgoing.scales[batch] = scale


@torch.enable_grad()
def backward(
    stream: Stream,
    block: Block,
    batch: int,
    saved: SavedInputs,
    outgoing: StateGradients,
    tap: BackwardTap,
    made_before: Collection[Place] = (),
) -> None:
    """Take one batch back through a loaded block: from the gradient of its outputs to that of its inputs.

    Those at `made_before` in its call have been made by stacks before its own.
    """
    call, given = with_leaves(stream.call(block, batch), made_before)
    mappings = _mappings(call)
    leaves = [pytree.tree_map_only(Tensor, _leaf, kept) for kept in saved.shared[batch]]
    fresh = [_filled(mapping, kept) for mapping, kept in zip(mappings, leaves, strict=True)]
    exchanged = {id(mapping): new for mapping, new in zip(mappings, fresh, strict=True)}
    states = saved.states.get(batch, stream.device).detach().requires_grad_()
    tap.begin(len(stream.batches[batch]), states.shape[-2], outgoing.scales[batch])
    with tap:
        # Exact: a copy, since a block may write into its input.
        output = stream.replay(block, call.mapped(lambda value: exchanged.get(id(value), value)), states.clone())
    roots, gradients = [output], [outgoing.states.get(batch, stream.device)]
    for mapping, kept, now in zip(mappings, leaves, fresh, strict=True):
        for key, value in now.items():
            if key in kept and value is kept[key]:
                continue
            expected = outgoing.shared.pop((batch, id(mapping), key), [])
            for tensor, gradient in zip(_tensors(value), expected, strict=bool(expected)):
                if gradient is not None and tensor.requires_grad:
                    roots.append(tensor)
                    gradients.append(gradient)
    torch.autograd.backward(roots, gradients)
    tap.end()
    for path, (tensor, leaf) in given.items():
        if leaf.grad is None:
            continue
        own_key = (batch, id(tensor))
        if own_key not in outgoing.given:
            outgoing.given[own_key] = Given(tensor, [(block.index, path)], leaf.grad)
            continue
        outgoing.given[own_key].gradient += leaf.grad
        outgoing.given[own_key].places.append((block.index, path))
    for mapping, kept in zip(mappings, leaves, strict=True):
        for key, value in kept.items():
            own = [tensor.grad for tensor in _tensors(value)]
            if any(gradient is not None for gradient in own):
                place = (batch, id(mapping), key)
                outgoing.shared[place] = [
                    _sum(*pair) for pair in zip(own, outgoing.shared.get(place, [None] * len(own)), strict=True)
                ]
    if states.grad is None:
        raise ModelStructureError(f"{block.path}: its output does not depend on its input.")
    _put(outgoing, batch, states.grad, outgoing.scales[batch], block.path, stream.skeleton.dtype)


def with_leaves(call: Call, paths: Collection[Place]) -> tuple[Call, dict[Place, tuple[Tensor, Tensor]]]:
    """A call with leaves of a graph in the places of some tensors, and by place the tensor and the leaf."""
    found: dict[Place, tuple[Tensor, Tensor]] = {}

    def exchanged(value: Any, path: Place) -> Any:
        if isinstance(value, Tensor) and path in paths:
            found[path] = value, value.detach().requires_grad_()
            return found[path][1]
        if type(value) in (tuple, list):
            return type(value)(exchanged(item, (*path, number)) for number, item in enumerate(value))
        return value

    args = tuple(exchanged(value, (number,)) for number, value in enumerate(call.args))
    return Call(args, {name: exchanged(value, (name,)) for name, value in call.kwargs.items()}, call.keyword), found


def tensors_of(call: Call) -> dict[Place, Tensor]:
    """The tensors that a block is called with beside its hidden states, by where they stand."""

    def walk(value: Any, path: Place) -> Iterator[tuple[Place, Tensor]]:
        if isinstance(value, Tensor):
            yield path, value
        elif type(value) in (tuple, list):
            for number, item in enumerate(value):
                yield from walk(item, (*path, number))

    arguments: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    return dict(found for name, value in arguments for found in walk(value, (name,)))


def places_of_made(stream: Stream, stack: Stack) -> dict[int, set[Place]]:
    """Where in the calls of the blocks of a stack stands what depends on the stacks before it."""
    _, _, calls = stream.between(stack, 0)
    return {
        index: {path for path, tensor in tensors_of(call).items() if tensor.requires_grad}
        for index, call in calls.items()
    }


def to_the_stack_before(stream: Stream, stack: Stack, outgoing: StateGradients) -> None:
    """From the gradients of what goes into a stack to those of what the stack before it has made."""
    number = stream.skeleton.stacks.index(stack)
    for batch in range(len(stream.batches)):
        leaves, entering, calls = stream.between(stack, batch)
        live = {index: tensors_of(call) for index, call in calls.items()}
        roots, gradients = [], []
        if entering.requires_grad:
            roots, gradients = [entering], [outgoing.states.get(batch, stream.device)]
        for key in [key for key in outgoing.given if key[0] == batch]:
            own = outgoing.given.pop(key)
            tensors = {id(tensor): tensor for tensor in (live[index][path] for index, path in own.places)}
            if len(tensors) > 1:  # which only looked like one
                raise ModelStructureError(
                    f"{stack.path}: its blocks are called with several things that stacks before it have made and that "
                    "are equal, so that their gradients cannot be told apart. Use a method without gradients."
                )
            roots += tensors.values()
            gradients.append(own.gradient)
        if roots:
            torch.autograd.backward(roots, gradients)
        for earlier, leaf in enumerate(leaves):
            if leaf.grad is not None:
                gradient = leaf.grad.cpu()
                held = outgoing.before.get((earlier, batch))
                outgoing.before[earlier, batch] = gradient if held is None else held + gradient
        ending = outgoing.before.pop((number - 1, batch), None)
        ending = torch.zeros_like(leaves[number - 1]) if ending is None else ending.to(stream.device)
        where = stream.skeleton.stacks[number - 1].path
        _put(outgoing, batch, ending, outgoing.scales[batch], where, stream.skeleton.dtype)


@torch.enable_grad()
def regional_gradient(stream: Stream, block: Block, batch: int, tap: BackwardTap | None) -> Tensor:
    """The output of a loaded block for a batch, while `tap` takes gradients of its Euclidean norm for each sample.

    Nothing flows back into the block before: that is what makes the gradient regional. Without a tap it is a forward.
    """
    if tap is None:
        with torch.no_grad():
            return stream.run(block, batch)
    samples = len(stream.batches[batch])
    states = stream.states.get(batch, stream.device).detach().requires_grad_()
    scale = 256.0 if stream.skeleton.dtype == torch.float16 else 1.0
    if states.ndim < 3 or states.shape[-3] != samples:
        raise ModelStructureError(
            f"{block.path}: reads hidden states of shape {tuple(states.shape)}, expected ({samples} samples, tokens, "
            "width), so that the gradients of samples cannot be told apart. Use a method without gradients."
        )
    tap.begin(samples, states.shape[-2], scale)
    with tap:
        output = stream.run(block, batch, states=states.clone())
    # The last three dimensions are (samples, tokens, hidden); some models have more before them.
    by_sample = output.to(torch.promote_types(output.dtype, torch.float32)).movedim(-3, 0).flatten(1)
    (by_sample.norm(dim=1).sum() * scale).backward()
    tap.end()
    for mapping in _mappings(stream.call(block, batch)):
        for key, value in mapping.items():
            mapping[key] = pytree.tree_map_only(Tensor, Tensor.detach, value)
    return output.detach()


def _mappings(call: Call) -> list[MutableMapping[Any, Any]]:
    """What a block may leave something in for later blocks: the mappings among its arguments."""
    return [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, MutableMapping)]


def _filled(mapping: MutableMapping[Any, Any], content: Mapping[Any, Any]) -> MutableMapping[Any, Any]:
    fresh = copy(mapping)
    fresh.clear()
    fresh.update(content)
    return fresh


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_() if value.is_floating_point() else value


def _tensors(value: Any) -> list[Tensor]:
    return [item for item in pytree.tree_leaves(value) if isinstance(item, Tensor)]


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right
