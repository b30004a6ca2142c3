"""What must hold of every problem before it is solved, and of every solution after, whoever wrote the method."""

import torch
from jaxtyping import Shaped
from torch import Tensor

from secateur.core.problem import Method, Problem, Solution
from secateur.errors import NumericalError, PatternError


def check_weight(name: str, weight: Shaped[Tensor, "out in"]) -> None:
    """Raise `NumericalError` when a matrix holds NaN or infinity, or is not stored as plain floating point."""
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise NumericalError(
            f"{name}: stored as {weight.dtype}; pruning needs unquantised float weights. Dequantise the "
            f'checkpoint, or leave this matrix out with --skip "{name}".'
        )
    if not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise NumericalError(
            f"{name}: {bad} of {weight.numel()} weights are NaN or infinite. The checkpoint is damaged; "
            f'download it again, or leave this matrix out with --skip "{name}".'
        )


def check_solution(problem: Problem, solution: Solution, method: Method) -> None:
    """Raise for a solution of another shape or dtype, one that is not finite, or one that breaks its pattern."""
    name, weight, new, mask = problem.name, problem.weight, solution.weight, solution.mask
    expected, found = (weight.shape, weight.dtype, torch.bool), (new.shape, new.dtype, mask.dtype)
    if found != expected or mask.shape != weight.shape:
        raise PatternError(
            f"{name}: {method.name} gave a {new.dtype} weight of shape {tuple(new.shape)} and a {mask.dtype} "
            f"mask of {tuple(mask.shape)}, expected {weight.dtype} and torch.bool, both of {tuple(weight.shape)}."
        )
    violation = problem.pattern.violation(mask)
    if violation is not None:
        raise PatternError(f"{name}: the mask of {method.name} breaks {problem.pattern}: {violation}.")
    if not bool(new.isfinite().all()):
        raise NumericalError(
            f"{name}: {method.name} gave {int((~new.isfinite()).sum())} of {new.numel()} weights that are NaN "
            f"or infinite, where the source has none. Use more damping, if the method has any, or leave this matrix "
            f'out with --skip "{name}".'
        )
    outside = new.ne(0) & ~mask
    if bool(outside.any()):
        raise PatternError(
            f"{name}: {method.name} gave {int(outside.sum())} non-zero weights where its own mask "
            "says that they are removed."
        )
