"""Tensors whose entries were written in another order: how that is recorded, done and undone."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from secateur.errors import CheckpointError


class OrderEntry(TypedDict):
    """The order of one matrix or vector of a tensor, as the manifest has it: names of `ReorderedEntry.orders`."""

    index: int | None
    transposed: bool
    rows: NotRequired[str]
    columns: NotRequired[str]


class ReorderedEntry(TypedDict):
    """What the manifest says of reordered tensors. Orders that are the same are there once, by a digest."""

    orders: dict[str, str]
    tensors: dict[str, list[OrderEntry]]


@dataclass(frozen=True)
class Order:
    """Which row and column of the source stands where, in the (out, in) view of a tensor or of one slice of it.

    A vector has rows alone.
    """

    index: int | None = None
    transposed: bool = False
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def inverse(self) -> "Order":
        """The order that undoes it."""
        rows, columns = (None if own is None else own.argsort() for own in (self.rows, self.columns))
        return Order(self.index, self.transposed, rows, columns)

    def view(self, tensor: Tensor) -> Tensor:
        """What it orders of a tensor."""
        view = tensor if self.index is None else tensor[self.index]
        return view.t() if self.transposed else view

    def of(self, view: Tensor) -> Tensor:
        """The view in this order."""
        view = view if self.rows is None else view[self.rows.to(view.device)]
        return view if self.columns is None else view[:, self.columns.to(view.device)]


def reordered(tensor: Tensor, orders: Sequence[Order]) -> Tensor:
    """A copy of a tensor in other orders."""
    made = tensor.clone()
    for order in orders:
        order.view(made).copy_(order.of(order.view(made)))
    return made


def restored(tensor: Tensor, orders: Sequence[Order]) -> Tensor:
    """A copy of the tensor that was reordered, as it was before."""
    return reordered(tensor, [order.inverse for order in reversed(orders)])


def orders_to_json(orders: Mapping[str, Sequence[Order]]) -> ReorderedEntry:
    """The record of reordered tensors."""
    kept: dict[str, str] = {}

    def keep(order: Tensor) -> str:
        text = base64.b64encode(order.numpy().astype("<u2" if len(order) <= 1 << 16 else "<u4").tobytes()).decode()
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        kept[key] = text
        return key

    tensors: dict[str, list[OrderEntry]] = {}
    for name, own in orders.items():
        for order in own:
            entry: OrderEntry = {"index": order.index, "transposed": order.transposed}
            if order.rows is not None:
                entry["rows"] = keep(order.rows)
            if order.columns is not None:
                entry["columns"] = keep(order.columns)
            tensors.setdefault(name, []).append(entry)
    return {"orders": kept, "tensors": tensors}


def orders_of(record: Mapping[str, Any] | None, name: str, shape: Sequence[int]) -> list[Order]:
    """The orders of a tensor of this shape from their record; none where it was not reordered.

    Raises `CheckpointError` for what is no order of its rows and columns.
    """
    found = []
    for entry in () if record is None else record["tensors"].get(name, ()):
        index, transposed = entry["index"], entry["transposed"]
        own = list(shape) if index is None else list(shape[1:])
        if len(own) not in (1, 2) or (index is not None and not 0 <= index < shape[0]):
            raise CheckpointError(f"{name}: the record of its order does not fit a tensor of shape {list(shape)}")
        own = own[::-1] if transposed else own
        sides = {side: _decoded(record, name, entry, side, own) for side in ("rows", "columns")}
        found.append(Order(index, transposed, **sides))
    return found


def _decoded(
    record: Mapping[str, Any] | None, name: str, entry: Mapping[str, Any], side: str, shape: Sequence[int]
) -> Tensor | None:
    if side not in entry:
        return None
    place = 0 if side == "rows" else 1
    if place >= len(shape):
        raise CheckpointError(f"{name}: the record of its order names {side}, and it is a vector")
    length = shape[place]
    assert record is not None
    try:
        data = base64.b64decode(record["orders"][entry[side]], validate=True)
    except (KeyError, ValueError):
        raise CheckpointError(f"{name}: the order {entry[side]} of its {side} is not in the record") from None
    dtype = np.dtype("<u2" if length <= 1 << 16 else "<u4")
    order = torch.from_numpy(np.frombuffer(data, dtype).astype(np.int64)) if len(data) % dtype.itemsize == 0 else None
    if order is None or not torch.equal(order.sort().values, torch.arange(length)):
        raise CheckpointError(f"{name}: the recorded order of its {length} {side} does not name each of them once")
    return order


def merged(records: Sequence[ReorderedEntry]) -> ReorderedEntry:
    """One record of several."""
    whole: ReorderedEntry = {"orders": {}, "tensors": {}}
    for own in records:
        whole["orders"] |= own["orders"]
        whole["tensors"] |= own["tensors"]
    return whole
