"""Channels in another order: found for the N:M patterns of a block, shown to change nothing, carried out at its end.

While a block is pruned its module keeps the order that it came with; matrices are solved in their new order, and what
is written is put into it at the end. Rows of what makes the channels may move after pruning as well as before.
"""

import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.core.patterns import NM, Pattern
from secateur.core.permutation import best_order, kept_share
from secateur.models.flow.channels import Channels, biases_of, channels
from secateur.models.flow.stream import Stream
from secateur.models.flow.tap import Inputs, Product, ProductTap, by_expert
from secateur.models.shape.matrices import Matrix, by_block, tapped
from secateur.models.shape.skeleton import Skeleton
from secateur.models.shape.structure import Block
from secateur.record.reordered import Order, ReorderedEntry, orders_to_json, reordered

TRIAL_TOKENS = 32  # that show whether an order changes anything

Orders = dict[str, list[Order]]
"""By checkpoint tensor."""


class _Inputs(ProductTap):
    """Keeps copies of what the given parameters multiply in one forward."""

    def __init__(self, parameters: Mapping[str, tuple[Tensor, bool]]) -> None:
        super().__init__(parameters)
        self.found: Inputs = {}

    def before(self, product: Product) -> None:
        for key, rows in by_expert(product):
            self.found.setdefault(key, []).append(rows.clone())


class Reordering:
    """The orders of one run, block by block.

    A few tokens go through the dense model beside the run, whichever calibration data it has.
    """

    def __init__(self, skeleton: Skeleton, plan: Mapping[str, Pattern]) -> None:
        """The tensors outside the blocks must be loaded."""
        self.skeleton, self.plan = skeleton, plan
        length = min(TRIAL_TOKENS, skeleton.positions or TRIAL_TOKENS)
        ids = (torch.arange(length) * 7 + 3).unsqueeze(0) % skeleton.vocabulary_size
        self.stream = Stream(skeleton, [ids])
        self._all = by_block(skeleton.matrices)
        self._known: dict[Any, dict[str, Channels]] = {}
        self._channels: dict[str, Channels] = {}
        self._by_matrix: dict[str, Orders] = {}  # of the tensors that a matrix's order concerns
        self.orders: dict[str, Tensor] = {}  # of the inputs of matrices of the block
        self.gains: dict[str, dict[str, float]] = {}
        self.refused: dict[str, str] = {}

    def reach(self, block: Block) -> None:
        """Get the trial ready for a block."""
        self.stream.reach(block)

    def enter(self, block: Block) -> None:
        """Get to know a loaded block while it is dense; the trial moves on to what comes after it."""
        self.orders, self.gains, self.refused, self._by_matrix = {}, {}, {}, {}
        own = self._all.get(block.index, [])
        self._channels = self._found(block, own) if any(self._wanted(matrix) for matrix in own) else {}
        self._states = self.stream.states.get(0, self.stream.device)
        self.advance(block)

    def advance(self, block: Block) -> None:
        """Let the trial go through a loaded block while it is dense."""
        self.stream.states.put(0, self.stream.run(block, 0))

    def close(self) -> None:
        """Drop the trial."""
        self.stream.close()

    def _wanted(self, matrix: Matrix) -> bool:
        return isinstance(self.plan.get(matrix.name), NM) and matrix.columns is None and matrix.rows is None

    def _found(self, block: Block, matrices: Sequence[Matrix]) -> dict[str, Channels]:
        """The channels of a block by site. Blocks that are built alike are looked at once."""
        shapes = tuple((name, tuple(value.shape)) for name, value in block.module.named_parameters())
        key = (type(block.module), shapes, tuple(_inside(block, matrix) for matrix in matrices))
        if key not in self._known:
            self._known[key] = channels(block, matrices, self.stream)
        return self._known[key]

    def choose(
        self,
        block: Block,
        matrices: Sequence[Matrix],
        tensors: Mapping[str, Tensor],
        score: Callable[[Matrix], Tensor | None],
    ) -> dict[str, Any]:
        """Find orders for some matrices of the loaded block, whose tensors these are, and try them out.

        Returns what `take` takes. A matrix without a `score` stays as it is.
        """
        made: dict[str, Orders] = {}
        found: dict[str, tuple[Tensor, dict[str, float]]] = {}
        refused: dict[str, str] = {}
        for matrix in matrices:
            own = self._channels.get(_inside(block, matrix))
            scores = score(matrix) if own is not None and self._wanted(matrix) else None
            if own is None or scores is None:
                continue
            pattern = self.plan[matrix.name]
            assert isinstance(pattern, NM)
            order = best_order(scores, pattern, own.orbits)
            if torch.equal(order, torch.arange(len(order))):
                continue
            absorbed = self._absorbed(block, matrix, own, order)
            if absorbed is None:
                refused[matrix.name] = "what makes its inputs is not stored so that it could take their order"
                continue
            before, after = (kept_share(part, pattern) for part in (scores, scores[:, order.to(scores.device)]))
            made[matrix.name] = absorbed
            found[matrix.name] = order, {"before": before, "after": after}
        changes = self._change(block, made, found, tensors) if made else None
        if changes is not None and len(made) > 1:  # which of them?
            for site in {matrix.site for matrix in matrices if matrix.name in made}:
                names = [matrix.name for matrix in matrices if matrix.site == site and matrix.name in made]
                why = self._change(block, {name: made[name] for name in names}, found, tensors)
                refused |= {} if why is None else dict.fromkeys(names, why)
        elif changes is not None:
            refused |= dict.fromkeys(made, changes)
        kept = [name for name in made if name not in refused]
        return {
            "orders": {name: found[name][0] for name in kept},
            "gains": {name: found[name][1] for name in kept},
            "tensors": {name: made[name] for name in kept},
            "refused": refused,
        }

    def take(self, chosen: Mapping[str, Any]) -> None:
        """Make the orders that were chosen, here or by another process, those of the block."""
        self.orders |= chosen["orders"]
        self.gains |= chosen["gains"]
        self.refused |= chosen["refused"]
        self._by_matrix |= chosen["tensors"]

    def of_tensors(self, matrices: Sequence[str]) -> Orders:
        """The orders of the block's tensors for those of these matrices that have one."""
        return _joined([self._by_matrix[name] for name in matrices if name in self._by_matrix])

    def _absorbed(self, block: Block, matrix: Matrix, own: Channels, order: Tensor) -> Orders | None:
        """The orders of all tensors that an order of a matrix's inputs takes; None where it cannot be."""
        result: Orders = {matrix.tensor: [Order(matrix.index, matrix.transposed, columns=order)]}
        _, layout = tapped(block, self._all[block.index])
        by_site: dict[str, list[Tensor]] = {}
        for maker in own.makers:
            by_site.setdefault(maker.site, []).append(maker.rows)
        for site, roles in by_site.items():
            makers = [m for m in self._all[block.index] if _inside(block, m) == site and _same_expert(m, matrix)]
            if not makers or len({m.parameter for m in makers}) != 1:
                return None
            parameter, expert = makers[0].parameter, makers[0].expert
            stored = layout[parameter]
            shape = dict(block.module.named_parameters())[parameter.removeprefix(f"{block.path}.")].shape
            rows = torch.arange(shape[-1] if stored else shape[-2])
            for role in roles:
                rows[role] = role[order]
            for made in makers:
                moved = _within(rows, made.rows)
                if moved is None:
                    return None
                result.setdefault(made.tensor, []).append(Order(made.index, made.transposed, rows=moved))
            for vector in biases_of(block, parameter, stored):
                moved_vector = self._vector_orders(vector, rows, expert)
                if moved_vector is None:
                    return None
                result |= moved_vector
        return result

    def _vector_orders(self, parameter: str, rows: Tensor, expert: int | None) -> Orders | None:
        """The orders of the tensors that make a vector, or one expert's row of several."""
        conversion = self.skeleton.conversion
        groups = conversion.making([parameter])
        if not groups:
            return None
        (group,) = groups
        tags, start = {}, 0
        for name in group.names:
            shape = self.skeleton.source.shape(name)
            size = int(torch.Size(shape).numel())
            tags[name] = torch.arange(start, start + size).view(shape)
            start += size
        before = conversion.convert(group, tags)[parameter]
        after = before.clone()
        part = after if expert is None else after[expert]
        part.copy_(part[rows])
        source = torch.arange(start)
        source[before.flatten()] = after.flatten()
        result: Orders = {}
        for name, own in tags.items():
            moved = source[own.flatten()].view(own.shape)
            if torch.equal(moved, own):
                continue
            lines = moved.view(-1, own.shape[-1]) - own.view(-1, own.shape[-1])[:, :1]
            if own.dim() > 2 or int(lines.min()) < 0 or int(lines.max()) >= own.shape[-1]:
                return None
            result[name] = [
                Order(None if own.dim() == 1 else index, rows=line)
                for index, line in enumerate(lines)
                if not torch.equal(line, torch.arange(len(line)))
            ]
        return result

    def _change(
        self,
        block: Block,
        made: Mapping[str, Orders],
        found: Mapping[str, tuple[Tensor, dict[str, float]]],
        tensors: Mapping[str, Tensor],
    ) -> str | None:
        """What some orders would change, in words; None where the block stays the same function."""
        orders = _joined(list(made.values()))
        outside = set(orders) - set(self.skeleton.block_tensors[block.index])
        if outside:
            return f"{min(outside)} belongs to other blocks too"
        names = [name for group in self.skeleton.conversion.of(orders) for name in group.names]
        given = {name: tensors[name].clone() for name in names}  # Exact: they may be the module's own parameters.
        order_of = {
            (matrix.parameter, matrix.expert): found[matrix.name][0]
            for matrix in self._all[block.index]
            if matrix.name in made
        }
        dense, left, output = self._run(block)
        try:
            self.skeleton.update(
                {name: reordered(own, orders[name]) if name in orders else own for name, own in given.items()}
            )
            other, other_left, other_output = self._run(block)
        finally:
            self.skeleton.update(given)
        for key, inputs in dense.items():
            order = order_of.get(key)
            for x, y in zip(inputs, other.get(key, ()), strict=False):
                if y.shape != x.shape or _differ(x if order is None else x[:, order.to(x.device)], y):
                    return f"the inputs of {key[0]} would not be the same numbers"
        if len(left) != len(other_left) or any(_differ(x, y) for x, y in zip(left, other_left, strict=True)):
            return "what the block leaves for later blocks would not be the same"
        return "the output of the block would not be the same" if _differ(output, other_output) else None

    def _run(self, block: Block) -> tuple[Inputs, list[Tensor], Tensor]:
        """What the matrices of the block multiply, what it leaves for later blocks, and its output, for the trial."""
        tap = _Inputs(tapped(block, self._all[block.index])[0])
        call = self.stream.call(block, 0).with_copies()
        with tap:
            output = self.stream.replay(block, call, self._states)
        left = [tensor for value in (*call.args, *call.kwargs.values()) for tensor in _left(value)]
        return tap.found, left, output


def _left(value: Any) -> list[Tensor]:
    """The tensors in a mapping that blocks leave something in."""
    if isinstance(value, Tensor):
        return [value.clone()]
    if isinstance(value, MutableMapping):
        return [tensor for own in value.values() for tensor in _left(own)]
    return [tensor for own in value for tensor in _left(own)] if isinstance(value, tuple | list) else []


def _differ(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors differ by more than the rounding of sums in another order."""
    if x.shape != y.shape:
        return True
    if not x.is_floating_point():
        return not torch.equal(x, y)
    # Exact: half precision rounds sums that are taken in float32, so that most entries are the same to the last bit.
    wide = torch.finfo(torch.float32).eps if x.dtype != torch.float64 else torch.finfo(x.dtype).eps
    near = max(64 * wide, torch.finfo(x.dtype).eps / 2 if x.dtype.itemsize < 4 else 0)
    x, y = x.double(), y.double()
    return bool((x - y).abs().mean() > near * x.abs().mean())


def _inside(block: Block, matrix: Matrix) -> str:
    """The site of a matrix, by its path inside of the block."""
    return matrix.site.removeprefix(f"{block.path}.")


def _same_expert(one: Matrix, other: Matrix) -> bool:
    """Whether two matrices belong to one expert of a mixture, or to none."""
    return one.expert == other.expert and _numbers(one.parameter) == _numbers(other.parameter)


def _numbers(name: str) -> list[str]:
    return re.findall(r"experts?\.(\d+)\.", name)


def _within(rows: Tensor, own: Tensor | None) -> Tensor | None:
    """The order of the rows of a matrix that lie at `own` in a parameter; None where some would leave it."""
    if own is None:
        return rows
    own = own.cpu()
    place = torch.full((len(rows),), -1)
    place[own] = torch.arange(len(own))
    moved = place[rows[own]]
    return None if bool((moved < 0).any()) else moved


def _joined(orders: Sequence[Orders]) -> Orders:
    """The orders of all. A tensor that several reorder holds matrices of its own for each, or rows and columns."""
    result: Orders = {}
    for own in orders:
        for name, parts in own.items():
            result.setdefault(name, []).extend(parts)
    return {name: [part for part in parts if not _nothing(part)] for name, parts in result.items()}


def _nothing(order: Order) -> bool:
    return all(own is None or torch.equal(own, torch.arange(len(own))) for own in (order.rows, order.columns))


def record_of(orders: Orders) -> ReorderedEntry:
    """What the manifest says of a block's orders."""
    return orders_to_json({name: parts for name, parts in orders.items() if parts})
