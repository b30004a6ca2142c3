"""The matrices of a block in the order in which a forward reaches them, by the input that they read."""

from collections.abc import Sequence

from secateur.models.flow.stream import Stream
from secateur.models.flow.tap import InputTap
from secateur.models.shape.matrices import Matrix, tapped
from secateur.models.shape.structure import Block


def sites(block: Block, matrices: Sequence[Matrix], stream: Stream) -> list[list[Matrix]]:
    """The matrices of a loaded block in groups that read the same input, in the order in which a forward reaches them.

    All experts of a mixture make one group for each of their inputs. Found by running the first batch.
    """
    inputs = InputTap(tapped(block, matrices)[0])
    inputs.begin(stop=False)
    with inputs:
        stream.run(block, 0, aside=True)
    site = {matrix.parameter: matrix.site for matrix in matrices}
    site_of = {site[parameter]: site[leader] for (parameter, _), (leader, _) in inputs.leader.items()}
    groups: dict[str, list[Matrix]] = {name: [] for name in dict.fromkeys(site_of.values())}
    for matrix in matrices:
        # An expert that the first batch did not reach belongs where the others of its kind are.
        groups.setdefault(site_of.get(matrix.site, matrix.site), []).append(matrix)
    return [group for group in groups.values() if group]
