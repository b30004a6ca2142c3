"""From parameters back to the checkpoint tensors that made them."""

from collections.abc import Mapping

from torch import Tensor

from secateur.models.shape.matrices import Matrix, prunable_parameters
from secateur.models.shape.skeleton import Skeleton
from secateur.models.weights.conversion import TensorGroup


class Inverse:
    """Checkpoint tensors made of changed parameters: those that were only renamed, and those that are matrices.

    transformers has no inverse of a conversion that is exact by construction. But it is known where every matrix lies,
    and that is enough for weights.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self._matrices: dict[str, list[Matrix]] = {}
        for matrix in skeleton.matrices:
            self._matrices.setdefault(matrix.tensor, []).append(matrix)
        self._transposed = {
            f"{block.path}.{name}": stored
            for block in skeleton.blocks
            for name, stored in prunable_parameters(block.module, None)[0].items()
        }

    def possible(self, group: TensorGroup) -> bool:
        """Whether all tensors of a group can be made of its parameters."""
        return group.converter is None or all(
            name in self._matrices and all(matrix.parameter in self._transposed for matrix in self._matrices[name])
            for name in group.names
        )

    def tensors(self, group: TensorGroup, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a group, with the shapes of the checkpoint and the dtype of the parameters."""
        if group.converter is None:
            return {group.names[0]: parameters[group.target]}
        made = {}
        for name in group.names:
            (matrix,) = self._matrices[name]
            part = matrix.of_parameter(parameters[matrix.parameter], self._transposed[matrix.parameter])
            made[name] = part.t() if matrix.transposed else part
        return made
