"""The matrices of a block in the order in which a forward reaches them, by the input that they read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from secateur.models.flow.stream import Stream
from secateur.models.flow.tap import InputTap, Key
from secateur.models.shape.matrices import Matrix, tapped
from secateur.models.shape.structure import Block


@dataclass(frozen=True)
class Site:
    """Matrices that are pruned together. `leader` says whose input each reads, where all read one input, once."""

    matrices: list[Matrix]
    leader: Mapping[Key, Key] | None

    @property
    def parameters(self) -> set[str]:
        """The names of their parameters."""
        return {matrix.parameter for matrix in self.matrices}


def sites(block: Block, matrices: Sequence[Matrix], stream: Stream) -> tuple[list[Site], Tensor]:
    """The matrices of a loaded block by the input that they read, in the order in which a forward reaches them.

    All experts of a mixture make one site for each of their inputs. Found by running the first batch, whose hidden
    states after the block are returned as well.
    """
    inputs = InputTap(tapped(block, matrices)[0])
    inputs.begin(stop=False)
    with inputs:
        output = stream.run(block, 0, aside=True)
    site = {matrix.parameter: matrix.site for matrix in matrices}
    site_of = {site[parameter]: site[leader] for (parameter, _), (leader, _) in inputs.leader.items()}
    groups: dict[str, list[Matrix]] = {name: [] for name in dict.fromkeys(site_of.values())}
    for matrix in matrices:
        # An expert that the first batch did not reach belongs where the others of its kind are.
        groups.setdefault(site_of.get(matrix.site, matrix.site), []).append(matrix)
    return [Site(group, _one_input(group, inputs)) for group in groups.values() if group], output


def _one_input(matrices: Sequence[Matrix], inputs: InputTap) -> Mapping[Key, Key] | None:
    keys = {(matrix.parameter, matrix.expert) for matrix in matrices}
    leader = {key: inputs.leader[key] for key in keys if inputs.calls.get(key) == 1}
    return leader if len(leader) == len(keys) and len(set(leader.values())) == 1 else None
