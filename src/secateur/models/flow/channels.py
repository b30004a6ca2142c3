"""Which inputs of a matrix may change places, and what makes them: found by feeding numbers through a block.

Every product of the block gives way to numbers that are known, so that what a matrix multiplies says where it came
from: of which outputs each of its inputs is made, and which inputs are made in the same way. Weights play no part in
it, and neither do names. That an order of the inputs changes nothing is then left to be shown on the weights
themselves.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.flow.stream import Stream
from secateur.models.flow.tap import Product, ProductTap
from secateur.models.shape.matrices import Matrix, is_kernel, tapped
from secateur.models.shape.structure import Block

LOW, HIGH = 0.3, 0.7  # what products give way to: within every clamp, above every rectifier
NEAR = 0.02  # of the distance between what inputs are with all outputs low, and with all high
MANY = 1024  # ways in which inputs are made: beyond it nothing can be said to be alike


@dataclass(frozen=True)
class Maker:
    """Parameters whose outputs are inputs of other ones: `rows` has the output that each input is made of."""

    site: str
    rows: Tensor


@dataclass(frozen=True)
class Channels:
    """The inputs of a parameter that may change places.

    An orbit is a tensor (units, together) of inputs. Units may change places, column by column: inputs that are made of
    one output, such as those of heads that share their values, go together.
    """

    orbits: Sequence[Tensor]
    makers: Sequence[Maker]


Fill = Callable[[str, int, tuple[int, ...]], Tensor]
"""Numbers of shape (..., outputs) for a site's product: by its site, how many came before, and that shape."""


class _Fed(ProductTap):
    """Puts numbers in the place of every product, and keeps what the products are given."""

    def __init__(self, parameters: dict[str, tuple[Tensor, bool]], sites: dict[str, str], fill: Fill) -> None:
        super().__init__(parameters)
        self._sites, self._fill = sites, fill
        self._calls: dict[str, int] = {}
        self.inputs: dict[str, list[Tensor]] = {}

    def before(self, product: Product) -> None:
        x = product.x.detach()
        rows = x.reshape(-1, x.shape[-1]).float()
        if product.batched:  # every expert with every token; those that are routed elsewhere are all zero
            rows = rows[(rows != 0).any(dim=-1)]
        self.inputs.setdefault(self._sites[product.name], []).append(rows)

    def after(self, product: Product, result: Tensor, factor: float) -> Tensor:
        site = self._sites[product.name]
        number = self._calls[site] = self._calls.get(site, -1) + 1
        turned = result.transpose(-1, -2) if product.is_left and result.dim() > 1 else result
        made = self._fill(site, number, tuple(turned.shape)).to(result).expand(turned.shape)
        return (made.transpose(-1, -2) if product.is_left and result.dim() > 1 else made).clone()


def biases(module: nn.Module, leaf: str, outputs: tuple[int, ...]) -> list[str]:
    """The vectors of a module that are added to what one of its matrices makes, by name and shape."""
    return [
        name
        for name, value in module.named_parameters(recurse=False)
        if tuple(value.shape) == outputs
        and name.endswith("bias")
        and (name == "bias" if leaf == "weight" else name.startswith(leaf))
    ]


def biases_of(block: Block, parameter: str, transposed: bool) -> list[str]:
    """The full names of the vectors that are added to what a parameter of a loaded block makes."""
    path, _, leaf = parameter.removeprefix(f"{block.path}.").rpartition(".")
    module = block.module.get_submodule(path)
    shape = module._parameters[leaf].shape  # type: ignore[union-attr]
    outputs = (*shape[:-2], shape[-1] if transposed else shape[-2])
    home = f"{block.path}.{path}" if path else block.path
    return [f"{home}.{name}" for name in biases(module, leaf, tuple(outputs))]


@contextmanager
def _zeroed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that are zero in the meantime."""
    before = [parameter.data.clone() for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data.zero_()
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)


@torch.no_grad()
def channels(block: Block, matrices: Sequence[Matrix], stream: Stream) -> dict[str, Channels]:
    """The inputs that may change places, by the sites (inside the block) of all its `matrices` that have some.

    Found by forwards of the first batch, two for each doubling of a matrix's outputs. Those of convolutions stay.
    """
    prefix = len(block.path) + 1
    matrices = [matrix for matrix in matrices if not is_kernel(block.module, matrix.parameter[prefix:])]
    parameters, layout = tapped(block, matrices)
    sites = {matrix.parameter: matrix.site.removeprefix(f"{block.path}.") for matrix in matrices}
    vectors = [name for parameter, stored in layout.items() for name in biases_of(block, parameter, stored)]
    by_name = {f"{block.path}.{name}": value for name, value in block.module.named_parameters()}

    eps = float(torch.finfo(next(iter(by_name.values())).dtype).eps)

    def given(fill: Fill) -> dict[str, Tensor]:
        tap = _Fed(parameters, sites, fill)
        with tap:
            stream.run(block, 0, aside=True)
        return {site: torch.cat(found) for site, found in tap.inputs.items()}

    with _zeroed([by_name[name] for name in dict.fromkeys(vectors)]):
        outputs = {
            sites[name]: int(parameter.shape[-1] if stored else parameter.shape[-2])
            for name, (parameter, stored) in parameters.items()
        }
        makers = _makers(given, outputs)
        return _alike(given, makers, max(1e-4, 4 * eps)) if makers else {}


def _makers(given: Callable[[Fill], dict[str, Tensor]], outputs: dict[str, int]) -> dict[str, list[Maker]]:
    """For each site whose inputs are made output by output, what makes them."""

    def means(high: str | None, which: Tensor | None = None) -> dict[str, Tensor]:
        def fill(site: str, number: int, shape: tuple[int, ...]) -> Tensor:
            value = torch.full(shape[-1:], LOW)
            if site == high:
                value[slice(None) if which is None else which] = HIGH
            return value

        return {site: rows.mean(dim=0).cpu() for site, rows in given(fill).items()}

    low = means(None)
    found: dict[str, list[Maker]] = {}
    for source, count in outputs.items():
        high = means(source)
        fed = [site for site in low if site in high and not torch.allclose(low[site], high[site], rtol=NEAR, atol=1e-4)]
        if not fed:
            continue
        numbers = torch.arange(count)
        probes = [means(source, (numbers >> bit) % 2 == 1) for bit in range(max(1, math.ceil(math.log2(count))))]
        for site in fed:
            spread = high[site] - low[site]
            share = torch.stack([probe[site] - low[site] for probe in probes]) / spread
            rows = _read(share, count) if bool(share.isfinite().all()) else []
            found.setdefault(site, []).extend(Maker(source, own) for own in rows)
    return {site: own for site, own in found.items() if own}


def _read(share: Tensor, count: int) -> list[Tensor]:
    """The outputs whose numbers stand in the bits that some inputs saw, one or two for each input, or none.

    `share` (bits, inputs) is how far an input moved when the outputs with that bit went from low to high: 0, 1, or,
    where it is made of two outputs, such as a gate and what it lets through, one of two other values.
    """
    none, all_ = share.abs() <= NEAR, (share - 1).abs() <= NEAR
    rest = share[~(none | all_)].sort().values
    weights = 1 << torch.arange(len(share)).unsqueeze(1)
    if not len(rest):
        roles = [all_]
    else:
        apart = (rest.diff() > NEAR / 2).nonzero().flatten()
        ends = [0, *(apart + 1).tolist(), len(rest)]
        parts = [rest[start:stop] for start, stop in pairwise(ends)]
        if len(parts) > 2 or any(float(part[-1] - part[0]) > NEAR for part in parts):
            return []
        # One value alone: of two outputs, the numbers of one have all the bits that those of the other have.
        middle = float(parts[0][-1] + parts[1][0]) / 2 if len(parts) == 2 else -math.inf
        between = ~(none | all_)
        roles = [all_ | (between & (share < middle)), all_ | (between & (share >= middle))]
    rows = [(role * weights).sum(dim=0) for role in roles]
    return rows if all(int(own.max()) < count for own in rows) else []


def _alike(
    given: Callable[[Fill], dict[str, Tensor]], makers: dict[str, list[Maker]], near: float
) -> dict[str, Channels]:
    """The inputs that are the same numbers when their makers make the same numbers, and all other outputs random.

    `near` is what may lie between them, as a share of the largest.
    """
    made: dict[str, list[tuple[int, Tensor]]] = {}
    for number, maker in enumerate(maker for own in makers.values() for maker in own):
        made.setdefault(maker.site, []).append((number, torch.tensor(sorted(set(maker.rows.tolist())))))

    def fill(site: str, number: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(_seed(site, number))
        value = 2 * torch.randn(shape, generator=generator)
        for role, rows in made.get(site, ()):
            own = torch.Generator().manual_seed(_seed(site, number) + role + 1)
            value[..., rows] = torch.randn((*shape[:-1], 1), generator=own)
        return value

    found = given(fill)
    result = {}
    for site, own in makers.items():
        classes = _classes(found[site], near)
        if classes is None:
            continue
        # What makes several inputs of one kind at once, such as the logits of a head's attention, stays as it is.
        own = [maker for maker in own if _distinct(torch.stack([maker.rows, classes], dim=1))]
        orbits = _orbits([maker.rows.tolist() for maker in own], classes.tolist()) if own else []
        if orbits:
            result[site] = Channels(orbits, own)
    return result


def _distinct(pairs: Tensor) -> bool:
    return len(set(map(tuple, pairs.tolist()))) == len(pairs)


def _seed(site: str, number: int) -> int:
    """A seed for the numbers that stand in for a product, the same in every process."""
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(site)) * 64 + number * 8


def _classes(x: Tensor, near: float) -> Tensor | None:
    """A number for each column, the same for columns that are equal but for rounding; None where none are."""
    near *= float(x.abs().max())
    classes = torch.full((x.shape[1],), -1)
    for number in range(min(MANY, x.shape[1])):
        left = (classes < 0).nonzero()
        if not len(left):
            break
        first = int(left[0])
        same = (x - x[:, first : first + 1]).abs().amax(dim=0).cpu() <= near
        classes[same & (classes < 0)] = number
    return None if bool((classes < 0).any()) or int(classes.max()) + 1 == len(classes) else classes


def _orbits(rows: Sequence[Sequence[int]], classes: Sequence[int]) -> list[Tensor]:
    """Units of inputs that share what they are made of, by the classes of their inputs and by what these share."""
    unit = list(range(len(classes)))

    def top(channel: int) -> int:
        while unit[channel] != channel:
            unit[channel] = channel = unit[unit[channel]]
        return channel

    for made in rows:
        first: dict[int, int] = {}
        for channel, row in enumerate(made):
            unit[top(channel)] = top(first.setdefault(row, channel))
    members: dict[int, list[int]] = {}
    for channel in range(len(classes)):
        members.setdefault(top(channel), []).append(channel)
    orbits: dict[Any, list[list[int]]] = {}
    for own in members.values():
        together = sorted(own, key=lambda channel: classes[channel])
        which = tuple(classes[channel] for channel in together)
        if len(set(which)) == len(which):
            of_each = [[made[channel] for channel in together] for made in rows]
            shared = tuple(tuple(part.index(row) for row in part) for part in of_each)
            orbits.setdefault((which, shared), []).append(together)
    return [torch.tensor(units) for units in orbits.values() if len(units) > 1]
