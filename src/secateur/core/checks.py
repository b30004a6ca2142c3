"""What must hold of every problem before it is solved, and of every solution after, whoever wrote the method."""

import torch
from jaxtyping import Shaped
from torch import Tensor

from secateur.core.own_code import raised_at, written_at
from secateur.core.problem import Method, Problem, Solution
from secateur.errors import MethodError, NumericalError, PatternError, SecateurError


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


def solved(problem: Problem, method: Method) -> Solution:
    """The solution of a method, checked as in `check_solution`.

    Raises `MethodError` with the line of somebody's own code that raised an error there.
    """
    try:
        solution = method.solve(problem)
    except (SecateurError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        place = raised_at(error) or written_at(method.solve)
        if place is None:
            raise  # ours, which nobody else can mend
        what = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise MethodError(
            f"{problem.name}: {method.name} failed with {type(error).__name__}: {what} ({place}). --debug shows the "
            "traceback."
        ) from error
    check_solution(problem, solution, method)
    return solution


def check_solution(problem: Problem, solution: Solution, method: Method) -> None:
    """Raise for a solution of another shape or dtype, one that is not finite, or one that breaks its pattern."""
    _check_kind(problem, solution, method)
    name, weight, new, mask = problem.name, problem.weight, solution.weight, solution.mask
    expected, found = (weight.shape, weight.dtype, torch.bool), (new.shape, new.dtype, mask.dtype)
    if found != expected or mask.shape != weight.shape:
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
            f"or infinite, where the source has none. Use more damping, if the method has any, or leave this matrix "
            f'out with --skip "{name}".'
        )
    outside = new.ne(0) & ~mask
    if bool(outside.any()):
        raise PatternError(
            f"{name}: {method.name} returned {int(outside.sum())} non-zero weights where its own mask "
            "says that they are removed."
        )


def _check_kind(problem: Problem, solution: object, method: Method) -> None:
    """Raise `MethodError` for what is no solution, or one of other things than tensors beside the weight."""
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
