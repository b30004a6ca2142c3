"""What must hold of every problem before it is solved, and of every solution after, whoever wrote the method."""

import torch
from jaxtyping import Shaped
from torch import Tensor

from secateur.core.own_code import blamed, written_at
from secateur.core.problem import Method, Problem, Solution
from secateur.errors import MethodError, NumericalError, PatternError


def first_nonfinite(values: Shaped[Tensor, "..."]) -> tuple[int, ...] | None:
    """The index of the first entry that is NaN or infinite, None where there is none."""
    bad = ~values.isfinite()
    if not bool(bad.any()):
        return None
    return tuple(int(part) for part in torch.unravel_index(bad.flatten().int().argmax(), values.shape))


def _entry(values: Tensor) -> str:
    """Where in a matrix the first entry that is not finite lies, and what it is."""
    index = first_nonfinite(values)
    assert index is not None
    return f"first {float(values[index]):g} in row {index[0]}, column {index[1]}"


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
            f"{name}: {bad} of {weight.numel()} weights are NaN or infinite, {_entry(weight)}. The checkpoint is "
            f'damaged; download it again, or leave this matrix out with --skip "{name}".'
        )


def solved(problem: Problem, method: Method) -> Solution:
    """The solution of a method, checked as in `check_solution`.

    Raises `MethodError` with the line of somebody's own code that raised an error there.
    """
    with blamed(f"{problem.name}: {method.name} failed with", method.solve):
        solution = method.solve(problem)
    check_solution(problem, solution, method)
    return solution


def check_solution(problem: Problem, solution: Solution, method: Method) -> None:
    """Raise `MethodError` for what is no solution, or one of other things than tensors beside the weight.

    Raise `PatternError` or `NumericalError` for another shape or dtype, numbers that are not finite, a broken pattern.
    """
    place = written_at(method.solve)
    end = f" It is made in {place}." if place is not None else ""
    if not isinstance(solution, Solution):
        raise MethodError(
            f"{problem.name}: {method.name} returned a {type(solution).__name__}, expected a secateur.Solution.{end}"
        )
    for part, value in (("weight", solution.weight), ("mask", solution.mask)):
        device = value.device if isinstance(value, torch.Tensor) else None
        if device != problem.weight.device:
            found = f"on {device}" if device is not None else f"that is a {type(value).__name__}"
            expected = f"expected a tensor on {problem.weight.device}"
            raise MethodError(f"{problem.name}: {method.name} returned a {part} {found}, {expected}.{end}")
    name, weight, new, mask = problem.name, problem.weight, solution.weight, solution.mask
    if {new.shape, mask.shape} != {weight.shape} or (new.dtype, mask.dtype) != (weight.dtype, torch.bool):
        raise PatternError(
            f"{name}: {method.name} returned a {new.dtype} weight of shape {tuple(new.shape)} and a {mask.dtype} "
            f"mask of {tuple(mask.shape)}, expected {weight.dtype} and torch.bool, both of {tuple(weight.shape)}."
        )
    violation = problem.pattern.violation(mask)
    if violation is not None:
        raise PatternError(f"{name}: the mask of {method.name} breaks {problem.pattern}: {violation}.")
    if not bool(new.isfinite().all()):
        raise NumericalError(
            f"{name}: {method.name} returned {int((~new.isfinite()).sum())} of {new.numel()} weights that are NaN "
            f"or infinite, {_entry(new)}, where the source has none. Use more damping, if the method has any, or "
            f'leave this matrix out with --skip "{name}".'
        )
    outside = new.ne(0) & ~mask
    if bool(outside.any()):
        raise PatternError(
            f"{name}: {method.name} returned {int(outside.sum())} non-zero weights where its own mask "
            "says that they are removed."
        )
