"""How the tensors of a checkpoint become the parameters of the module, and which matrix ends up where.

transformers renames, fuses and splits tensors while loading (one tensor per expert in the file, one fused 3-D
parameter in the module). Secateur prunes and writes what the file holds, so it converts in one direction only, from
file to module: by transformers' own rules (`conversion_mapping`), applied to one group of tensors at a time. To find
out where each entry of a tensor lands, it converts tagged tensors by the same rules.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError


@dataclass(frozen=True)
class TensorGroup:
    """Checkpoint tensors that are converted together, and the parameters (and buffers) that they become."""

    target: str
    parts: tuple[tuple[str, str], ...]  # (tensor name, the pattern of the converter that it matched), in order
    parameters: Mapping[str, tuple[int, ...]]  # their shapes, by name
    converter: Any = None  # transformers' WeightConverter; None where a tensor is only renamed

    @property
    def names(self) -> list[str]:
        """Names of the checkpoint tensors."""
        return [name for name, _ in self.parts]


@dataclass(frozen=True)
class Placement:
    """Where one checkpoint matrix lies in the module, as the inputs that it multiplies see it."""

    parameter: str  # the module's parameter that multiplies with it
    expert: int | None  # which slice of that parameter it is
    transposed: bool  # the file stores (in, out)
    columns: Tensor | None = None  # the parameter's input column for each of the matrix; None where they are the same
    rows: Tensor | None = None  # the same for the output rows


# Which tensor of a group: the pattern that it matched, and its number among those that matched the same one.
_Key = tuple[str, int]


class Conversion:
    """The groups of tensors that make up a module's parameters, found from names and shapes alone."""

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model = model
        self._shapes = shapes
        self._traces: dict[Any, dict[_Key, Placement]] = {}
        self._known = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        self.groups: dict[str, TensorGroup] = {}
        self.unused: list[str] = []  # tensors that the module does not read; they are copied as they are
        self._by_tensor: dict[str, TensorGroup] = {}
        self._by_parameter: dict[str, TensorGroup] = {}
        for group in self._find():
            self._by_tensor |= dict.fromkeys(group.names, group)
            self._by_parameter |= dict.fromkeys(group.parameters, group)
            self.groups[group.target] = group

    def _find(self) -> Iterable[TensorGroup]:
        from transformers.core_model_loading import dot_natural_key

        renamings, converters = _rules(self._model)
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        found: dict[str, list[tuple[str, str | None]]] = {}
        for name in sorted(self._shapes, key=dot_natural_key):
            target, pattern = self._rename(name, renamings, converters)
            if target in self._known:
                found.setdefault(target, []).append((name, pattern))
            else:
                self.unused.append(name)
        prefix = f"{getattr(self._model, 'base_model_prefix', None) or ''}."
        for target, parts in found.items():
            name, pattern = parts[0]
            held: dict[str, str] = {}
            for other, _ in parts:  # a tensor that is only renamed is alone
                same = held.setdefault(target if pattern is None else other.removeprefix(prefix), other)
                if same != other:
                    raise CheckpointError(
                        f"{same} and {other}: both are the parameter {target} of the model, so that one of them would "
                        "be lost. The checkpoint holds weights in two layouts of names; remove one of them."
                    )
            if pattern is None:
                yield TensorGroup(target, ((name, name),), {target: self._shapes[name]})
                continue
            matched = tuple((name, str(part)) for name, part in parts)
            group = TensorGroup(target, matched, {}, by_pattern[pattern])
            meta = {name: torch.empty(self._shapes[name], device="meta") for name in group.names}
            yield replace(group, parameters={name: made.shape for name, made in self.convert(group, meta).items()})

    def _rename(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        if not renamings and not converters:
            return name, None
        from transformers.core_model_loading import rename_source_key

        prefix = getattr(self._model, "base_model_prefix", None)
        target, pattern = rename_source_key(name, renamings, converters, prefix, self._known)
        if target not in self._known and name in self._known:
            target, pattern = rename_source_key(name, [], [], prefix, self._known)
        return target, pattern

    def of(self, names: Iterable[str]) -> list[TensorGroup]:
        """The groups that the named tensors belong to, each once; tensors that the module does not read have none."""
        return _each_once(self._by_tensor, names)

    def making(self, parameters: Iterable[str]) -> list[TensorGroup]:
        """The groups that make the named parameters, each once; parameters that no tensor makes are left out."""
        return _each_once(self._by_parameter, parameters)

    def convert(self, group: TensorGroup, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters (by name) that the tensors of a group become."""
        if group.converter is None:
            return {group.target: tensors[group.parts[0][0]]}
        converter = deepcopy(group.converter)
        for name, pattern in group.parts:
            converter.add_tensor(group.target, name, pattern, tensors[name])
        made = converter.convert(group.target, model=self._model, config=getattr(self._model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def placements(
        self, group: TensorGroup, transposed: Mapping[str, bool], kernels: Collection[str] = ()
    ) -> dict[str, list[Placement]]:
        """For each tensor of a group, the places of its matrices: one, or one per expert of a 3-D tensor.

        `transposed` says for each parameter of interest whether the module stores it (in, out). Tensors that make
        none of those parameters are left out. `kernels` are those of convolutions, which hold no experts.
        """
        if group.converter is None:
            parameter, (name, _) = group.target, group.parts[0]
            if parameter not in transposed:
                return {}
            fused = len(self._shapes[name]) == 3 and parameter not in kernels
            experts = range(self._shapes[name][0]) if fused else [None]
            return {name: [Placement(parameter, expert, transposed[parameter]) for expert in experts]}
        if not any(parameter in transposed for parameter in group.parameters):
            return {}
        order: dict[str, list[str]] = {}
        for name, pattern in group.parts:
            order.setdefault(pattern, []).append(name)
        # Of a stack of experts two are traced, since stacking treats them all alike.
        merging = type(group.converter.operations[0]).__name__ == "MergeModulelist"
        stacked = merging and min(map(len, order.values())) > 1
        parts = [(name, p) for name, p in group.parts if not stacked or name in order[p][:2]]
        traced = self._trace(group, parts, transposed)
        result: dict[str, list[Placement]] = {}
        for name, pattern in group.parts:
            index = order[pattern].index(name)
            key = (pattern, 0 if stacked else index)
            if key not in traced:
                continue
            place = traced[key]
            if stacked:
                if place.expert != 0:
                    raise CheckpointError(f"{name}: the stack of experts does not start with the first one.")
                place = replace(place, expert=index)
            result[name] = [place]
        return result

    def _trace(
        self, group: TensorGroup, parts: Sequence[tuple[str, str]], transposed: Mapping[str, bool]
    ) -> dict[_Key, Placement]:
        """Where each tensor lands. Blocks that are built alike are traced once."""
        signature = (
            id(group.converter),
            tuple((pattern, self._shapes[name]) for name, pattern in parts),
            tuple(transposed.get(parameter) for parameter in group.parameters),
        )
        if signature not in self._traces:
            traced = self._trace_tags(group, parts, transposed)
            self._traces[signature] = {
                key: replace(place, parameter=_after_digits(place.parameter)) for key, place in traced.items()
            }
        full = {_after_digits(parameter): parameter for parameter in group.parameters}
        return {key: replace(place, parameter=full[place.parameter]) for key, place in self._traces[signature].items()}

    def _trace_tags(
        self, group: TensorGroup, parts: Sequence[tuple[str, str]], transposed: Mapping[str, bool]
    ) -> dict[_Key, Placement]:
        # Each entry carries (tensor, row, column) in one integer through the very conversion that weights take.
        tags: dict[str, Tensor] = {}
        keys: list[_Key] = []
        for number, (name, pattern) in enumerate(parts):
            if len(self._shapes[name]) != 2:
                return {}
            rows, columns = self._shapes[name]
            row, column = torch.arange(rows).unsqueeze(1), torch.arange(columns).unsqueeze(0)
            tags[name] = (number << 2 * _BITS) + (row << _BITS) + column
            keys.append((pattern, sum(key[0] == pattern for key in keys)))
        made = self.convert(replace(group, parts=tuple(parts)), tags)
        result: dict[_Key, Placement] = {}
        for parameter, value in made.items():
            if parameter not in transposed or value.dim() not in (2, 3):
                continue
            experts: Sequence[int | None] = range(value.shape[0]) if value.dim() == 3 else [None]
            for expert in experts:
                view = value if expert is None else value[expert]
                view = view.t() if transposed[parameter] else view  # (out, in)
                for number in {*(view[:, 0] >> 2 * _BITS).tolist(), *(view[0] >> 2 * _BITS).tolist()}:
                    if keys[number] not in result:
                        result[keys[number]] = _read_tags(view, number, parameter, expert)
        return result


def _each_once(groups: Mapping[str, TensorGroup], names: Iterable[str]) -> list[TensorGroup]:
    found = (groups[name] for name in names if name in groups)
    return list({group.target: group for group in found}.values())


_BITS = 20  # of each coordinate in a tag; no matrix is wider than a million
_COORDINATE = (1 << _BITS) - 1


def _read_tags(view: Tensor, number: int, parameter: str, expert: int | None) -> Placement:
    """The placement of tensor `number`, whose tags lie somewhere in an (out, in) view of a parameter."""
    own = view >> 2 * _BITS == number
    first = int(own.any(dim=1).nonzero()[0])
    inputs = own[first].nonzero().squeeze(1)
    outputs = own[:, inputs[0]].nonzero().squeeze(1)
    row = view[first, inputs]
    is_transposed = bool(len(inputs) > 1 and row[0] >> _BITS != row[1] >> _BITS)
    along, across = (_BITS, 0) if is_transposed else (0, _BITS)
    columns = _positions(inputs, row >> along & _COORDINATE, view.shape[1])
    rows = _positions(outputs, view[outputs, inputs[0]] >> across & _COORDINATE, view.shape[0])
    return Placement(parameter, expert, is_transposed, columns, rows)


def _positions(places: Tensor, coordinates: Tensor, size: int) -> Tensor | None:
    """The place of each coordinate; None when every coordinate is in its own place and nothing else is there."""
    position = torch.empty_like(places)
    position[coordinates] = places
    whole = len(places) == size and torch.equal(position, torch.arange(size))
    return None if whole else position


def _rules(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """The renamings and converters of transformers for this model; none for any other module."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return [], []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules = get_model_conversion_mapping(model)
    return (
        [rule for rule in rules if isinstance(rule, WeightRenaming)],
        [rule for rule in rules if isinstance(rule, WeightConverter)],
    )


def _after_digits(name: str) -> str:
    """The part of a name after its first number: the same for the same tensor of every block."""
    return re.split(r"(?:^|\.)\d+(?:\.|$)", name, maxsplit=1)[-1]
